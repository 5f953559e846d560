package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"
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
func (c *Computer) Plan(ctx context.Context, s wire.Script) (disklayout.Plan, Room, error) {
	plan, err := c.fit(ctx, s)
	if err != nil {
		return disklayout.Plan{}, Room{}, err
	}
	for _, command := range plan.Commands() {
		if _, err := apply.Look(command.Name); err != nil {
			return disklayout.Plan{}, Room{}, fmt.Errorf("program that the layout needs: %w", err)
		}
	}
	root := plan.At("/")
	if root.Number == 0 {
		return disklayout.Plan{}, Room{}, errors.New("layout has no filesystem for /")
	}
	return plan, roomIn(root), nil
}

// roomIn is what a partition's filesystem will hold. For how many bytes mke2fs
// makes an inode depends on the size (mke2fs.conf(5), as e2fsprogs ships it);
// rounding to groups of blocks takes less than one in a hundred away.
func roomIn(p disklayout.PlannedPartition) Room {
	room := Room{Bytes: p.End - p.Start}
	if p.FS != disklayout.Ext4 {
		return room
	}
	ratio := int64(16384)
	switch {
	case room.Bytes < 512<<20:
		ratio = 4096
	case room.Bytes >= 16<<40:
		ratio = 65536
	case room.Bytes >= 4<<40:
		ratio = 32768
	}
	room.Inodes = room.Bytes / ratio / 100 * 99
	return room
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
// written when one of them could not be mounted. Where an earlier start of the
// same installation did that, the staging on its root stays, and nothing else.
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
	fresh := attached // what is to be made
	if c.stagingStays(attached) {
		c.Log.Info("partition: as an earlier start of this installation left it")
		fresh.Partitions = slices.Clone(attached.Partitions)
		fresh.Partitions[attached.At("/").Number-1].FS = ""
	} else if err := apply.Partition(ctx, attached); err != nil {
		return "", err
	}
	if err := apply.Mkfs(ctx, fresh, apply.Host); err != nil {
		return "", err
	}
	c.unmount, err = apply.Mount(attached, c.Root)
	return c.Root, err
}

// stagingStays empties a root that this installation made, but for its staging.
// It says false when there is none: whatever the reason, all is made anew.
func (c *Computer) stagingStays(plan disklayout.Plan) bool {
	carries, err := apply.Carries(plan)
	if err != nil || !carries {
		return false // what is wrong with the disk, Partition says
	}
	only := plan
	only.Partitions = []disklayout.PlannedPartition{plan.At("/")}
	unmount, err := apply.Mount(only, c.Root)
	if err == nil {
		err = errors.Join(clearRoot(c.Root), unmount())
	}
	if err != nil {
		c.Log.Warn("partition: what an earlier start left is of no use", "err", err)
	}
	return err == nil
}

// lostFound is a directory that mke2fs makes.
const lostFound = "lost+found"

// clearRoot removes everything but the staging, which has to be there.
func clearRoot(dir string) error {
	if st, err := os.Lstat(filepath.Join(dir, StagingDir)); err != nil {
		return err
	} else if !st.IsDir() {
		return fmt.Errorf("%s is no directory", StagingDir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	names, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	for _, d := range names {
		if d.Name() == StagingDir || d.Name() == lostFound && d.IsDir() {
			continue
		}
		if err := root.RemoveAll(d.Name()); err != nil {
			return err
		}
	}
	names, err = fs.ReadDir(root.FS(), lostFound)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, d := range names { // anybody may have put them there
		err = errors.Join(err, root.RemoveAll(path.Join(lostFound, d.Name())))
	}
	return err
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
func (d Directory) Plan(context.Context, wire.Script) (disklayout.Plan, Room, error) {
	if err := os.MkdirAll(d.Path, 0o755); err != nil {
		return disklayout.Plan{}, Room{}, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(d.Path, &st); err != nil {
		return disklayout.Plan{}, Room{}, fmt.Errorf("%s: %w", d.Path, err)
	}
	room := Room{Bytes: int64(st.Bavail) * st.Bsize}
	if st.Files > 0 { // btrfs does not count them
		room.Inodes = max(1, int64(st.Ffree))
	}
	if _, err := os.Lstat(filepath.Join(d.Path, StagingDir)); err == nil {
		// An installation was stopped here: what it wrote goes into this one.
		used := usage(d.Path)
		room.Bytes += used.Bytes
		if room.Inodes > 0 {
			room.Inodes += used.Inodes
		}
	}
	return disklayout.Plan{}, room, nil
}

// usage is what the files below dir take of its filesystem, as far as they can
// be seen.
func usage(dir string) (used Room) {
	var on uint64
	_ = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		st := info.Sys().(*syscall.Stat_t)
		if name == dir {
			on = st.Dev
		}
		switch {
		case st.Dev == on:
			used.Bytes += st.Blocks * 512
			used.Inodes++
		case d.IsDir(): // mounted here
			return fs.SkipDir
		}
		return nil
	})
	return used
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
