package disklayout

import (
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

var (
	// ErrTooSmall says that a layout does not fit its disk.
	ErrTooSmall = errors.New("disk too small")
	// ErrNoDisk says that the wanted disk is not there, or none that will do.
	ErrNoDisk = errors.New("no disk to install on")
)

// align is where partitions start and end: it suits every sector, erase block
// and stripe, and leaves room for the first GPT and for GRUB.
const align = MiB

// Fit chooses l's disk among disks and places its partitions on it, in their
// order, as a machine with firmware fw needs them. Equal arguments give equal
// plans, UUIDs included: these are derived from seed, the installation's ID.
// A disk without room is an error that wraps ErrTooSmall, a lack of disks one
// that wraps ErrNoDisk.
func Fit(l Layout, disks []Disk, fw Firmware, seed string) (Plan, error) {
	if err := l.Check(); err != nil {
		return Plan{}, err
	}
	if fw != BIOS && fw != UEFI {
		return Plan{}, fmt.Errorf("firmware %q: want bios or uefi", fw)
	}
	parts := l.on(fw)
	if err := checkBoots(parts, fw); err != nil {
		return Plan{}, fmt.Errorf("layout: %w", err)
	}
	disk, err := choose(l.Disk, disks)
	if err != nil {
		return Plan{}, err
	}
	if s := disk.sector(); s < 512 || s > align || s&(s-1) != 0 {
		return Plan{}, fmt.Errorf("%s has sectors of %d bytes: want a power of two from 512 on", disk.Name, s)
	}
	sizes, err := share(parts, disk)
	if err != nil {
		return Plan{}, err
	}
	plan := Plan{Disk: disk, DiskGUID: uuid(seed, "disk")}
	at := int64(align)
	for i, p := range parts {
		planned := PlannedPartition{
			Number: i + 1, Name: p.Name, Type: p.Type, Start: at, End: at + sizes[i],
			PartGUID: uuid(seed, "partition "+p.Name), FS: p.FS, Mount: p.Mount,
		}
		switch p.FS {
		case Ext4, SwapFS:
			planned.FSUUID = uuid(seed, "filesystem "+p.Name)
		case VFAT:
			id := strings.ToUpper(uuid(seed, "filesystem "+p.Name))
			planned.FSUUID = id[:4] + "-" + id[4:8]
		}
		plan.Partitions = append(plan.Partitions, planned)
		at = planned.End
	}
	return plan, nil
}

// choose finds the disk that is wanted, by name or by path; for "" the first
// that is neither removable nor read-only.
func choose(want string, disks []Disk) (Disk, error) {
	var there []string
	for _, d := range disks {
		note := ""
		switch {
		case d.ReadOnly:
			note = " (read-only)"
		case want == "" && d.Removable:
			note = " (removable)"
		case want == "" || want == d.Name || want == d.Path:
			return d, nil
		}
		there = append(there, d.Name+note)
	}
	list := strings.Join(there, ", ")
	switch {
	case len(there) == 0:
		return Disk{}, fmt.Errorf("%w: the machine has none", ErrNoDisk)
	case want == "":
		return Disk{}, fmt.Errorf("%w: there are %s", ErrNoDisk, list)
	}
	return Disk{}, fmt.Errorf("%w: want %s, there are %s", ErrNoDisk, want, list)
}

// share gives every partition its bytes, in whole alignments.
func share(parts []Partition, disk Disk) ([]int64, error) {
	var (
		sizes   = make([]int64, len(parts))
		rest    = -1
		percent int64
		fixed   int64 // bytes wanted whatever the disk's size
		least   int64 // the least disk on which every percentage is large enough
		used    int64
	)
	for i, p := range parts {
		size, err := ParseSize(p.Size)
		if err != nil {
			return nil, err
		}
		switch {
		case size.Rest:
			rest = i
			fixed += p.least()
			continue // the rest is known when all others are
		case size.Percent > 0:
			pc := int64(size.Percent)
			percent += pc
			least = max(least, roundUp((p.least()*100+pc-1)/pc))
			sizes[i] = disk.Size / 100 * pc / align * align
		default:
			sizes[i] = roundUp(size.Bytes)
			fixed += sizes[i]
		}
		used += sizes[i]
	}
	// The second GPT is the header's sector and 128 entries of 128 bytes.
	end := (disk.Size - maxPartitions*128 - disk.sector()) / align * align
	left := end - align - used
	short := left < 0
	if rest >= 0 {
		sizes[rest] = left
		short = left < parts[rest].least()
	}
	for i, p := range parts {
		short = short || sizes[i] < p.least()
	}
	if short {
		const tables = 2 * align // one before the partitions, one after
		room := 100 - percent    // what of a disk is not given away by percentage
		need := max(least, ((fixed+tables)/align*100+room-1)/room*align)
		return nil, fmt.Errorf("%s holds %d bytes, layout needs %d: %w", disk.Name, disk.Size, need, ErrTooSmall)
	}
	return sizes, nil
}

func roundUp(n int64) int64 { return (n + align - 1) / align * align }

// sector is the logical sector size in bytes.
func (d Disk) sector() int64 {
	if d.SectorSize == 0 {
		return 512
	}
	return int64(d.SectorSize)
}

// namespace is the UUID under which ours are derived; any constant would do.
var namespace = [16]byte{0x72, 0x6f, 0x6f, 0x6b, 0x65, 0x72, 0x79, 0x40, 0x8d, 0x1a, 0x5e, 0x0c, 0x93, 0xb7, 0x21, 0xf6}

// uuid is the version 5 UUID (RFC 9562, 5.5) of one thing of one installation.
func uuid(seed, what string) string {
	sum := sha1.Sum([]byte(string(namespace[:]) + seed + "\x00" + what))
	u := sum[:16]
	u[6] = u[6]&0x0f | 0x50
	u[8] = u[8]&0x3f | 0x80
	h := hex.EncodeToString(u)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
