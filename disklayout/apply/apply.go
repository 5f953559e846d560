// Package apply carries a disk plan out on a block device: partition table,
// filesystems, mounts. An image file becomes a block device by Attach.
package apply

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"rookery/disklayout"
)

// Mkfs makes the filesystems of plan by running plan.Commands.
func Mkfs(ctx context.Context, plan disklayout.Plan, run Run) error {
	if err := nodes(ctx, plan); err != nil {
		return fmt.Errorf("mkfs: %w", err)
	}
	for _, c := range plan.Commands() {
		if err := run(ctx, c.Name, c.Args...); err != nil {
			return fmt.Errorf("mkfs: %w", err)
		}
	}
	return nil
}

// nodes waits until every partition of plan has its device node, and is as
// large there as in the plan.
func nodes(ctx context.Context, plan disklayout.Plan) error {
	disk, err := os.Open(plan.Disk.Path)
	if err != nil {
		return err
	}
	defer disk.Close()
	if st, err := disk.Stat(); err != nil {
		return err
	} else if st.Mode()&os.ModeDevice == 0 {
		return fmt.Errorf("%s is not a block device: an image file is to be attached first", plan.Disk.Path)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, p := range plan.Partitions {
		// A kernel without CONFIG_EFI_PARTITION finds no partitions by itself;
		// one that has found them answers EBUSY.
		if err := addPartition(disk, p); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%s: telling the kernel of partition %d: %w", plan.Disk.Path, p.Number, err)
		}
		node := plan.Device(p.Number)
		for {
			size, err := deviceSize(node)
			if err == nil && size == p.End-p.Start {
				break
			}
			select {
			case <-ctx.Done(): // udev, or the kernel's devtmpfs, had its time
				if err == nil {
					err = fmt.Errorf("holds %d bytes, plan says %d", size, p.End-p.Start)
				}
				return fmt.Errorf("%s: %w", node, err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// Mountable says whether the kernel knows a filesystem, which it may have to
// load a module for.
func Mountable(fs disklayout.FS) error {
	known := func() (bool, error) {
		b, err := os.ReadFile("/proc/filesystems")
		return slices.Contains(strings.Fields(string(b)), string(fs)), err
	}
	ok, err := known()
	if err == nil && !ok {
		// The agent's initramfs has no modprobe and loaded all it has; elsewhere
		// the answer is what is known afterwards.
		_ = Host(context.Background(), "modprobe", string(fs))
		ok, err = known()
	}
	if err == nil && !ok {
		err = fmt.Errorf("the kernel knows no %s: is its module loaded?", fs)
	}
	return err
}

// Mount mounts the filesystems of plan below root, upper ones first, making
// the mount points. The function it returns unmounts them again; it may be
// called until it succeeds.
func Mount(plan disklayout.Plan, root string) (unmount func() error, err error) {
	if err := nodes(context.Background(), plan); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	var mounted []string
	unmount = func() error {
		for len(mounted) > 0 {
			last := mounted[len(mounted)-1]
			if err := unmountBusy(last); err != nil {
				return fmt.Errorf("unmount: %s: %w", last, err)
			}
			mounted = mounted[:len(mounted)-1]
		}
		return nil
	}
	for _, p := range plan.Mounts() {
		point, err := mountPoint(root, p.Mount)
		if err == nil {
			err = unix.Mount(plan.Device(p.Number), point, string(p.FS), 0, options(p.FS))
		}
		if errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("the kernel knows no %s: is its module loaded?", p.FS)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("mount: %s at %s: %w", plan.Device(p.Number), p.Mount, err), unmount())
		}
		mounted = append(mounted, point)
	}
	return unmount, nil
}

// mountPoint makes the directory mount below root, following no link out of
// it, and gives its path.
func mountPoint(root, mount string) (string, error) {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", err
	}
	r, err := os.OpenRoot(root)
	if err != nil {
		return "", err
	}
	defer r.Close()
	if mount == "/" {
		return root, nil
	}
	if err := r.MkdirAll(mount[1:], 0o755); err != nil {
		return "", err
	}
	return root + mount, nil
}

func options(fs disklayout.FS) string {
	if fs == disklayout.VFAT {
		return "umask=0077" // keys and configuration of loaders are for root only
	}
	return ""
}

// unmountBusy unmounts, and gives a process that is just ending, or udev's
// prober, time to let go.
func unmountBusy(point string) error {
	for try := 0; ; try++ {
		err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW)
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		if try == 50 {
			return fmt.Errorf("%w: held by %s", err, holders(point))
		}
		time.Sleep(100 * time.Millisecond)
	}
}
