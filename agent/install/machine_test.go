package install_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
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
