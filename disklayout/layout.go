// Package disklayout turns a wanted layout and a real disk into a plan of byte
// ranges and filesystems. It does no I/O; package disklayout/apply carries a
// plan out.
package disklayout

// A Layout is a wanted disk layout, before any disk is known.
type Layout struct {
	// Disk names the disk to use: "" takes the first that is not removable,
	// in kernel order; otherwise a kernel name ("sda") or path ("/dev/sda").
	Disk       string      `json:"disk,omitempty" yaml:"disk,omitempty"`
	Partitions []Partition `json:"partitions" yaml:"partitions"`
}

// A Partition is one wanted partition.
type Partition struct {
	Name string `json:"name" yaml:"name"` // GPT partition name, unique in the layout, at most 36 characters
	Size string `json:"size" yaml:"size"` // "512MiB", "8GiB", "20%" of the disk, or "*": what the others leave

	// Type is what the partition is for: esp, bios-boot, swap, linux.
	Type Type `json:"type" yaml:"type"`

	FS    FS     `json:"fs,omitempty" yaml:"fs,omitempty"`       // ext4, vfat, swap; "" for none
	Mount string `json:"mount,omitempty" yaml:"mount,omitempty"` // absolute path in the target, "" for none

	// Firmware keeps the partition to machines of one kind; "" is for all.
	Firmware Firmware `json:"firmware,omitempty" yaml:"firmware,omitempty"`
}

// A Type is the purpose of a partition; it decides the GPT type GUID.
type Type string

// The partition types a layout can ask for.
const (
	ESP      Type = "esp"
	BIOSBoot Type = "bios-boot"
	Swap     Type = "swap"
	Linux    Type = "linux"
)

// An FS is a filesystem (or swap signature) that a partition can carry.
type FS string

// The filesystems a layout can ask for.
const (
	Ext4   FS = "ext4"
	VFAT   FS = "vfat"
	SwapFS FS = "swap"
)

// Firmware is the way a machine starts.
type Firmware string

// The kinds of firmware.
const (
	BIOS Firmware = "bios"
	UEFI Firmware = "uefi"
)

// A Disk is a disk that is really there, as /sys/block describes it.
type Disk struct {
	Name       string `json:"name"`       // kernel name, "sda"
	Path       string `json:"path"`       // device node or image file
	Size       int64  `json:"size"`       // bytes
	SectorSize int    `json:"sectorSize"` // logical, bytes; 0 means 512
	Model      string `json:"model,omitempty"`
	Serial     string `json:"serial,omitempty"`
	WWN        string `json:"wwn,omitempty"`
	Rotational bool   `json:"rotational,omitempty"`
	Removable  bool   `json:"removable,omitempty"`
	ReadOnly   bool   `json:"readOnly,omitempty"`
}

// A Plan is a layout fitted to one disk: what will be written where.
type Plan struct {
	Disk       Disk               `json:"disk"`
	DiskGUID   string             `json:"diskGUID"`
	Partitions []PlannedPartition `json:"partitions"` // in disk order; a partition's number is its place, from 1
}

// A PlannedPartition is a partition with its place and its identity.
type PlannedPartition struct {
	Number   int    `json:"number"` // from 1
	Name     string `json:"name"`
	Type     Type   `json:"type"`
	Start    int64  `json:"start"` // bytes, 1 MiB aligned
	End      int64  `json:"end"`   // bytes, exclusive
	PartGUID string `json:"partGUID"`
	FS       FS     `json:"fs,omitempty"`
	FSUUID   string `json:"fsUUID,omitempty"` // as fstab writes it: ext4 and swap a UUID, vfat "ABCD-1234"
	Mount    string `json:"mount,omitempty"`
}

// Default is the layout of a node that names none: it boots from BIOS and from
// UEFI, and gives the root filesystem what is left.
func Default() Layout {
	return Layout{Partitions: []Partition{
		{Name: "bios-boot", Size: "1MiB", Type: BIOSBoot, Firmware: BIOS},
		{Name: "esp", Size: "256MiB", Type: ESP, FS: VFAT, Mount: "/boot/efi", Firmware: UEFI},
		{Name: "swap", Size: "256MiB", Type: Swap, FS: SwapFS},
		{Name: "root", Size: "*", Type: Linux, FS: Ext4, Mount: "/"},
	}}
}
