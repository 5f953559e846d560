package chroot

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Child is the second life of a program that uses this package: its main calls
// it first. In a first life it does nothing; in a second it does not return.
func Child() {
	text, ok := os.LookupEnv(again)
	if !ok {
		return
	}
	complaints := os.NewFile(3, "complaints")
	syscall.CloseOnExec(3)
	code, err := inside(text)
	if err != nil {
		fmt.Fprint(complaints, err)
	}
	os.Exit(code)
}

// inside is the first process of the tree's namespaces: it furnishes the tree,
// starts the command and looks after it and the orphans.
func inside(text string) (int, error) {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return 1, err
	}
	if err := furnish(j); err != nil {
		return 1, err
	}
	for name, value := range map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME": "/root",
		// systemctl does not see that this is no running system, and would
		// complain; so it says what it skips and is content.
		"SYSTEMD_OFFLINE": "1",
	} {
		os.Setenv(name, value)
	}
	for _, name := range []string{again, "TMPDIR", "SHELL"} { // of the machine outside
		os.Unsetenv(name)
	}
	path, err := exec.LookPath(j.Args[0])
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", j.Args[0], errors.Unwrap(err))
		return 127, nil
	}
	sys := &syscall.SysProcAttr{}
	if j.Terminal {
		// The command's own group in the foreground: ^C is for it alone.
		sys.Setpgid, sys.Foreground, sys.Ctty = true, true, 0
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	pid, err := syscall.ForkExec(path, j.Args, &syscall.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: sys,
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", path, err)
		return 126, nil
	}
	go func() {
		for s := range signals {
			syscall.Kill(pid, s.(syscall.Signal)) // an error means that it has just ended
		}
	}()
	return await(pid)
}

// await waits for pid, and for all children that others left behind.
func await(pid int) (int, error) {
	for {
		var status syscall.WaitStatus
		ended, err := syscall.Wait4(-1, &status, syscall.WUNTRACED, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		case ended != pid:
		case status.Stopped():
			syscall.Kill(pid, syscall.SIGCONT) // by ^Z, and nobody is there to continue it
		case status.Signaled():
			return 128 + int(status.Signal()), nil
		default:
			return status.ExitStatus(), nil
		}
	}
}

const still = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// furnish makes the tree this process's root, with what a machine has.
func furnish(j job) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	umask := unix.Umask(0)
	defer unix.Umask(umask)
	if err := unix.Sethostname([]byte(j.Name)); err != nil {
		return fmt.Errorf("hostname %s: %w", j.Name, err)
	}
	if err := pivot(j.Tree); err != nil {
		return err
	}
	for _, m := range []struct {
		what, at, options string
		flags             uintptr
	}{
		{"proc", "/proc", "", still},
		{"sysfs", "/sys", "", still | unix.MS_RDONLY},
		{"tmpfs", "/run", "mode=755", still &^ unix.MS_NOEXEC},
		// Not this machine's /dev: what a package's script does to disks is not
		// to be done to the server's.
		{"tmpfs", "/dev", "mode=755", unix.MS_NOSUID},
		{"devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620,gid=5", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"tmpfs", "/dev/shm", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
	} {
		if strings.HasPrefix(m.at, "/dev/") {
			if err := os.Mkdir(m.at, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.what, m.at, m.what, m.flags, m.options); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.what, m.at, err)
		}
	}
	if err := devices(); err != nil {
		return err
	}
	// Scripts of packages write settings of the kernel, which is the server's.
	if err := cover("/proc/sys", "/proc/sys"); err != nil {
		return err
	}
	if err := os.Mkdir("/run/lock", 0o777|os.ModeSticky); err != nil {
		return err
	}
	for i, f := range j.Files {
		if err := show(f, fmt.Sprintf("/run/.rookery-%d", i)); err != nil {
			return err
		}
	}
	return nil
}

// pivot makes tree the root and forgets the old one.
func pivot(tree string) error {
	// Only a mount can become a root.
	if err := unix.Mount(tree, tree, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind mount: %w", err)
	}
	if err := os.Chdir(tree); err != nil {
		return err
	}
	// The old root comes to lie upon the new one: pivot_root(2), "pivot_root(".", ".")".
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	return os.Chdir("/")
}

// devices fills /dev with what every program may expect there.
func devices() error {
	for _, d := range []struct {
		name         string
		major, minor uint32
	}{
		{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0},
	} {
		if err := unix.Mknod("/dev/"+d.name, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("/dev/%s: %w", d.name, err)
		}
	}
	for name, to := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2",
	} {
		if err := os.Symlink(to, "/dev/"+name); err != nil {
			return err
		}
	}
	return nil
}

// show puts f where it is to be seen; by way of temp, when the tree has a file there.
func show(f file, temp string) error {
	at := "/" + f.Path
	if !volatile(f.Path) {
		if err := os.WriteFile(temp, []byte(f.Content), f.Mode); err != nil {
			return err
		}
		defer os.Remove(temp) // what is mounted stays
		return cover(temp, at)
	}
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	return os.WriteFile(at, []byte(f.Content), f.Mode)
}

// cover mounts what over at, read-only.
func cover(what, at string) error {
	if err := unix.Mount(what, at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s: %w", at, err)
	}
	if err := unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", at, err)
	}
	return nil
}
