package loader

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/disklayout"
)

// plan is the default layout on a disk of 8 GiB.
func plan(t *testing.T, fw disklayout.Firmware) disklayout.Plan {
	t.Helper()
	disks := []disklayout.Disk{{Name: "vda", Path: "/dev/vda", Size: 8 * disklayout.GiB}}
	p, err := disklayout.Fit(disklayout.Default(), disks, fw, "loader-test")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// tree makes files below a new directory; a name that ends in a slash is a directory.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func debian() map[string]string {
	return map[string]string{
		"usr/lib/grub/i386-pc/modinfo.sh":      "",
		"usr/lib/grub/x86_64-efi/modinfo.sh":   "",
		"usr/sbin/grub-install":                "",
		"usr/lib/os-release":                   "NAME=\"Debian GNU/Linux\"\nID=debian\n",
		"boot/vmlinuz-6.1.0-9-amd64":           "",
		"boot/vmlinuz-6.1.0-56-cloud-amd64":    "",
		"boot/initrd.img-6.1.0-56-cloud-amd64": "",
		"boot/initrd.img-6.1.0-9-amd64":        "",
		"boot/config-6.1.0-9-amd64":            "",
		"etc/default/grub":                     "# If you change this\nGRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX='net.ifnames=0 console=ttyS1'\n#GRUB_TERMINAL=console\n",
	}
}

// fakeInstaller stands for grub-install: it notes its call, and puts the file
// where GRUB's own does.
type fakeInstaller struct {
	root  string
	calls []string
	err   error
}

func (f *fakeInstaller) run(_ context.Context, name string, args ...string) error {
	f.calls = append(f.calls, name+" "+strings.Join(args, " "))
	if f.err == nil && strings.Contains(f.calls[0], "efi") {
		dir := filepath.Join(f.root, "boot/efi/EFI/BOOT")
		return errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "BOOTX64.EFI"), []byte("MZ grub"), 0o644))
	}
	return f.err
}

