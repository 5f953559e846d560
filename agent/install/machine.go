package install

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"rookery/boot/loader"
	"rookery/disklayout"
	"rookery/disklayout/apply"
	"rookery/fixup"
	"rookery/image"
	"rookery/wire"
)

// A Computer is a machine with disks, of which the script's layout takes one.
// A disk may be an image file.
type Computer struct {
	Disks    func() ([]disklayout.Disk, error)
	Firmware disklayout.Firmware
	Root     string        // where to mount the new root
	EFIVars  string        // efivarfs; "" leaves the firmware's boot entries alone
	NoLoader bool          // the disk is not going to be started
	Patience time.Duration // for disks that appear late, as those of USB and SAS do
	Log      *slog.Logger

	detach   func() error
	unmount  func() error
	attached disklayout.Plan // on block devices
}

// Plan fits the layout and looks for the programs that the plan runs.
func (c *Computer) Plan(ctx context.Context, s wire.Script) (disklayout.Plan, int64, error) {
	plan, err := c.fit(ctx, s)
	if err != nil {
		return disklayout.Plan{}, 0, err
	}
	for _, command := range plan.Commands() {
		if _, err := apply.Look(command.Name); err != nil {
			return disklayout.Plan{}, 0, fmt.Errorf("program that the layout needs: %w", err)
		}
	}
	root := plan.At("/")
	if root.Number == 0 {
		return disklayout.Plan{}, 0, errors.New("layout has no filesystem for /")
	}
	return plan, root.End - root.Start, nil
}

// fit fits the layout, and looks for the disk for a while.
func (c *Computer) fit(ctx context.Context, s wire.Script) (disklayout.Plan, error) {
	begin := time.Now()
	for said := false; ; said = true {
		disks, err := c.Disks()
		if err != nil {
			return disklayout.Plan{}, err
		}
		plan, err := disklayout.Fit(s.Layout, disks, c.Firmware, s.ID)
		if !errors.Is(err, disklayout.ErrNoDisk) || time.Since(begin) >= c.Patience {
			return plan, err
		}
		if !said {
			c.Log.Warn("plan: waiting for disks", "seconds", c.Patience.Seconds(), "err", err)
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return disklayout.Plan{}, context.Cause(ctx)
		}
	}
}

// Check looks for the loader that the machine wants.
func (c *Computer) Check(view *image.View) error {
	if c.NoLoader {
		return nil
	}
	exists := func(name string) bool { _, ok := view.Find(name); return ok }
	return loader.Check(c.Firmware, exists, view.Names("boot"))
}

// Partition writes the table, makes the filesystems and mounts them. Nothing is
// written when one of them could not be mounted.
func (c *Computer) Partition(ctx context.Context, plan disklayout.Plan) (string, error) {
	for _, p := range plan.Mounts() {
		if err := apply.Mountable(p.FS); err != nil {
			return "", fmt.Errorf("partition %s: %w", p.Name, err)
		}
	}
	attached, detach, err := apply.Attach(plan)
	if err != nil {
		return "", err
	}
	c.attached, c.detach = attached, detach
	if err := apply.Partition(ctx, attached); err != nil {
		return "", err
	}
	if err := apply.Mkfs(ctx, attached, apply.Host); err != nil {
		return "", err
	}
	c.unmount, err = apply.Mount(attached, c.Root)
	return c.Root, err
}

// Fixup applies all fixups.
func (c *Computer) Fixup(ctx context.Context, root string, plan disklayout.Plan, id wire.Identity) ([]string, error) {
	return fixup.Apply(ctx, root, id, plan, c.Log)
}

// Loader installs the loader that the image carries.
func (c *Computer) Loader(ctx context.Context, root string, _ disklayout.Plan, id wire.Identity) error {
	if c.NoLoader {
		return nil
	}
	return loader.Install(ctx, loader.Target{
		Root: root, Plan: c.attached, Firmware: c.Firmware, KernelArgs: id.KernelArgs, Serial: id.Serial, EFIVars: c.EFIVars, Log: c.Log,
	})
}

// Release unmounts, and gives image files back.
func (c *Computer) Release() error {
	for _, undo := range []*func() error{&c.unmount, &c.detach} {
		if *undo == nil {
			continue
		}
		if err := (*undo)(); err != nil {
			return err
		}
		*undo = nil
	}
	return nil
}

// A Directory is a machine without disks: the image goes into a directory.
type Directory struct {
	Path string
	Log  *slog.Logger
}

// Plan is empty: there is nothing to partition.
func (d Directory) Plan(context.Context, wire.Script) (disklayout.Plan, int64, error) {
	if err := os.MkdirAll(d.Path, 0o755); err != nil {
		return disklayout.Plan{}, 0, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(d.Path, &st); err != nil {
		return disklayout.Plan{}, 0, fmt.Errorf("%s: %w", d.Path, err)
	}
	return disklayout.Plan{}, int64(st.Bavail) * st.Bsize, nil
}

// Check is content: a directory is not started.
func (Directory) Check(*image.View) error { return nil }

// Partition makes nothing new.
func (d Directory) Partition(context.Context, disklayout.Plan) (string, error) { return d.Path, nil }

// Fixup applies all fixups.
func (d Directory) Fixup(ctx context.Context, root string, plan disklayout.Plan, id wire.Identity) ([]string, error) {
	return fixup.Apply(ctx, root, id, plan, d.Log)
}

// Loader has no disk to write to.
func (Directory) Loader(context.Context, string, disklayout.Plan, wire.Identity) error { return nil }

// Release has nothing to do.
func (Directory) Release() error { return nil }
