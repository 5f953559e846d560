package disklayout

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Command is a program and its arguments.
type Command struct {
	Name string
	Args []string
}

// String is the command as one would type it.
func (c Command) String() string {
	words := []string{c.Name}
	for _, a := range c.Args {
		if a == "" || strings.Trim(a, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./=,:+@%^") != "" {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		words = append(words, a)
	}
	return strings.Join(words, " ")
}

// Device is the device node of partition n, as Linux names it. For a plan of
// an image file it is the node it would be, were the file a disk.
func (p Plan) Device(n int) string {
	sep := ""
	if last := p.Disk.Path[max(len(p.Disk.Path)-1, 0):]; last >= "0" && last <= "9" {
		sep = "p" // nvme0n1p2, mmcblk0p2, loop0p2 (block/partitions/core.c)
	}
	return p.Disk.Path + sep + strconv.Itoa(n)
}

// Commands are the programs that make the filesystems of p, in their order:
// the very ones that package disklayout/apply runs.
func (p Plan) Commands() []Command {
	var list []Command
	for _, part := range p.Partitions {
		dev := p.Device(part.Number)
		switch part.FS {
		case Ext4:
			list = append(list, Command{"mke2fs", []string{
				"-q", "-F", "-t", "ext4",
				// GRUB 2.06 and kernels before 5.15 cannot read what these two make;
				// e2fsprogs 1.47 has them on by default.
				"-O", "^metadata_csum_seed,^orphan_file",
				"-E", "lazy_itable_init=1,lazy_journal_init=1",
				"-U", part.FSUUID, "-L", label(part.Name, 16), dev,
			}})
		case VFAT:
			bits := "32"
			if part.End-part.Start < 66000*p.Disk.sector() { // FAT32 wants 65525 clusters
				bits = "16"
			}
			list = append(list, Command{"mkfs.vfat", []string{
				"-F", bits, "-i", strings.ReplaceAll(part.FSUUID, "-", ""),
				"-n", strings.ToUpper(label(part.Name, 11)), dev,
			}})
		case SwapFS:
			list = append(list, Command{"mkswap", []string{"-U", part.FSUUID, "-L", label(part.Name, 15), dev}})
		}
	}
	return list
}

// Mounts are the partitions with a mount point, each after those above it.
func (p Plan) Mounts() []PlannedPartition {
	var list []PlannedPartition
	for _, part := range p.Partitions {
		if part.Mount != "" {
			list = append(list, part)
		}
	}
	depth := func(part PlannedPartition) int {
		return strings.Count(strings.TrimSuffix(part.Mount, "/"), "/")
	}
	slices.SortStableFunc(list, func(a, b PlannedPartition) int { return cmp.Compare(depth(a), depth(b)) })
	return list
}

// At is the partition that is mounted at mount; Number is 0 when there is none.
func (p Plan) At(mount string) PlannedPartition {
	for _, part := range p.Partitions {
		if part.Mount == mount {
			return part
		}
	}
	return PlannedPartition{}
}

// Describe tells what carrying p out will do, in lines for people: the byte
// ranges first, then each thing that is done to the disk.
func (p Plan) Describe() []string {
	lines := []string{
		fmt.Sprintf("disk %s: %s, %d bytes (%s), GPT %s", p.Disk.Name, p.Disk.Path, p.Disk.Size, human(p.Disk.Size), p.DiskGUID),
		fmt.Sprintf("%3s  %-12s %-10s %15s %15s %10s  %-5s %s", "", "name", "type", "start", "end", "size", "fs", "mount"),
	}
	for _, part := range p.Partitions {
		lines = append(lines, strings.TrimRight(fmt.Sprintf("%3d  %-12s %-10s %15d %15d %10s  %-5s %s",
			part.Number, part.Name, part.Type, part.Start, part.End, human(part.End-part.Start), part.FS, part.Mount), " "))
	}
	lines = append(lines, "wipe old signatures", "write the partition table")
	for _, c := range p.Commands() {
		lines = append(lines, c.String())
	}
	for _, part := range p.Mounts() {
		lines = append(lines, fmt.Sprintf("mount -t %s %s at %s", part.FS, p.Device(part.Number), part.Mount))
	}
	return lines
}

func (p Plan) String() string { return strings.Join(p.Describe(), "\n") }

// label is name cut to what a filesystem keeps of it.
func label(name string, most int) string { return name[:min(len(name), most)] }
