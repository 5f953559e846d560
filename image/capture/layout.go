package capture

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"rookery/disklayout"
)

// Layout is the disk layout of the machine, for others of any size: the largest
// filesystem grows. The error says what of it a layout cannot express.
func (f Facts) Layout() (disklayout.Layout, error) {
	l, err := f.layout()
	if err != nil {
		return disklayout.Layout{}, err
	}
	if err := l.Check(); err != nil {
		return disklayout.Layout{}, err
	}
	return l, nil
}

func (f Facts) layout() (l disklayout.Layout, err error) {
	if len(f.devices) == 0 {
		return l, errors.New("lsblk says nothing of the disks")
	}
	disk, err := f.rootDisk()
	if err != nil {
		return l, err
	}
	grows, most := "", number(0)
	for _, d := range f.devices {
		if d.parent != disk || d.Type != "part" || extended[d.PartType] {
			continue
		}
		p, err := f.partition(d)
		if err != nil {
			return l, fmt.Errorf("%s: %w", d.Name, err)
		}
		if slices.ContainsFunc(l.Partitions, func(o disklayout.Partition) bool { return o.Name == p.Name }) {
			p.Name = d.Name
		}
		if p.FS == disklayout.Ext4 && (d.Size > most || d.Size == most && p.Mount == "/") {
			grows, most = p.Name, d.Size
		}
		l.Partitions = append(l.Partitions, p)
	}
	for i := range l.Partitions {
		if p := &l.Partitions[i]; p.Name == grows {
			p.Size = "*"
		}
	}
	isBIOSBoot := func(p disklayout.Partition) bool { return p.Type == disklayout.BIOSBoot }
	if f.Firmware == disklayout.BIOS && !slices.ContainsFunc(l.Partitions, isBIOSBoot) {
		// With an MBR the loader lies before the first partition; a GPT, which is
		// what nodes get, has no room there.
		l.Partitions = append([]disklayout.Partition{{Name: "bios-boot", Size: "1MiB", Type: disklayout.BIOSBoot}}, l.Partitions...)
	}
	return l, nil
}

// rootDisk is the disk that the root filesystem is on. All others hold nothing
// that is mounted.
func (f Facts) rootDisk() (disk string, err error) {
	for _, m := range f.mounts {
		if m.at == "/" && m.fs != string(disklayout.Ext4) {
			return "", fmt.Errorf("the root filesystem is %s, a layout takes ext4", m.fs)
		}
		if m.at != "/" {
			continue
		}
		d, ok := f.device(m.dev)
		if !ok {
			return "", fmt.Errorf("the root filesystem is on %s, which lsblk does not know", m.source)
		}
		if d.Type != "part" {
			return "", fmt.Errorf("the root filesystem is on %s %s, a layout takes partitions", d.Type, d.Shown)
		}
		disk = d.parent
	}
	for _, m := range f.mounts {
		d, ok := f.device(m.dev)
		if !ok || d.Type == "loop" || d.Type == "rom" || d.Type == "part" && d.parent == disk {
			continue
		}
		if d.Type != "part" {
			return "", fmt.Errorf("%s is on %s %s, a layout takes partitions", m.at, d.Type, d.Shown)
		}
		return "", fmt.Errorf("%s is on %s, a layout takes one disk and / is on %s", m.at, d.parent, disk)
	}
	return disk, nil
}

func (f Facts) device(dev string) (device, bool) {
	for _, d := range f.devices {
		if d.Dev == dev {
			return d, true
		}
	}
	return device{}, false
}

// extended are the partition types of an MBR that only hold others.
var extended = map[string]bool{"0x5": true, "0xf": true, "0x85": true}

// types are those that a GPT and an MBR have for special partitions.
var types = map[string]disklayout.Type{
	strings.ToLower(disklayout.ESP.GUID()):      disklayout.ESP,
	strings.ToLower(disklayout.BIOSBoot.GUID()): disklayout.BIOSBoot,
	strings.ToLower(disklayout.Swap.GUID()):     disklayout.Swap,
	"0xef":                                      disklayout.ESP,
	"0x82":                                      disklayout.Swap,
}

// partition is the layout's word for d.
func (f Facts) partition(d device) (p disklayout.Partition, err error) {
	p.Type, p.FS = disklayout.Linux, disklayout.FS(d.FS)
	if t, ok := types[strings.ToLower(d.PartType)]; ok {
		p.Type = t
	}
	switch p.Type {
	case disklayout.Swap:
		p.FS = disklayout.SwapFS
	case disklayout.BIOSBoot:
		p.FS = ""
	case disklayout.Linux:
		if p.FS == disklayout.SwapFS {
			p.Type = disklayout.Swap
		}
	}
	switch p.FS {
	case "", disklayout.Ext4, disklayout.VFAT, disklayout.SwapFS:
	default:
		return p, fmt.Errorf("holds %s, which a layout does not know", d.FS)
	}
	for _, m := range f.mounts {
		if m.dev == d.Dev && m.root == "/" {
			p.Mount = m.at
			break
		}
	}
	const mib = 1 << 20
	p.Size = fmt.Sprintf("%dMiB", max((int64(d.Size)+mib-1)/mib, 1))
	p.Name = d.name(p)
	return p, nil
}

// name is the label of d, since fstab may say LABEL=, or what d is for.
func (d device) name(p disklayout.Partition) string {
	purpose := string(p.Type)
	if p.Type == disklayout.Linux {
		purpose = d.Name
		if p.Mount == "/" {
			purpose = "root"
		} else if p.Mount != "" {
			purpose = strings.ReplaceAll(strings.Trim(p.Mount, "/"), "/", "-")
		}
	}
	for _, name := range []string{d.Label, d.PartLabel, purpose} {
		if fit.MatchString(name) {
			return name
		}
	}
	return d.Name
}

// fit are the names that a layout takes.
var fit = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,36}$`)
