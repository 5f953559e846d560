package apply

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/diskfs/go-diskfs"
	"github.com/diskfs/go-diskfs/partition/gpt"

	"rookery/disklayout"
)

// Carries says whether plan was carried out on its disk already: the table is
// that of plan, and where its root is to be is that very filesystem. All their
// UUIDs come from one installation, so it was this one. The other filesystems
// are not looked at.
func Carries(plan disklayout.Plan) (bool, error) {
	d, err := diskfs.Open(plan.Disk.Path, diskfs.WithSectorSize(diskfs.SectorSize(plan.Disk.SectorSize)))
	if err != nil {
		return false, err
	}
	defer d.Close() // nothing was written
	sector := d.LogicalBlocksize
	head := make([]byte, 72)
	if _, err := d.Backend.ReadAt(head, sector); err != nil { // the table's, UEFI 2.10, 5.3.2
		return false, fmt.Errorf("%s: %w", plan.Disk.Path, err)
	}
	if !bytes.Equal(head[56:], mixed(plan.DiskGUID)) {
		return false, nil // of whatever is there, no more is parsed
	}
	table, err := gpt.Read(d.Backend, int(sector), int(d.PhysicalBlocksize))
	if err != nil {
		return false, nil // damaged
	}
	root := plan.At("/")
	super := make([]byte, 0x78)
	if _, err := d.Backend.ReadAt(super, root.Start+1024); err != nil {
		return false, fmt.Errorf("%s: %w", plan.Disk.Path, err)
	}
	return same(plan, table, sector) && isExt4(super, root.FSUUID), nil
}

// same says whether table is that of plan.
func same(plan disklayout.Plan, table *gpt.Table, sector int64) bool {
	type part struct {
		number, start, end int64
		name, kind, id     string
	}
	var want, have []part
	for _, p := range plan.Partitions {
		want = append(want, part{int64(p.Number), p.Start, p.End, p.Name, strings.ToUpper(p.Type.GUID()), strings.ToUpper(p.PartGUID)})
	}
	for _, p := range table.Partitions {
		if p.Type == gpt.Unused {
			continue
		}
		have = append(have, part{
			int64(p.Index), int64(p.Start) * sector, int64(p.End+1) * sector,
			p.Name, strings.ToUpper(string(p.Type)), strings.ToUpper(p.GUID),
		})
	}
	return !table.RecoveredFromBackup && slices.Equal(have, want)
}

// isExt4 reads a superblock (linux: fs/ext4/ext4.h).
func isExt4(super []byte, uuid string) bool {
	return super[0x38] == 0x53 && super[0x39] == 0xef && bytes.Equal(super[0x68:0x78], plain(uuid))
}

// plain is the bytes of a UUID, or nil.
func plain(uuid string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(uuid, "-", ""))
	if err != nil || len(b) != 16 {
		return nil
	}
	return b
}

// mixed is a UUID as GPT has it: its first three numbers are little-endian.
func mixed(uuid string) []byte {
	b := plain(uuid)
	if b != nil {
		slices.Reverse(b[0:4])
		slices.Reverse(b[4:6])
		slices.Reverse(b[6:8])
	}
	return b
}
