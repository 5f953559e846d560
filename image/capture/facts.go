package capture

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"rookery/disklayout"
)

// Facts are what a golden client says of itself.
type Facts struct {
	Host     string              `json:"host"` // as it calls itself
	OS       string              `json:"os,omitempty"`
	Kernel   string              `json:"kernel,omitempty"`
	Firmware disklayout.Firmware `json:"firmware"`

	// Raw is what its programs printed, by the names in questions. What is not
	// installed there is empty.
	Raw map[string]string `json:"raw"`

	mounts  []mount
	devices []device // those that are parts of others as well
	volumes []volume
	groups  map[string]volumeGroup
}

// questions are put to the client by a POSIX shell. None may ask for a secret.
var questions = []struct{ name, command string }{
	{"uid", `id -u`},
	{"hostname", `hostname 2>/dev/null || cat /proc/sys/kernel/hostname`},
	{"time", `date -u +%Y-%m-%dT%H:%M:%SZ`},
	{"kernel", `uname -srm`},
	{"os-release", `cat /etc/os-release || cat /usr/lib/os-release`},
	{"firmware", `if [ -d /sys/firmware/efi ]; then echo uefi; else echo bios; fi`},
	{"rsync", `rsync --version`},
	{"mountinfo", `cat /proc/self/mountinfo`},
	{"lsblk", `lsblk -J -b -o NAME,KNAME,MAJ:MIN,TYPE,SIZE,RO,RM,MODEL,FSTYPE,LABEL,UUID,PTTYPE,PARTTYPE,PARTLABEL,PARTUUID,MOUNTPOINT`},
	{"starts", `for f in /sys/class/block/*/start; do d=${f%/start}; echo "${d##*/} $(cat "$f")"; done`},
	{"blkid", `for f in /sys/class/block/*/partition; do d=${f%/partition}; echo; blkid -p -o export "/dev/${d##*/}"; done`},
	{"efibootmgr", `efibootmgr -v`},
	{"mdadm", `mdadm --detail --scan`},
	{"pvs", `pvs --reportformat json --units b --nosuffix`},
	{"vgs", `vgs --reportformat json --units b --nosuffix -o vg_name,vg_free_count,vg_extent_size`},
	{"lvs", `lvs --reportformat json --units b --nosuffix -o vg_name,lv_name,lv_size,lv_layout,lv_kernel_major,lv_kernel_minor,origin,pool_lv`},
	{"subvolumes", `sed -n 's/^[0-9]* [0-9]* [0-9:]* \([^ ]*\) \([^ ]*\) .* - btrfs .*/\1 \2/p' /proc/self/mountinfo |
	while read -r r m; do echo "at $r $m"; btrfs subvolume list -o "$(printf '%b' "$m")"; done`},
}

// askAll is the script that puts the questions. Before each answer, and after the
// last, it prints a line with mark.
func askAll(mark string) string {
	var b strings.Builder
	b.WriteString("LC_ALL=C PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin\nexport LC_ALL PATH\n")
	for _, q := range questions {
		fmt.Fprintf(&b, "echo; echo %s %s\n{ %s\n} </dev/null 2>/dev/null\n", mark, q.name, q.command)
	}
	fmt.Fprintf(&b, "echo; echo %s end\n", mark)
	return b.String()
}

// parseFacts reads what the script of askAll printed, without its last line.
func parseFacts(text, mark string) (f Facts, err error) {
	f.Raw = make(map[string]string)
	name := ""
	for line := range strings.Lines(text) {
		if next, ok := strings.CutPrefix(line, mark+" "); ok {
			name = strings.TrimSpace(next)
			continue
		}
		if name != "" {
			f.Raw[name] += line
		}
	}
	for name, text := range f.Raw {
		f.Raw[name] = strings.TrimSpace(strings.ToValidUTF8(text, "?"))
	}
	f.Host, f.Kernel = f.Raw["hostname"], f.Raw["kernel"]
	f.OS = osName(f.Raw["os-release"])
	f.Firmware = disklayout.Firmware(f.Raw["firmware"])
	if f.Firmware != disklayout.BIOS && f.Firmware != disklayout.UEFI {
		return f, fmt.Errorf("firmware: %.40q is neither bios nor uefi", f.Raw["firmware"])
	}
	if f.mounts, err = parseMounts(f.Raw["mountinfo"]); err != nil {
		return f, err
	}
	// The rest may be missing, or be of programs too old to answer like this:
	// there is no layout to be had then, and no snapshot.
	f.devices = parseDevices(f.Raw["lsblk"], f.Raw["starts"])
	f.probed(f.Raw["blkid"])
	f.volumes, f.groups = parseVolumes(f.Raw["lvs"], f.Raw["vgs"])
	return f, nil
}

// osName is the PRETTY_NAME of an os-release.
func osName(text string) string {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(strings.TrimSpace(value), `"'`)
		}
	}
	return ""
}

// A mount is a line of mountinfo (proc(5)).
type mount struct {
	dev    string // major:minor; of btrfs a number that no device has
	root   string // of the filesystem, what is mounted
	at     string
	fs     string
	source string
}

// maxMounts bounds the mounts, and the subvolumes, that are compared with each other.
const maxMounts = 4096

