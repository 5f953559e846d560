package apply

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/disklayout"
)

const mib = disklayout.MiB

// needRoot skips what wants loop devices.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("wants loop devices and mounts: run the tests as root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("wants loop devices: modprobe loop, or give the container /dev/loop-control")
	}
}

// needFS skips what wants a filesystem that this kernel does not have.
func needFS(t *testing.T, fs string) {
	t.Helper()
	if b, _ := os.ReadFile("/proc/filesystems"); !strings.Contains(string(b), "\t"+fs+"\n") {
		t.Skipf("wants %s in the kernel: modprobe %s", fs, fs)
	}
}

// newImage is an image file of size bytes and the default layout fitted to it.
func newImage(t *testing.T, fw disklayout.Firmware, size int64, sector int) disklayout.Plan {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	disk := disklayout.Disk{Name: "disk.img", Path: path, Size: size, SectorSize: sector}
	plan, err := disklayout.Fit(disklayout.Default(), []disklayout.Disk{disk}, fw, "apply-test")
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

// attach is Attach for the length of the test.
func attach(t *testing.T, plan disklayout.Plan) disklayout.Plan {
	t.Helper()
	plan, detach, err := Attach(plan)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := detach(); err != nil {
			t.Error(err)
		}
	})
	return plan
}

// tool runs somebody else's program and gives its output.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// What we write is what others read: the whole way on an image file.
func TestApply(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct {
		name   string
		fw     disklayout.Firmware
		sector int
	}{
		{"bios", disklayout.BIOS, 512},
		{"uefi", disklayout.UEFI, 512},
		{"uefi with sectors of 4096", disklayout.UEFI, 4096},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := t.Context()
			plan := attach(t, newImage(t, tt.fw, 1024*mib, tt.sector))
			if err := Partition(ctx, plan); err != nil {
				t.Fatal(err)
			}
			if err := Mkfs(ctx, plan, Host); err != nil {
				t.Fatal(err)
			}
			if out := tool(t, "sgdisk", "-v", plan.Disk.Path); !strings.Contains(out, "No problems found") {
				t.Errorf("sgdisk -v: %s", out)
			}
			for _, p := range plan.Partitions {
				dev := plan.Device(p.Number)
				switch p.FS {
				case disklayout.Ext4:
					tool(t, "e2fsck", "-fn", dev)
				case disklayout.VFAT:
					tool(t, "fsck.fat", "-n", dev)
				}
				if got, want := blkid(t, dev), wantBlkid(p); !reflect.DeepEqual(got, want) {
					t.Errorf("blkid of %s: %v, want %v", p.Name, got, want)
				}
			}
		})
	}
}

// blkid is what libblkid, and so udev and mount, sees on a partition.
func blkid(t *testing.T, dev string) map[string]string {
	t.Helper()
	got := map[string]string{}
	out, _ := exec.Command("blkid", "-p", "-o", "export", dev).Output() // 2 when there is nothing to see
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "TYPE", "UUID", "LABEL", "PART_ENTRY_UUID", "PART_ENTRY_NAME", "PART_ENTRY_TYPE":
			got[key] = value
		}
	}
	return got
}

func wantBlkid(p disklayout.PlannedPartition) map[string]string {
	want := map[string]string{
		"PART_ENTRY_UUID": p.PartGUID, "PART_ENTRY_NAME": p.Name, "PART_ENTRY_TYPE": strings.ToLower(p.Type.GUID()),
	}
	if p.FS != "" {
		want["TYPE"], want["UUID"], want["LABEL"] = string(p.FS), p.FSUUID, p.Name
	}
	if p.FS == disklayout.VFAT {
		want["LABEL"] = strings.ToUpper(p.Name)
	}
	return want
}

func TestMount(t *testing.T) {
	needRoot(t)
	for _, fw := range []disklayout.Firmware{disklayout.BIOS, disklayout.UEFI} {
		t.Run(string(fw), func(t *testing.T) {
			if fw == disklayout.UEFI {
				needFS(t, "vfat")
			}
			ctx := t.Context()
			image := newImage(t, fw, 1024*mib, 0)
			plan := attach(t, image)
			if err := errors.Join(Partition(ctx, plan), Mkfs(ctx, plan, Host)); err != nil {
				t.Fatal(err)
			}
			root := filepath.Join(t.TempDir(), "target")
			for range 2 { // what was written is there the second time
				unmount, err := Mount(plan, root)
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range plan.Mounts() {
					file := filepath.Join(root, p.Mount, "here")
					f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
					if err != nil {
						t.Fatal(err)
					}
					f.Close()
				}
				if err := Partition(ctx, plan); !errors.Is(err, unix.EBUSY) {
					t.Errorf("Partition of a mounted disk: %v, want %v", err, unix.EBUSY)
				}
				if err := unmount(); err != nil {
					t.Fatal(err)
				}
				if names, err := os.ReadDir(root); err != nil || len(names) > 0 {
					t.Fatalf("after unmount: %v, %v", names, err)
				}
			}
			tool(t, "e2fsck", "-fn", plan.Device(plan.At("/").Number))
		})
	}
}

