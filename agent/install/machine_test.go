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
