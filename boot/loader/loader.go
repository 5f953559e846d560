// Package loader makes an installed root bootable with the GRUB that its image
// carries. grub.cfg and the firmware's boot entry are written here.
package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"strings"

	"rookery/disklayout"
	"rookery/disklayout/apply"
)

// Label is the name of the firmware's boot entry.
const Label = "rookery"

// A Target is an installed root and the machine it is to start.
type Target struct {
	Root       string          // where the root filesystem is mounted, with all below it
	Plan       disklayout.Plan // as it was applied; Disk.Path is the block device
	Firmware   disklayout.Firmware
	KernelArgs string // added to the kernel's command line
	Serial     string // "ttyS0,115200": console of GRUB and kernel; "" for none

	// EFIVars is where efivarfs is mounted; "" leaves the firmware's boot
	// entries alone, and the removable path has to do.
	EFIVars string

	Run apply.Run // runs programs of the target; nil means in a chroot with /dev, /proc, /sys and /run
	Log *slog.Logger
}

// A grub is one kind of GRUB.
type grub struct {
	platform  string // directory of its modules
	removable string // its file at the removable path, "" for BIOS
	own       string // its file in the distribution's directory
}

var (
	biosGRUBs = []grub{{platform: "i386-pc"}}
	efiGRUBs  = []grub{
		{"x86_64-efi", "BOOTX64.EFI", "grubx64.efi"},
		{"arm64-efi", "BOOTAA64.EFI", "grubaa64.efi"},
	}
)

// found is what an image has for starting.
type found struct {
	grub
	install  string // path of grub-install
	dir      string // "grub" or "grub2", in /boot
	signed   bool   // there is a GRUB signed by the distribution
	kernels  []kernel
	id       string // of the distribution, "debian"
	title    string
	defaults string // text of /etc/default/grub
}

// Check says what an image lacks for Install on a machine with firmware fw.
// exists looks a path of the image up, following links; boot are the names in
// its /boot.
func Check(fw disklayout.Firmware, exists func(name string) bool, boot []string) error {
	if _, err := lookFor(fw, exists, boot); err != nil {
		return fmt.Errorf("loader: %w", err)
	}
	return nil
}

// Install installs the loader of t's image. What the image lacks is found out
// before anything is changed.
func Install(ctx context.Context, t Target) error {
	if err := t.install(ctx); err != nil {
		return fmt.Errorf("loader: %w", err)
	}
	return nil
}

func (t Target) install(ctx context.Context) error {
	root, err := os.OpenRoot(t.Root)
	if err != nil {
		return err
	}
	defer root.Close()
	has, err := look(root, t.Firmware)
	if err != nil {
		return err
	}
	m, err := t.menu(has)
	if err != nil {
		return err
	}
	if err := t.runInstaller(ctx, root, has); err != nil {
		return err
	}
	if t.Firmware == disklayout.UEFI {
		if err := t.ownDirectory(root, has); err != nil {
			return err
		}
	}
	for _, f := range []struct{ name, text string }{
		{path.Join("boot", has.dir, "grub.cfg"), m.config()},
		{"etc/default/grub", setDefaults(has.defaults, t.defaults(m))},
	} {
		if err := write(root, f.name, f.text); err != nil {
			return err
		}
	}
	t.Log.Info("grub installed", "step", "loader", "platform", has.platform, "kernels", len(has.kernels))
	return nil
}

// lookFor finds the programs and kernels that the image has, or says what it lacks.
func lookFor(fw disklayout.Firmware, exists func(name string) bool, boot []string) (has found, err error) {
	kinds := biosGRUBs
	if fw == disklayout.UEFI {
		kinds = efiGRUBs
	}
	var want []string
	for _, g := range kinds {
		want = append(want, g.platform)
		if has.platform == "" && exists("usr/lib/grub/"+g.platform+"/modinfo.sh") {
			has.grub = g
		}
	}
	if has.platform == "" {
		return has, fmt.Errorf("the image has no GRUB for %s: /usr/lib/grub/%s is missing (Debian: grub-pc-bin for bios, grub-efi-amd64-bin for uefi)",
			fw, strings.Join(want, " or "))
	}
	for _, name := range []string{"usr/sbin/grub-install", "usr/bin/grub-install", "usr/sbin/grub2-install"} {
		if exists(name) {
			has.install = "/" + name
			break
		}
	}
	if has.install == "" {
		return has, errors.New("the image has no grub-install (Debian: grub2-common)")
	}
	has.dir = strings.TrimSuffix(path.Base(has.install), "-install")
	has.signed = exists("usr/lib/grub/" + has.platform + "-signed")
	if has.kernels = kernels(boot); len(has.kernels) == 0 {
		return has, errors.New("the image has no kernel: want /boot/vmlinuz-VERSION")
	}
	return has, nil
}

