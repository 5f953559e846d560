package pid1

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"rookery/wire"
)

// first marks the test binary's second life, as the first process of a pid
// namespace; its value says what to do there.
const first = "ROOKERY_PID1"

func TestMain(m *testing.M) {
	if os.Getenv(first) != "" && os.Getpid() == 1 {
		live(os.Getenv(first))
	}
	os.Exit(m.Run())
}

// live is a first process: it inherits an orphan, sees its child's end, and ends.
func live(ending string) {
	check := func(err error) {
		if err != nil {
			println(err.Error())
			os.Exit(9)
		}
	}
	check(Entropy())
	dir, err := os.MkdirTemp("", "pid1")
	check(err)
	mount := Mount{Source: "tmpfs", Target: filepath.Join(dir, "new dir"), Type: "tmpfs"}
	check(MountAll(mount, Mount{Source: "x", Target: dir, Type: "nosuchfs", Optional: true}))
	check(os.WriteFile(filepath.Join(mount.Target, "file"), nil, 0o600))
	if err := MountAll(Mount{Source: "x", Target: dir, Type: "nosuchfs"}); err == nil || !strings.Contains(err.Error(), "mount "+dir) {
		check(errors.New("a mount that cannot be gave no error"))
	}

	code, err := Supervise(exec.Command("/bin/sh", "-c", "(sh -c 'exit 3' &) ; exit 42"))
	check(err)
	if code != 42 {
		check(errors.New("exit code"))
	}
	if code, _ := Supervise(exec.Command("/bin/sh", "-c", "kill -9 $$")); code != 137 {
		check(errors.New("signal"))
	}
	cmd := exec.Command("/bin/sleep", "1000") // left behind: End ends it
	check(cmd.Start())
	check(syscall.Unmount(mount.Target, 0))
	check(os.RemoveAll(dir))
	check(End(wire.Ending(ending), func(string) {}))
}

// The kernel turns a pid namespace's reboot into death by SIGHUP, its poweroff
// into SIGINT (kernel/pid_namespace.c, reboot_pid_ns).
func TestARealFirstProcess(t *testing.T) {
	for ending, want := range map[wire.Ending]syscall.Signal{wire.Reboot: syscall.SIGHUP, wire.Poweroff: syscall.SIGINT} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), first+"="+string(ending))
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Skipf("no user namespace here (%v): allow kernel.unprivileged_userns_clone, or run as root", err)
		}
		status := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if !status.Signaled() || status.Signal() != want {
			t.Errorf("%s: %v, want death by %v\n%s", ending, err, want, out)
		}
	}
}

func TestEndIsForFirstProcesses(t *testing.T) {
	if err := End(wire.Reboot, nil); err == nil {
		t.Fatal("no error")
	}
}

func TestMounted(t *testing.T) {
	got, err := mounted(strings.NewReader(`rootfs / rootfs rw 0 0
proc /proc proc rw 0 0
devtmpfs /dev devtmpfs rw 0 0
devpts /dev/pts devpts rw 0 0
tmpfs /run tmpfs rw 0 0
/dev/vda3 /run/rookery/root ext4 rw 0 0
/dev/vda1 /run/rookery/root/boot/e\040fi vfat rw 0 0
devtmpfs /run/rookery/root/dev devtmpfs rw 0 0
`))
	want := []string{"/run/rookery/root/dev", "/run/rookery/root/boot/e fi", "/run/rookery/root", "/run", "/dev/pts"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("mounted: %q, %v\nwant %q", got, err, want)
	}
}

const aliasFile = `# Aliases extracted from modules themselves.
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
alias virtio:d00000001v* virtio_net
alias virtio:d00000002v* virtio_blk
alias pci:v00008086d0000100Esv*sd*bc*sc*i* e1000
alias cpu:type:x86,ven*fam*mod*:feature:*0099* aesni_intel
alias acpi*:PNP0501:* [broken
alias fs-ext4 ext4
`

func TestColdplug(t *testing.T) {
	aliases, err := ParseAliases(strings.NewReader(aliasFile))
	if err != nil {
		t.Fatal(err)
	}
	sys := fstest.MapFS{
		"devices/pci0000:00/0000:00:02.0/modalias":    {Data: []byte("pci:v00001AF4d00001000sv00001AF4sd00000001bc02sc00i00\n")},
		"devices/pci0000:00/0000:00:04.0/modalias":    {Data: []byte("pci:v00008086d0000100Esv00001AF4sd00001100bc02sc00i00\n")},
		"devices/system/cpu/modalias":                 {Data: []byte("cpu:type:x86,ven0000fam000Fmod006B:feature:,0000,0099,\n")},
		"devices/platform/serial8250/modalias":        {Data: []byte("platform:serial8250\n")},
		"devices/pci0000:00/0000:00:02.0/uevent":      {Data: []byte("x")},
		"devices/pci0000:00/unreadable/modalias/deep": {Data: []byte("x")},
	}
	probe := func(name string) error {
		switch name {
		case "virtio_pci": // makes a device, as the real one does
			sys["devices/pci0000:00/0000:00:02.0/virtio0/modalias"] = &fstest.MapFile{Data: []byte("virtio:d00000001v00001AF4\n")}
		case "e1000":
			return fs.ErrNotExist
		}
		return nil
	}
	loaded, failed := Coldplug(sys, aliases, probe)
	slices.Sort(loaded)
	if !slices.Equal(loaded, []string{"aesni_intel", "virtio_net", "virtio_pci"}) || len(failed) != 1 || !strings.HasPrefix(failed[0], "e1000 (") {
		t.Errorf("loaded %v, failed %v", loaded, failed)
	}
}

func FuzzAliases(f *testing.F) {
	f.Add(aliasFile, "virtio:d00000001v00001AF4")
	f.Add("alias a:[ b\nalias a:\\ c", "a:")
	f.Fuzz(func(t *testing.T, file, modalias string) {
		aliases, err := ParseAliases(strings.NewReader(file))
		if err == nil {
			aliases.Match(modalias)
		}
	})
}

func TestLists(t *testing.T) {
	if got := list("ext4\n# comment\n\n vfat # for the ESP\n"); !slices.Equal(got, []string{"ext4", "vfat"}) {
		t.Errorf("list: %q", got)
	}
	if got := Consoles(fstest.MapFS{"class/tty/console/active": {Data: []byte("tty0 ttyS0\n")}}); !slices.Equal(got, []string{"tty0", "ttyS0"}) {
		t.Errorf("Consoles: %q", got)
	}
}