func parseMounts(text string) (mounts []mount, err error) {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	lines := bufio.NewScanner(strings.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || len(rest) < 2 || !strings.HasPrefix(fields[4], "/") {
			return nil, fmt.Errorf("mountinfo: %.200q is no mount", lines.Text())
		}
		m := mount{dev: fields[2], root: unescape.Replace(fields[3]), at: unescape.Replace(fields[4]), fs: rest[0], source: unescape.Replace(rest[1])}
		// What is mounted later at the same place hides the earlier.
		mounts = slices.DeleteFunc(mounts, func(o mount) bool { return o.at == m.at })
		mounts = append(mounts, m)
		if len(mounts) > maxMounts {
			return nil, fmt.Errorf("mountinfo: more than %d mounts", maxMounts)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("mountinfo: %w", err)
	}
	if !slices.ContainsFunc(mounts, func(m mount) bool { return m.at == "/" }) {
		return nil, errors.New("mountinfo: nothing is mounted at /")
	}
	return mounts, nil
}

// A device is what lsblk says of one.
type device struct {
	Name      string   `json:"kname"` // the kernel's, dm-0
	Shown     string   `json:"name"`  // vg0-root
	Dev       string   `json:"maj:min"`
	Type      string   `json:"type"`
	Size      number   `json:"size"`
	FS        string   `json:"fstype"`
	Label     string   `json:"label"`
	Table     string   `json:"pttype"` // of the disk it is, or is on
	PartType  string   `json:"parttype"`
	PartLabel string   `json:"partlabel"`
	Children  []device `json:"children"`

	parent string
	start  int64
}

// A number may be a string: so it is in the JSON of LVM, and of lsblk before 2.33.
type number int64

func (n *number) UnmarshalJSON(b []byte) error {
	b = bytes.Trim(b, `"`)
	if len(b) == 0 || string(b) == "null" {
		return nil
	}
	v, err := strconv.ParseInt(string(b), 10, 64)
	*n = number(v)
	return err
}

// maxDepth bounds how deep devices are nested.
const maxDepth = 16

// parseDevices lists all devices, those on one disk by their place on it.
func parseDevices(lsblk, starts string) (all []device) {
	var report struct{ Blockdevices []device }
	if json.Unmarshal([]byte(lsblk), &report) != nil {
		return nil
	}
	start := make(map[string]int64)
	for line := range strings.Lines(starts) {
		if name, sector, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			start[name], _ = strconv.ParseInt(sector, 10, 64) // 0 is as good as any
		}
	}
	var add func(list []device, parent string, depth int)
	add = func(list []device, parent string, depth int) {
		for _, d := range list {
			d.parent, d.start = parent, start[d.Name]
			children := d.Children
			d.Children = nil
			all = append(all, d)
			if depth < maxDepth {
				add(children, d.Name, depth+1)
			}
		}
	}
	add(report.Blockdevices, "", 0)
	slices.SortStableFunc(all, func(a, b device) int {
		return cmp.Or(cmp.Compare(a.parent, b.parent), cmp.Compare(a.start, b.start))
	})
	return all
}

// probed adds what blkid found on the partitions themselves: without udev lsblk
// knows nothing of what they hold.
func (f *Facts) probed(blkid string) {
	found := make(map[string]string)
	for line := range strings.Lines(blkid + "\n\n") {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			found[key] = value
			continue
		}
		for i := range f.devices {
			d := &f.devices[i]
			if "/dev/"+d.Name == found["DEVNAME"] {
				d.FS, d.Label = cmp.Or(d.FS, found["TYPE"]), cmp.Or(d.Label, found["LABEL"])
				d.PartType, d.PartLabel = cmp.Or(d.PartType, found["PART_ENTRY_TYPE"]), cmp.Or(d.PartLabel, found["PART_ENTRY_NAME"])
			}
		}
		clear(found)
	}
}

// A volume is a logical volume of LVM.
type volume struct {
	Group  string `json:"vg_name"`
	Name   string `json:"lv_name"`
	Size   number `json:"lv_size"`
	Layout string `json:"lv_layout"`
	Major  number `json:"lv_kernel_major"`
	Minor  number `json:"lv_kernel_minor"`
	Origin string `json:"origin"`
	Pool   string `json:"pool_lv"`
}

func (v volume) dev() string { return fmt.Sprintf("%d:%d", v.Major, v.Minor) }

// A volumeGroup is where the volumes' extents come from.
type volumeGroup struct {
	Name   string `json:"vg_name"`
	Free   number `json:"vg_free_count"` // extents
	Extent number `json:"vg_extent_size"`
}

func parseVolumes(lvs, vgs string) (volumes []volume, groups map[string]volumeGroup) {
	var v struct{ Report []struct{ LV []volume } }
	var g struct{ Report []struct{ VG []volumeGroup } }
	if json.Unmarshal([]byte(lvs), &v) != nil || json.Unmarshal([]byte(vgs), &g) != nil {
		return nil, nil
	}
	groups = make(map[string]volumeGroup)
	for _, report := range g.Report {
		for _, group := range report.VG {
			if group.Free >= 0 && group.Extent > 0 {
				groups[group.Name] = group
			}
		}
	}
	for _, report := range v.Report {
		for _, volume := range report.LV {
			if _, known := groups[volume.Group]; known && volume.Size > 0 {
				volumes = append(volumes, volume)
			}
		}
	}
	return volumes, groups
}
