package install_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"rookery/agent/install"
	"rookery/disklayout"
	"rookery/wire"
)

// A disk on USB or SAS is there some seconds after its controller.
func TestPlanWaitsForADisk(t *testing.T) {
	script := wire.Script{Layout: disklayout.Default(), ID: "x"}
	sda := disklayout.Disk{Name: "sda", Path: "/dev/sda", Size: 10 << 30}
	for _, tt := range []struct {
		name  string
		after time.Duration // when the disk appears
		size  int64
		took  time.Duration
		err   error
	}{
		{"at once", 0, sda.Size, 0, nil},
		{"late", 7 * time.Second, sda.Size, 7 * time.Second, nil},
		{"never", time.Hour, sda.Size, 30 * time.Second, disklayout.ErrNoDisk},
		{"too small does not grow", 0, 10 << 20, 0, disklayout.ErrTooSmall},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				sda.Size = tt.size
				c := &install.Computer{
					Firmware: disklayout.BIOS, Patience: 30 * time.Second, Log: slog.New(slog.DiscardHandler),
					Disks: func() ([]disklayout.Disk, error) {
						if time.Since(begin) < tt.after {
							return []disklayout.Disk{{Name: "sdb", Size: 8 << 30, Removable: true}}, nil
						}
						return []disklayout.Disk{sda}, nil
					},
				}
				plan, _, err := c.Plan(t.Context(), script)
				if !errors.Is(err, tt.err) || err == nil && plan.Disk.Name != "sda" {
					t.Errorf("Plan: %v, %v; want %v", plan.Disk, err, tt.err)
				}
				if took := time.Since(begin); took != tt.took {
					t.Errorf("waited %v, want %v", took, tt.took)
				}
			})
		})
	}
}

// A user's PATH has no sbin; what runs the programs looks there all the same.
func TestPlanFindsProgramsInSbin(t *testing.T) {
	if _, err := os.Stat("/usr/sbin/mke2fs"); err != nil {
		t.Skip("needs mke2fs and mkswap in /usr/sbin: apt install e2fsprogs")
	}
	t.Setenv("PATH", filepath.Join(t.TempDir(), "bin"))
	c := &install.Computer{Firmware: disklayout.BIOS, Log: slog.New(slog.DiscardHandler), Disks: func() ([]disklayout.Disk, error) {
		return []disklayout.Disk{{Name: "sda", Path: "/dev/sda", Size: 10 << 30}}, nil
	}}
	if _, _, err := c.Plan(context.Background(), wire.Script{Layout: disklayout.Default(), ID: "x"}); err != nil {
		t.Error(err)
	}
}

