package disklayout

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// maxPartitions is the number of entries in the GPT that is written.
const maxPartitions = 128

// Check says what is wrong with l, as far as that can be known before a disk
// is: the partition, the key and the reason.
func (l Layout) Check() error {
	if err := l.check(); err != nil {
		return fmt.Errorf("layout: %w", err)
	}
	return nil
}

func (l Layout) check() error {
	if len(l.Partitions) == 0 {
		return errors.New("partitions: there are none")
	}
	if len(l.Partitions) > maxPartitions {
		return fmt.Errorf("partitions: there are %d, a GPT has room for %d", len(l.Partitions), maxPartitions)
	}
	names := map[string]bool{}
	for i, p := range l.Partitions {
		if err := p.check(); err != nil {
			if p.Name == "" {
				return fmt.Errorf("partition %d: %w", i+1, err)
			}
			return fmt.Errorf("partition %q: %w", p.Name, err)
		}
		if names[p.Name] {
			return fmt.Errorf("partition %q: name: there is another of that name", p.Name)
		}
		names[p.Name] = true
	}
	var reasons []error
	for _, fw := range []Firmware{BIOS, UEFI} {
		parts := l.on(fw)
		if err := checkSet(parts); err != nil {
			return fmt.Errorf("%s: %w", fw, err)
		}
		reasons = append(reasons, checkBoots(parts, fw))
	}
	if reasons[0] != nil && reasons[1] != nil {
		return fmt.Errorf("no machine could start from it: %w; %w", reasons[0], reasons[1])
	}
	return nil
}

// check looks at one partition alone.
func (p Partition) check() error {
	switch {
	case p.Name == "":
		return errors.New("name: is missing")
	case len(p.Name) > 36:
		return fmt.Errorf("name: has %d characters, a GPT takes 36", len(p.Name))
	case strings.Trim(p.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != "":
		return errors.New("name: want letters, digits, '-', '_' and '.' only")
	}
	rule, ok := rules[p.Type]
	if !ok {
		return fmt.Errorf("type %q: want esp, bios-boot, swap or linux", p.Type)
	}
	if !rule.allows(p.FS) {
		return fmt.Errorf("fs %q: type %s wants %s", p.FS, p.Type, rule.want())
	}
	switch p.Firmware {
	case "", BIOS, UEFI:
	default:
		return fmt.Errorf("firmware %q: want bios, uefi or nothing", p.Firmware)
	}
	size, err := ParseSize(p.Size)
	if err != nil {
		return err
	}
	if least := p.least(); size.Bytes > 0 && size.Bytes < least {
		return fmt.Errorf("size %s: want at least %s for %s", p.Size, human(least), p.purpose())
	}
	if p.Mount == "" {
		return nil
	}
	switch {
	case p.FS == "" || p.FS == SwapFS:
		return fmt.Errorf("mount %q: there is no filesystem to mount", p.Mount)
	case !path.IsAbs(p.Mount):
		return fmt.Errorf("mount %q: want an absolute path", p.Mount)
	case path.Clean(p.Mount) != p.Mount:
		return fmt.Errorf("mount %q: want it as %q", p.Mount, path.Clean(p.Mount))
	case strings.ContainsFunc(p.Mount, func(r rune) bool { return r <= ' ' || r == '\\' || r == 0x7f }):
		return fmt.Errorf("mount %q: want no spaces, backslashes or control characters", p.Mount)
	case p.Mount == "/" && p.FS != Ext4:
		return fmt.Errorf("fs %q: the root filesystem wants ext4", p.FS)
	}
	return nil
}

// checkSet looks at the partitions that one kind of firmware gets.
func checkSet(parts []Partition) error {
	mounts := map[string]string{}
	percent, rest := 0, ""
	for _, p := range parts {
		if other, ok := mounts[p.Mount]; ok && p.Mount != "" {
			return fmt.Errorf("partition %q: mount %q: is the mount of %q already", p.Name, p.Mount, other)
		}
		mounts[p.Mount] = p.Name
		size, err := ParseSize(p.Size)
		if err != nil {
			return err
		}
		percent += size.Percent
		if size.Rest && rest != "" {
			return fmt.Errorf(`partition %q: size "*": %q takes the rest already`, p.Name, rest)
		}
		if size.Rest {
			rest = p.Name
		}
	}
	if _, ok := mounts["/"]; !ok {
		return errors.New(`no partition has the mount "/"`)
	}
	if percent > 99 {
		return fmt.Errorf("sizes take %d%% of the disk, want 99%% at the most", percent)
	}
	return nil
}

// checkBoots says whether firmware of the kind fw finds a loader's place.
func checkBoots(parts []Partition, fw Firmware) error {
	want := map[Firmware]Type{BIOS: BIOSBoot, UEFI: ESP}[fw]
	for _, p := range parts {
		if p.Type == want && (want != ESP || p.Mount != "") {
			return nil
		}
		if p.Type == want {
			return fmt.Errorf("%s: partition %q: mount: is missing, the loader goes there", fw, p.Name)
		}
	}
	return fmt.Errorf("%s: wants a partition of type %s, there is none", fw, want)
}

// on is the partitions that a machine with firmware fw gets.
func (l Layout) on(fw Firmware) (parts []Partition) {
	for _, p := range l.Partitions {
		if p.Firmware == "" || p.Firmware == fw {
			parts = append(parts, p)
		}
	}
	return parts
}

// A rule is what a partition type asks of its partition.
type rule struct {
	guid string // GPT partition type
	fs   []FS   // what it can carry
}

// The type GUIDs are those of the UEFI specification 2.10, table 5-7, and of
// the Discoverable Partitions Specification. The root partition has the plain
// Linux type, so that systemd's GPT generator leaves it to fstab.
var rules = map[Type]rule{
	ESP:      {"C12A7328-F81F-11D2-BA4B-00A0C93EC93B", []FS{VFAT}},
	BIOSBoot: {"21686148-6449-6E6F-744E-656564454649", []FS{""}},
	Swap:     {"0657FD6D-A4AB-43C4-84E5-0933C84B4F4F", []FS{SwapFS}},
	Linux:    {"0FC63DAF-8483-4772-8E79-3D69D8477DE4", []FS{Ext4, VFAT, ""}},
}

// GUID is the GPT partition type of t, "" when t is none of ours.
func (t Type) GUID() string { return rules[t].guid }

func (r rule) allows(fs FS) bool {
	for _, ok := range r.fs {
		if fs == ok {
			return true
		}
	}
	return false
}

func (r rule) want() string {
	var words []string
	for _, fs := range r.fs {
		if fs == "" {
			words = append(words, "none")
		} else {
			words = append(words, string(fs))
		}
	}
	return strings.Join(words, " or ")
}

// least is the smallest size that makes sense for p, in bytes: mke2fs makes a
// journal from 2048 blocks on; FAT16, the least that firmware reads for sure,
// wants 4085 clusters, which are of 4096 bytes on some disks.
func (p Partition) least() int64 {
	switch p.FS {
	case Ext4:
		return 16 * MiB
	case VFAT:
		return 32 * MiB
	}
	return 1 * MiB
}

func (p Partition) purpose() string {
	if p.FS == "" {
		return string(p.Type)
	}
	return string(p.FS)
}