func TestInstallBIOS(t *testing.T) {
	root := tree(t, debian())
	p := plan(t, disklayout.BIOS)
	fake := &fakeInstaller{root: root}
	err := Install(t.Context(), Target{
		Root: root, Plan: p, Firmware: disklayout.BIOS, KernelArgs: "mitigations=auto x=a;b",
		Serial: "ttyS0,115200", Run: fake.run, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"/usr/sbin/grub-install --target=i386-pc --no-rs-codes /dev/vda"}; !reflect.DeepEqual(fake.calls, want) {
		t.Errorf("ran %q, want %q", fake.calls, want)
	}
	uuid := p.At("/").FSUUID
	equal(t, filepath.Join(root, "boot/grub/grub.cfg"), `# Written by Rookery when this machine was installed; update-grub replaces it.
set default=0
set timeout=1
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
insmod part_gpt
insmod ext2
search --no-floppy --fs-uuid --set=root `+uuid+`
menuentry 'Debian GNU/Linux, 6.1.0-56-cloud-amd64' {
	linux /boot/vmlinuz-6.1.0-56-cloud-amd64 root=UUID=`+uuid+` ro net.ifnames=0 quiet mitigations=auto 'x=a;b' console=tty0 console=ttyS0,115200
	initrd /boot/initrd.img-6.1.0-56-cloud-amd64
}
menuentry 'Debian GNU/Linux, 6.1.0-9-amd64' {
	linux /boot/vmlinuz-6.1.0-9-amd64 root=UUID=`+uuid+` ro net.ifnames=0 quiet mitigations=auto 'x=a;b' console=tty0 console=ttyS0,115200
	initrd /boot/initrd.img-6.1.0-9-amd64
}
`)
	equal(t, filepath.Join(root, "etc/default/grub"), `# If you change this
GRUB_TIMEOUT="1"
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="net.ifnames=0 quiet mitigations=auto x=a;b console=tty0 console=ttyS0,115200"
#GRUB_TERMINAL=console
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
`)
}

func equal(t *testing.T, file, want string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil || string(b) != want {
		t.Errorf("%s: %v\n%s\nwant:\n%s", file, err, b, want)
	}
}

func TestInstallUEFI(t *testing.T) {
	files := debian()
	files["usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"] = ""
	root := tree(t, files)
	vars := t.TempDir()
	fake := &fakeInstaller{root: root}
	err := Install(t.Context(), Target{
		Root: root, Plan: plan(t, disklayout.UEFI), Firmware: disklayout.UEFI, EFIVars: vars,
		Run: fake.run, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"/usr/sbin/grub-install --target=x86_64-efi --removable --no-nvram --efi-directory=/boot/efi --no-uefi-secure-boot"}; !reflect.DeepEqual(fake.calls, want) {
		t.Errorf("ran %q, want %q", fake.calls, want)
	}
	equal(t, filepath.Join(root, "boot/efi/EFI/debian/grubx64.efi"), "MZ grub")
	if b, err := nvram(vars).read("Boot0000"); err != nil || label(b) != Label {
		t.Errorf("boot entry: %q, %v", b, err)
	}
	if b, _ := os.ReadFile(filepath.Join(root, "boot/grub/grub.cfg")); strings.Contains(string(b), "serial") {
		t.Errorf("grub.cfg has a serial console that nobody asked for:\n%s", b)
	}
}

// Firmware that takes no entry is no reason to fail.
func TestInstallWithoutNVRAM(t *testing.T) {
	root := tree(t, debian())
	fake := &fakeInstaller{root: root}
	err := Install(t.Context(), Target{
		Root: root, Plan: plan(t, disklayout.UEFI), Firmware: disklayout.UEFI, EFIVars: filepath.Join(root, "no/such"),
		Run: fake.run, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestInstallRefuses(t *testing.T) {
	broken := errors.New("exit status 1: no space")
	for _, tt := range []struct {
		name   string
		change func(map[string]string)
		fw     disklayout.Firmware
		err    string
	}{
		{"no GRUB for BIOS", func(f map[string]string) { delete(f, "usr/lib/grub/i386-pc/modinfo.sh") }, disklayout.BIOS,
			"loader: the image has no GRUB for bios: /usr/lib/grub/i386-pc is missing (Debian: grub-pc-bin for bios, grub-efi-amd64-bin for uefi)"},
		{"no GRUB for UEFI", func(f map[string]string) { delete(f, "usr/lib/grub/x86_64-efi/modinfo.sh") }, disklayout.UEFI,
			"loader: the image has no GRUB for uefi: /usr/lib/grub/x86_64-efi or arm64-efi is missing (Debian: grub-pc-bin for bios, grub-efi-amd64-bin for uefi)"},
		{"no grub-install", func(f map[string]string) { delete(f, "usr/sbin/grub-install") }, disklayout.BIOS,
			"loader: the image has no grub-install (Debian: grub2-common)"},
		{"no kernel", func(f map[string]string) {
			delete(f, "boot/vmlinuz-6.1.0-9-amd64")
			delete(f, "boot/vmlinuz-6.1.0-56-cloud-amd64")
		}, disklayout.BIOS, "loader: the image has no kernel: want /boot/vmlinuz-VERSION"},
		{"grub-install fails", func(map[string]string) {}, disklayout.BIOS, "loader: " + broken.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := debian()
			tt.change(files)
			root := tree(t, files)
			fake := &fakeInstaller{root: root, err: broken}
			err := Install(t.Context(), Target{Root: root, Plan: plan(t, tt.fw), Firmware: tt.fw, Run: fake.run, Log: slog.New(slog.DiscardHandler)})
			if err == nil || err.Error() != tt.err {
				t.Fatalf("Install: %v, want %s", err, tt.err)
			}
			if _, err := os.Stat(filepath.Join(root, "boot/grub")); err == nil {
				t.Error("something was written all the same")
			}
		})
	}
}

// A link in the image does not lead the writer out of the root.
// What Install would miss is known from a list of names, before there is a root.
func TestCheck(t *testing.T) {
	names := map[string]bool{"usr/lib/grub/x86_64-efi/modinfo.sh": true, "usr/sbin/grub-install": true}
	exists := func(name string) bool { return names[name] }
	kernel := []string{"config-6.1", "vmlinuz-6.1"}
	for _, tt := range []struct {
		fw   disklayout.Firmware
		boot []string
		err  string
	}{
		{disklayout.UEFI, kernel, ""},
		{disklayout.UEFI, kernel[:1], "loader: the image has no kernel: want /boot/vmlinuz-VERSION"},
		{disklayout.BIOS, kernel, "loader: the image has no GRUB for bios: /usr/lib/grub/i386-pc is missing"},
	} {
		err := Check(tt.fw, exists, tt.boot)
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.err)) {
			t.Errorf("%s with %v: %v, want %q", tt.fw, tt.boot, err, tt.err)
		}
	}
	delete(names, "usr/sbin/grub-install")
	if err := Check(disklayout.UEFI, exists, kernel); err == nil || !strings.Contains(err.Error(), "no grub-install") {
		t.Errorf("without grub-install: %v", err)
	}
}

func TestInstallStaysInside(t *testing.T) {
	files := debian()
	delete(files, "etc/default/grub")
	root, outside := tree(t, files), t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(root, "etc"), 0o755), os.Symlink(outside, filepath.Join(root, "etc/default"))); err != nil {
		t.Fatal(err)
	}
	fake := &fakeInstaller{root: root}
	err := Install(t.Context(), Target{Root: root, Plan: plan(t, disklayout.BIOS), Firmware: disklayout.BIOS, Run: fake.run, Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "escapes") {
		t.Errorf("Install: %v, want that the path escapes", err)
	}
	if names, _ := os.ReadDir(outside); len(names) > 0 {
		t.Errorf("written outside: %v", names)
	}
}

func TestBind(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("wants mounts: run the tests as root")
	}
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	unbind, err := bind(root, dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"dev/null", "proc/self/status", "sys/kernel"} {
		if _, err := root.Stat(name); err != nil {
			t.Errorf("%s is not there: %v", name, err)
		}
	}
	if err := unbind(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"dev", "proc", "sys", "run"} {
		if names, err := os.ReadDir(filepath.Join(dir, name)); err != nil || len(names) > 0 {
			t.Errorf("%s is still mounted: %v", name, err)
		}
	}
	if err := unix.Access("/dev/null", unix.R_OK); err != nil {
		t.Errorf("our own /dev went with it: %v", err)
	}

	// A link in place of a directory is refused, and what was done undone.
	if err := errors.Join(os.Remove(filepath.Join(dir, "sys")), os.Symlink("/tmp", filepath.Join(dir, "sys"))); err != nil {
		t.Fatal(err)
	}
	if _, err := bind(root, dir); err == nil || err.Error() != "bind /sys: is not a directory in the image" {
		t.Errorf("bind over a link: %v", err)
	}
	if names, err := os.ReadDir(filepath.Join(dir, "dev")); err != nil || len(names) > 0 {
		t.Errorf("dev is still mounted: %v", err)
	}
}