// What mke2fs makes of a size is known before it runs.
func TestInodesOfExt4(t *testing.T) {
	for _, size := range []int64{100 << 20, 511 << 20, 512 << 20, 3 << 30, 50<<30 + 3<<20} {
		disk := filepath.Join(t.TempDir(), "disk.img")
		if err := os.WriteFile(disk, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		const overhead = 66 << 20 // the ESP, and the table at both ends
		if err := os.Truncate(disk, size+overhead); err != nil {
			t.Fatal(err)
		}
		c := &install.Computer{Firmware: disklayout.UEFI, Log: slog.New(slog.DiscardHandler), Disks: func() ([]disklayout.Disk, error) {
			return []disklayout.Disk{{Name: "disk.img", Path: disk, Size: size + overhead, SectorSize: 512}}, nil
		}}
		layout := disklayout.Layout{Partitions: []disklayout.Partition{
			{Name: "esp", Size: "64MiB", Type: disklayout.ESP, FS: disklayout.VFAT, Mount: "/boot/efi"},
			{Name: "root", Size: "*", Type: disklayout.Linux, FS: disklayout.Ext4, Mount: "/"},
		}}
		plan, room, err := c.Plan(t.Context(), wire.Script{Layout: layout, ID: "x"})
		if err != nil {
			t.Fatal(err)
		}
		// With -n it only says what it would do.
		root := plan.At("/")
		out, err := exec.Command("mke2fs", "-n", "-F", "-t", "ext4", disk, fmt.Sprintf("%dk", (root.End-root.Start)>>10)).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		said := regexp.MustCompile(`(\d+) inodes`).FindSubmatch(out)
		if said == nil {
			t.Fatalf("no inodes in %s", out)
		}
		made, _ := strconv.ParseInt(string(said[1]), 10, 64)
		if room.Inodes > made || room.Inodes < made/100*98 {
			t.Errorf("%d bytes: %d inodes expected, mke2fs makes %d", size, room.Inodes, made)
		}
	}
}

// A node that lost power finds its disk as it was, and keeps what was staged.
// Whatever else is on a disk is gone.
func TestStagingStays(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loop devices and mounts need root: run the test as root")
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, disk string, super int64, s *wire.Script) // super: the root's superblock
		stays  bool
	}{
		{"as it was", nil, true},
		{"another installation", func(_ *testing.T, _ string, _ int64, s *wire.Script) { s.ID = strings.Repeat("b", 32) }, false},
		{"another layout", func(_ *testing.T, _ string, _ int64, s *wire.Script) {
			s.Layout = disklayout.Default()
			s.Layout.Partitions[2].Size = "128MiB"
		}, false},
		{"a damaged table", func(t *testing.T, disk string, _ int64, _ *wire.Script) { spoil(t, disk, 1024+128+60) }, false},
		{"another filesystem", func(t *testing.T, disk string, super int64, _ *wire.Script) {
			spoil(t, disk, super+0x68) // its UUID
		}, false},
		{"a damaged filesystem", func(t *testing.T, disk string, super int64, _ *wire.Script) {
			spoil(t, disk, super+0x60) // its features, and its checksum is wrong
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			disk, root := filepath.Join(dir, "disk.img"), filepath.Join(dir, "root")
			if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 600<<20)); err != nil {
				t.Fatal(err)
			}
			script := wire.Script{Layout: disklayout.Default(), ID: strings.Repeat("a", 32)}
			start := func(then func()) (super int64) {
				t.Helper()
				c := &install.Computer{Firmware: disklayout.BIOS, Root: root, Log: slog.New(slog.DiscardHandler), Disks: func() ([]disklayout.Disk, error) {
					return []disklayout.Disk{{Name: "disk.img", Path: disk, Size: 600 << 20, SectorSize: 512}}, nil
				}}
				plan, _, err := c.Plan(t.Context(), script)
				if err != nil {
					t.Fatal(err)
				}
				_, err = c.Partition(t.Context(), plan)
				if err == nil {
					then()
				}
				if err = errors.Join(err, c.Release()); err != nil {
					t.Fatal(err)
				}
				return plan.At("/").Start + 1024
			}
			staged := filepath.Join(root, install.StagingDir, "pieces")
			super := start(func() {
				if err := errors.Join(os.Mkdir(filepath.Dir(staged), 0o700), os.WriteFile(staged, []byte("pieces"), 0o600),
					os.MkdirAll(filepath.Join(root, "etc/old"), 0o700), os.WriteFile(filepath.Join(root, "lost+found/evil"), nil, 0o755)); err != nil {
					t.Fatal(err)
				}
			})
			if tt.change != nil {
				tt.change(t, disk, super, &script)
			}
			start(func() {
				got, err := os.ReadFile(staged)
				if stays := err == nil && string(got) == "pieces"; stays != tt.stays {
					t.Errorf("the staging stays: %v (%v), want %v", stays, err, tt.stays)
				}
				if _, err := os.Stat(filepath.Join(root, "etc")); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("what else was there: %v, want it to be gone", err)
				}
				if left, err := os.ReadDir(filepath.Join(root, "lost+found")); err != nil || len(left) > 0 {
					t.Errorf("lost+found has %v, %v; want nothing", left, err)
				}
			})
			script.ID = strings.Repeat("c", 32) // and once more, without any
			start(func() {})
			start(func() {
				if left, err := os.ReadDir(root); err != nil || len(left) != 1 {
					t.Errorf("%v, %v; want lost+found alone", left, err)
				}
			})
		})
	}
}