// A mount that fails takes those before it down again.
func TestMountFails(t *testing.T) {
	needRoot(t)
	plan := attach(t, newImage(t, disklayout.BIOS, 1024*mib, 0))
	if err := errors.Join(Partition(t.Context(), plan), Mkfs(t.Context(), plan, Host)); err != nil {
		t.Fatal(err)
	}
	plan.Partitions[0].Mount, plan.Partitions[0].FS = "/boot", "nosuchfs"
	root := t.TempDir()
	_, err := Mount(plan, root)
	if want := "mount: " + plan.Device(1) + " at /boot: the kernel knows no nosuchfs: is its module loaded?"; err == nil || err.Error() != want {
		t.Fatalf("Mount: %v, want %s", err, want)
	}
	if names, err := os.ReadDir(root); err != nil || len(names) > 0 {
		t.Fatalf("still mounted: %v, %v", names, err)
	}
}

// What was on the disk before is not found there afterwards.
func TestPartitionWipes(t *testing.T) {
	needRoot(t)
	plan := newImage(t, disklayout.UEFI, 1024*mib, 0)
	f, err := os.OpenFile(plan.Disk.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lvm := append([]byte("LABELONE"), make([]byte, 504)...)
	copy(lvm[24:], "LVM2 001")
	for at, b := range map[int64][]byte{
		512: lvm,
		plan.Partitions[1].Start + 64*1024 + 0x40: []byte("_BHRfS_M"), // btrfs
		plan.Partitions[2].Start:                  []byte("XFSB"),
		plan.Partitions[2].End - 64*1024:          {0xfc, 0x4e, 0x2b, 0xa9}, // md 0.90
		1024*mib - 512:                            []byte("EFI PART"),
	} {
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	plan = attach(t, plan)
	if err := Partition(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
	for _, p := range plan.Partitions {
		if out := tool(t, "wipefs", "--noheadings", plan.Device(p.Number)); out != "" {
			t.Errorf("left on %s: %s", p.Name, out)
		}
	}
	if out := tool(t, "wipefs", "--noheadings", "--output", "TYPE", plan.Disk.Path); strings.Join(strings.Fields(out), " ") != "gpt gpt PMBR" {
		t.Errorf("on the disk: %s", out)
	}
}

func TestPartitionRefuses(t *testing.T) {
	plan := newImage(t, disklayout.BIOS, 1024*mib, 0)
	if err := os.Truncate(plan.Disk.Path, 512*mib); err != nil {
		t.Fatal(err)
	}
	want := "partition: " + plan.Disk.Path + " holds 536870912 bytes, plan was made for 1073741824"
	if err := Partition(t.Context(), plan); err == nil || err.Error() != want {
		t.Fatalf("Partition: %v, want %s", err, want)
	}
	want = "mkfs: " + plan.Disk.Path + " is not a block device: an image file is to be attached first"
	if err := Mkfs(t.Context(), plan, Host); err == nil || err.Error() != want {
		t.Fatalf("Mkfs: %v, want %s", err, want)
	}
}

// A protective MBR over 2 TiB says so; the file has holes for all of it.
func TestPartitionLargeDisk(t *testing.T) {
	plan := newImage(t, disklayout.BIOS, 3<<40, 0)
	if err := writeTable(plan); err != nil {
		t.Fatal(err)
	}
	if out := tool(t, "sgdisk", "-v", plan.Disk.Path); !strings.Contains(out, "No problems found") {
		t.Errorf("sgdisk -v: %s", out)
	}
	b := make([]byte, 512)
	f, err := os.Open(plan.Disk.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Read(b); err != nil {
		t.Fatal(err)
	}
	if got := string(b[446+12 : 446+16]); got != "\xff\xff\xff\xff" {
		t.Fatalf("protective MBR says %x sectors, want ffffffff", got)
	}
}

func TestMkfsFails(t *testing.T) {
	needRoot(t)
	plan := attach(t, newImage(t, disklayout.BIOS, 1024*mib, 0))
	if err := Partition(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
	var ran []string
	broken := errors.New("no space")
	err := Mkfs(t.Context(), plan, func(_ context.Context, name string, _ ...string) error {
		ran = append(ran, name)
		return broken
	})
	if !errors.Is(err, broken) || !reflect.DeepEqual(ran, []string{"mkswap"}) {
		t.Fatalf("Mkfs: %v after %v, want %v after mkswap", err, ran, broken)
	}
}

func TestRun(t *testing.T) {
	ctx := t.Context()
	if err := Host(ctx, "true"); err != nil {
		t.Error(err)
	}
	if err := Host(ctx, "no-such-program"); err == nil || err.Error() != "no-such-program: not found in /usr/sbin:/usr/bin:/sbin:/bin" {
		t.Errorf("Host: %v", err)
	}
	err := Host(ctx, "sh", "-c", "yes no | head -2000; echo the cause >&2; exit 3")
	if err == nil || !strings.HasSuffix(err.Error(), "no\nthe cause") || !strings.Contains(err.Error(), "exit status 3: ") || len(err.Error()) > tailSize+200 {
		t.Errorf("Host: %d bytes: %v", len(err.Error()), err)
	}
}

func TestChroot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("wants chroot: run the tests as root")
	}
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "usr"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"bin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+dir, filepath.Join(root, dir)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("/usr", filepath.Join(root, "usr"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(filepath.Join(root, "usr"), 0)
	if err := Chroot(root)(t.Context(), "/bin/sh", "-c", "echo here > /made"); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(root, "made")); err != nil || string(b) != "here\n" {
		t.Fatalf("made in the chroot: %q, %v", b, err)
	}
}

func TestMountable(t *testing.T) {
	if err := Mountable(disklayout.Ext4); err != nil {
		t.Errorf("ext4: %v", err)
	}
	err := Mountable("nosuchfs")
	if err == nil || !strings.Contains(err.Error(), "knows no nosuchfs") {
		t.Errorf("a filesystem that nobody wrote: %v", err)
	}
}
