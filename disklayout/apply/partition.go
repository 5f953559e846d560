package apply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"unsafe"

	"github.com/diskfs/go-diskfs"
	"github.com/diskfs/go-diskfs/partition/gpt"
	"golang.org/x/sys/unix"

	"rookery/disklayout"
)

// Partition wipes what was on plan's disk and writes its partition table. On
// return every partition has its device node. A disk that is in use is left
// alone: the error wraps unix.EBUSY.
func Partition(ctx context.Context, plan disklayout.Plan) error {
	if err := writeTable(plan); err != nil {
		return fmt.Errorf("partition: %w", err)
	}
	if err := nodes(ctx, plan); err != nil {
		return fmt.Errorf("partition: %w", err)
	}
	return nil
}

// writeTable closes the disk before anybody looks at its partitions: go-diskfs
// holds it exclusively, and what it wrote is in the whole disk's cache only.
func writeTable(plan disklayout.Plan) (err error) {
	d, err := diskfs.Open(plan.Disk.Path, diskfs.WithSectorSize(diskfs.SectorSize(plan.Disk.SectorSize)))
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s is in use (mounted, swap, or part of an array): %w", plan.Disk.Path, unix.EBUSY)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if d.Size < plan.Disk.Size {
		return fmt.Errorf("%s holds %d bytes, plan was made for %d", plan.Disk.Path, d.Size, plan.Disk.Size)
	}
	w, err := d.Backend.Writable()
	if err != nil {
		return err
	}
	for _, r := range wipes(plan, d.Size) {
		if err := zero(w, r[0], r[1]); err != nil {
			return fmt.Errorf("%s: wiping: %w", plan.Disk.Path, err)
		}
	}
	sector := uint64(d.LogicalBlocksize)
	table := &gpt.Table{
		GUID: plan.DiskGUID, ProtectiveMBR: true,
		LogicalSectorSize: int(d.LogicalBlocksize), PhysicalSectorSize: int(d.PhysicalBlocksize),
	}
	for _, p := range plan.Partitions {
		table.Partitions = append(table.Partitions, &gpt.Partition{
			Index: p.Number, Name: p.Name, Type: gpt.Type(p.Type.GUID()), GUID: p.PartGUID,
			Start: uint64(p.Start) / sector, End: uint64(p.End)/sector - 1, Size: uint64(p.End - p.Start),
		})
	}
	if err := d.Partition(table); err != nil {
		return fmt.Errorf("%s: %w", plan.Disk.Path, err)
	}
	if uint64(d.Size)/sector-1 > math.MaxUint32 {
		// UEFI 2.10, 5.2.3: a larger disk's protective MBR says 0xffffffff;
		// go-diskfs writes the low half of the number.
		if _, err := w.WriteAt([]byte{0xff, 0xff, 0xff, 0xff}, 446+12); err != nil {
			return fmt.Errorf("%s: protective MBR: %w", plan.Disk.Path, err)
		}
	}
	return nil
}

// wipes are the ranges (offset, length) where signatures of old contents can
// be: both ends of the disk and of every partition. The farthest from an end
// is ZFS's, at 512 KiB.
func wipes(plan disklayout.Plan, size int64) [][2]int64 {
	const reach = disklayout.MiB
	ranges := [][2]int64{{0, min(reach, size)}, {max(size-reach, 0), min(reach, size)}}
	for _, p := range plan.Partitions {
		n := min(reach, p.End-p.Start)
		ranges = append(ranges, [2]int64{p.Start, n}, [2]int64{p.End - n, n})
	}
	return ranges
}

func zero(w io.WriterAt, offset, length int64) error {
	_, err := w.WriteAt(make([]byte, length), offset)
	return err
}

// addPartition tells the kernel of p.
func addPartition(disk *os.File, p disklayout.PlannedPartition) error {
	part := unix.BlkpgPartition{Start: p.Start, Length: p.End - p.Start, Pno: int32(p.Number)}
	arg := unix.BlkpgIoctlArg{
		Op: unix.BLKPG_ADD_PARTITION, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part)),
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, disk.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return errno
	}
	return nil
}

// deviceSize is the size of a block device in bytes.
func deviceSize(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}