// look finds what the installed root has, or says what it lacks.
func look(root *os.Root, fw disklayout.Firmware) (has found, err error) {
	entries, err := fs.ReadDir(root.FS(), "boot")
	if err != nil {
		return has, err
	}
	var boot []string
	for _, e := range entries {
		boot = append(boot, e.Name())
	}
	exists := func(name string) bool { _, err := root.Stat(name); return err == nil }
	if has, err = lookFor(fw, exists, boot); err != nil {
		return has, err
	}
	release, err := readIf(root, "etc/os-release")
	if err != nil || release == "" { // etc/os-release may be an absolute link
		release, err = readIf(root, "usr/lib/os-release")
	}
	if err != nil {
		return has, err
	}
	has.id, has.title = shellValue(release, "ID"), shellValue(release, "NAME")
	if has.id == "" || strings.ContainsAny(has.id, `/\ `) {
		has.id = "linux"
	}
	if has.title == "" {
		has.title = "Linux"
	}
	has.defaults, err = readIf(root, "etc/default/grub")
	return has, err
}

// menu decides what grub.cfg says.
func (t Target) menu(has found) (menu, error) {
	rootfs := t.Plan.At("/")
	bootfs, dir := t.Plan.At("/boot"), "/"
	if bootfs.Number == 0 {
		bootfs, dir = rootfs, "/boot"
	}
	if rootfs.FSUUID == "" {
		return menu{}, errors.New("the plan has no root filesystem")
	}
	modules := map[disklayout.FS]string{disklayout.Ext4: "ext2", disklayout.VFAT: "fat"}
	image := append(strings.Fields(shellValue(has.defaults, "GRUB_CMDLINE_LINUX")),
		strings.Fields(shellValue(has.defaults, "GRUB_CMDLINE_LINUX_DEFAULT"))...)
	return menu{
		title: has.title, fsModule: modules[bootfs.FS], fsUUID: bootfs.FSUUID, dir: dir,
		root: "UUID=" + rootfs.FSUUID, bareRoot: "PARTUUID=" + rootfs.PartGUID,
		args: kernelArgs(image, t.KernelArgs, t.Serial), serial: t.Serial, kernels: has.kernels,
	}, nil
}

// defaults are the settings by which update-grub comes to the same menu.
func (t Target) defaults(m menu) []setting {
	list := []setting{
		{"GRUB_TIMEOUT", "1"},
		{"GRUB_CMDLINE_LINUX", strings.Join(m.args, " ")},
		{"GRUB_CMDLINE_LINUX_DEFAULT", ""},
	}
	if command := grubSerial(t.Serial); command != "" {
		list = append(list, setting{"GRUB_TERMINAL", "console serial"}, setting{"GRUB_SERIAL_COMMAND", command})
	}
	return list
}

func (t Target) runInstaller(ctx context.Context, root *os.Root, has found) (err error) {
	run := t.Run
	if run == nil {
		unbind, err := bind(root, t.Root)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unbind()) }()
		run = apply.Chroot(t.Root)
	}
	return run(ctx, has.install, t.installArgs(has)...)
}

// installArgs are grub-install's arguments. Neither kind makes firmware
// entries: efibootmgr would be one more thing an image has to have.
func (t Target) installArgs(has found) []string {
	if t.Firmware == disklayout.BIOS {
		// Reed-Solomon codes guard against software that writes to the gap
		// after the MBR; there is a partition here. They take time.
		return []string{"--target=" + has.platform, "--no-rs-codes", t.Plan.Disk.Path}
	}
	args := []string{"--target=" + has.platform, "--removable", "--no-nvram", "--efi-directory=" + t.esp().Mount}
	if has.signed {
		// Otherwise shim is what is installed, and it looks for its second
		// half in a place of its own.
		args = append(args, "--no-uefi-secure-boot")
	}
	return args
}

func (t Target) esp() disklayout.PlannedPartition {
	for _, p := range t.Plan.Partitions {
		if p.Type == disklayout.ESP {
			return p
		}
	}
	return disklayout.PlannedPartition{}
}

// ownDirectory copies GRUB from the removable path to the distribution's
// directory, where its own updates will put it, and makes that the firmware's
// boot entry.
func (t Target) ownDirectory(root *os.Root, has found) error {
	efi := path.Join(strings.TrimPrefix(t.esp().Mount, "/"), "EFI")
	if err := root.MkdirAll(path.Join(efi, has.id), 0o755); err != nil {
		return err
	}
	image, err := root.ReadFile(path.Join(efi, "BOOT", has.removable))
	if err != nil {
		return err
	}
	if err := write(root, path.Join(efi, has.id, has.own), string(image)); err != nil {
		return err
	}
	if t.EFIVars == "" {
		return nil
	}
	sector := int64(t.Plan.Disk.SectorSize)
	if sector == 0 {
		sector = 512
	}
	option, err := loadOption(Label, t.esp(), sector, `\EFI\`+has.id+`\`+has.own)
	if err != nil {
		return err
	}
	entry, err := nvram(t.EFIVars).setEntry(option)
	if err != nil {
		// A firmware whose memory is full or guarded still finds the removable path.
		t.Log.Warn("no boot entry made, the removable path has to do", "step", "loader", "err", err)
		return nil
	}
	t.Log.Info("boot entry made", "step", "loader", "entry", entryName(entry))
	return nil
}

// readIf reads a file, "" when there is none.
func readIf(root *os.Root, name string) (string, error) {
	b, err := root.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(b), err
}

// write makes name anew, so that a link in its place is not followed.
func write(root *os.Root, name, text string) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, text)
	return errors.Join(err, f.Close())
}
