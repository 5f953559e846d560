package apply

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"rookery/disklayout"
)

// Attach makes plan's disk a block device: an image file is attached to a free
// loop device, and the plan it returns names that instead. A plan for a block
// device comes back as it is. Detach is to be called when nothing of the disk
// is in use any more.
func Attach(plan disklayout.Plan) (attached disklayout.Plan, detach func() error, err error) {
	st, err := os.Stat(plan.Disk.Path)
	if err != nil {
		return plan, nil, fmt.Errorf("attach: %w", err)
	}
	if !st.Mode().IsRegular() {
		return plan, func() error { return nil }, nil
	}
	image, err := os.OpenFile(plan.Disk.Path, os.O_RDWR, 0)
	if err != nil {
		return plan, nil, fmt.Errorf("attach: %w", err)
	}
	defer image.Close() // the loop device has its own hold on it
	loop, err := freeLoop(image, plan.Disk.SectorSize)
	if err != nil {
		return plan, nil, fmt.Errorf("attach: %s: %w", plan.Disk.Path, err)
	}
	plan.Disk.Path = loop.Name()
	return plan, loop.Close, nil // the last close takes the loop device away
}

// freeLoop attaches image to a loop device. Partitions go away with it.
func freeLoop(image *os.File, sector int) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("looking for a free loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		config := unix.LoopConfig{Fd: uint32(image.Fd()), Size: uint32(sector)}
		config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_PARTSCAN
		copy(config.Info.File_name[:63], image.Name())
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		if err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) { // somebody else was faster
			return nil, fmt.Errorf("%s: %w", loop.Name(), err)
		}
	}
}
