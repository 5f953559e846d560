// Package pid1 is what a first process owes the kernel and the machine: early
// mounts, randomness, modules, the dead it inherits, and an orderly end.
package pid1

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"rookery/wire"
)

// A Mount is one early mount.
type Mount struct {
	Source, Target, Type string
	Flags                uintptr
	Data                 string
	Optional             bool // the kernel may do without
}

const quietly = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// Early is what has to be mounted before anything else can be done.
var Early = []Mount{
	{"proc", "/proc", "proc", quietly, "", false},
	{"sysfs", "/sys", "sysfs", quietly, "", false},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755", false},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666", true},
	{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "", true},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755", false},
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", false},
}

// EFIVars comes after the modules: it is one in most kernels.
var EFIVars = Mount{"efivarfs", "/sys/firmware/efi/efivars", "efivarfs", quietly, "", true}

// MountAll mounts in order. What is mounted already stays as it is.
func MountAll(mounts ...Mount) error {
	var errs []error
	for _, m := range mounts {
		err := os.MkdirAll(m.Target, 0o755)
		if err == nil {
			err = unix.Mount(m.Source, m.Target, m.Type, m.Flags, m.Data)
		}
		if err != nil && !errors.Is(err, unix.EBUSY) && !m.Optional {
			errs = append(errs, fmt.Errorf("mount %s: %w", m.Target, err))
		}
	}
	return errors.Join(errs...)
}

// Entropy returns when the kernel's random numbers are good. Only a blocking
// call makes a kernel without a hardware generator gather entropy (jitter,
// about 1 s). The DHCP library asks without blocking, and would ask for ever.
func Entropy() error {
	for {
		_, err := unix.Getrandom(make([]byte, 1), 0)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Supervise runs cmds until all have ended, and reaps every orphan that dies
// meanwhile. It returns the exit code of the last to end, 128 plus the number
// for a signal. Only a first process may call it, and nothing else in it may
// wait for children: that is why the agent's work is done in a child.
func Supervise(cmds ...*exec.Cmd) (code int, err error) {
	running := map[int]bool{}
	for _, cmd := range cmds {
		if e := cmd.Start(); e != nil {
			err = errors.Join(err, e)
			continue
		}
		running[cmd.Process.Pid] = true
		_ = cmd.Process.Release()
	}
	if len(running) > 0 {
		err = nil // one that runs is enough
	}
	for len(running) > 0 {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return 0, fmt.Errorf("wait for children: %w", err)
		}
		if !running[pid] {
			continue
		}
		delete(running, pid)
		code = status.ExitStatus()
		if status.Signaled() {
			code = 128 + int(status.Signal())
		}
	}
	return code, err
}

// Console makes cmd the owner of the terminal tty, with job control.
func Console(cmd *exec.Cmd, tty *os.File) {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
}

// End ends the machine, or with it the process's pid namespace: all other
// processes are ended, what is written is on disk, everything is unmounted.
// It returns only on an error.
func End(ending wire.Ending, log func(string)) error {
	if os.Getpid() != 1 {
		return errors.New("end: only a first process ends the machine")
	}
	how := unix.LINUX_REBOOT_CMD_RESTART
	if ending == wire.Poweroff {
		how = unix.LINUX_REBOOT_CMD_POWER_OFF
	}
	_ = unix.Kill(-1, unix.SIGTERM)
	reap(time.Second)
	_ = unix.Kill(-1, unix.SIGKILL)
	reap(time.Second)
	unix.Sync()
	if err := UnmountAll(); err != nil {
		log("unmount: " + err.Error())
	}
	unix.Sync()
	return unix.Reboot(how)
}

// reap waits until there are no children, for at most d.
func reap(d time.Duration) {
	for deadline := time.Now().Add(d); time.Now().Before(deadline); {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.ECHILD) {
			return
		}
		if pid == 0 {
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// UnmountAll unmounts everything that holds data, the last first, again while
// something is busy, for about 2 s.
func UnmountAll() error {
	var errs []error
	for range 20 {
		f, err := os.Open("/proc/self/mounts")
		if err != nil {
			return err
		}
		targets, err := mounted(f)
		_ = f.Close()
		if err != nil {
			return err
		}
		if errs = nil; len(targets) == 0 {
			return nil
		}
		for _, target := range targets {
			if err := unix.Unmount(target, 0); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", target, err))
			}
		}
		if !errors.Is(errors.Join(errs...), unix.EBUSY) {
			break
		}
		time.Sleep(100 * time.Millisecond) // the last process may still be going
	}
	return errors.Join(errs...)
}

// virtual filesystems hold nothing that could be lost.
var virtual = []string{"rootfs", "proc", "sysfs", "devtmpfs", "devpts", "efivarfs", "cgroup2", "ramfs"}

// mounted lists the mount points that hold data, the last mounted first.
func mounted(r io.Reader) ([]string, error) {
	var targets []string
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 || fields[1] == "/" {
			continue
		}
		// A bind mount of /dev below the target keeps the target busy.
		if slices.Contains(virtual, fields[2]) && strings.Count(fields[1], "/") == 1 {
			continue
		}
		targets = append(targets, unescape(fields[1]))
	}
	slices.Reverse(targets)
	return targets, lines.Err()
}

// unescape undoes the octal escapes of /proc/mounts.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// Consoles are the devices of the kernel's consoles (console= on its command
// line): "tty0", "ttyS0". sys is /sys.
func Consoles(sys fs.FS) []string {
	b, err := fs.ReadFile(sys, "class/tty/console/active")
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}
