package capture

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"rookery/disklayout"
	"rookery/image/tree"
)

// lsblk writes what lsblk -J says of disks with one partition a line:
//
//	NAME MAJ:MIN SIZE(MiB) FSTYPE LABEL PARTTYPE PARTLABEL; - is nothing
func lsblk(table string, disks map[string]string) string {
	var all []map[string]any
	for disk, lines := range disks {
		var parts []map[string]any
		for line := range strings.Lines(lines) {
			w := strings.Fields(strings.ReplaceAll(line, "-", "\x00"))
			for i := range w {
				if w[i] == "\x00" {
					w[i] = ""
				}
				w[i] = strings.ReplaceAll(w[i], "\x00", "-")
			}
			if len(w) < 7 {
				continue
			}
			var mib int64
			fmt.Sscan(w[2], &mib)
			parts = append(parts, map[string]any{"name": w[0], "kname": w[0], "maj:min": w[1], "type": "part", "size": mib << 20,
				"fstype": w[3], "label": w[4], "parttype": w[5], "partlabel": w[6], "pttype": table})
		}
		all = append(all, map[string]any{"name": disk, "kname": disk, "maj:min": "8:0", "type": "disk", "size": "107374182400", "children": parts})
	}
	b, _ := json.Marshal(map[string]any{"blockdevices": all})
	return string(b)
}

const (
	espType   = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	swapType  = "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"
	linuxType = "0fc63daf-8483-4772-8e79-3d69d8477de4"
)

// mounted writes a mountinfo, of "MAJ:MIN ROOT MOUNT FS SOURCE".
func mounted(lines ...string) string {
	var b strings.Builder
	for i, line := range lines {
		w := strings.Fields(line)
		fmt.Fprintf(&b, "%d 1 %s %s %s rw,relatime shared:1 - %s %s rw\n", i+20, w[0], w[1], w[2], w[3], w[4])
	}
	return b.String()
}

// answers is what a client prints.
func answers(raw map[string]string) string {
	var b strings.Builder
	for name, text := range raw {
		fmt.Fprintf(&b, "\nmark %s\n%s\n", name, text)
	}
	return b.String()
}

func parsed(t *testing.T, raw map[string]string) Facts {
	t.Helper()
	f, err := parseFacts(answers(raw), "mark")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestLayout(t *testing.T) {
	uefi := "sda1 8:1 512 vfat - " + espType + " EFI_System\nsda2 8:2 953 ext4 - " + linuxType + " -\n" +
		"sda3 8:3 4096 swap swap0 " + swapType + " -\nsda4 8:4 60000 ext4 root " + linuxType + " -\n"
	uefiMounts := []string{"8:4 / / ext4 /dev/sda4", "8:2 / /boot ext4 /dev/sda2", "8:1 / /boot/efi vfat /dev/sda1", "0:5 / /dev devtmpfs udev"}
	for _, tt := range []struct {
		name, firmware, table string
		disks                 map[string]string
		mounts                []string
		want                  []string // NAME SIZE TYPE FS MOUNT
		err                   string
	}{
		{name: "UEFI", firmware: "uefi", table: "gpt", disks: map[string]string{"sda": uefi}, mounts: uefiMounts,
			want: []string{"EFI_System 512MiB esp vfat /boot/efi", "boot 953MiB linux ext4 /boot", "swap0 4096MiB swap swap ", "root * linux ext4 /"}},
		{name: "BIOS with an MBR", firmware: "bios", table: "dos",
			disks:  map[string]string{"sda": "sda1 8:1 20000 ext4 - 0x83 -\nsda2 8:2 1 - - 0x5 -\nsda5 8:5 975 swap - 0x82 -\n"},
			mounts: []string{"8:1 / / ext4 /dev/sda1"},
			want:   []string{"bios-boot 1MiB bios-boot  ", "root * linux ext4 /", "swap 975MiB swap swap "}},
		{name: "home is larger", firmware: "bios", table: "gpt",
			disks:  map[string]string{"vda": "vda1 8:1 20000 ext4 - 0x83 -\nvda2 8:2 70000 ext4 - 0x83 -\n"},
			mounts: []string{"8:1 / / ext4 /dev/vda1", "8:2 / /home ext4 /dev/vda2"},
			want:   []string{"bios-boot 1MiB bios-boot  ", "root 20000MiB linux ext4 /", "home * linux ext4 /home"}},
		{name: "labels that are no names, and the same twice", firmware: "bios", table: "gpt",
			disks:  map[string]string{"vda": "vda1 8:1 200 ext4 my/disk 0x83 data\nvda2 8:2 300 ext4 data 0x83 -\n"},
			mounts: []string{"8:2 / / ext4 /dev/vda2", "8:1 / /x ext4 /dev/vda1"},
			want:   []string{"bios-boot 1MiB bios-boot  ", "data 200MiB linux ext4 /x", "vda2 * linux ext4 /"}},

		{name: "xfs", firmware: "bios", table: "gpt", disks: map[string]string{"sda": "sda1 8:1 200 xfs - 0x83 -\n"},
			mounts: []string{"8:1 / / xfs /dev/sda1"}, err: "the root filesystem is xfs, a layout takes ext4"},
		{name: "another disk", firmware: "bios", table: "gpt",
			disks:  map[string]string{"sda": "sda1 8:1 200 ext4 - 0x83 -\n", "sdb": "sdb1 8:17 200 ext4 - 0x83 -\n"},
			mounts: []string{"8:1 / / ext4 /dev/sda1", "8:17 / /srv ext4 /dev/sdb1"}, err: "/srv is on sdb, a layout takes one disk and / is on sda"},
		{name: "Windows beside it", firmware: "bios", table: "gpt", disks: map[string]string{"sda": "sda1 8:1 200 ntfs - 0x7 -\nsda2 8:2 300 ext4 - 0x83 -\n"},
			mounts: []string{"8:2 / / ext4 /dev/sda2"}, err: "sda1: holds ntfs, which a layout does not know"},
		{name: "UEFI without its partition mounted", firmware: "uefi", table: "gpt", disks: map[string]string{"sda": uefi}, mounts: uefiMounts[:2], err: "mount: is missing, the loader goes there"},
		{name: "a root on nothing", firmware: "uefi", table: "gpt", disks: map[string]string{"sda": uefi}, mounts: []string{"0:9 / / ext4 /dev/root"}, err: "/dev/root, which lsblk does not know"},
		{name: "no lsblk", firmware: "uefi", mounts: uefiMounts, err: "lsblk says nothing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			raw := map[string]string{"firmware": tt.firmware, "mountinfo": mounted(tt.mounts...)}
			if tt.disks != nil {
				raw["lsblk"] = lsblk(tt.table, tt.disks)
			}
			l, err := parsed(t, raw).Layout()
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("%+v, %v, want the error %q", l, err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range l.Partitions {
				got = append(got, fmt.Sprintf("%s %s %s %s %s", p.Name, p.Size, p.Type, p.FS, p.Mount))
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
			if _, err := disklayout.Fit(l, []disklayout.Disk{{Name: "sda", Path: "/dev/sda", Size: 200 << 30}}, disklayout.Firmware(tt.firmware), "seed"); err != nil {
				t.Errorf("on another disk: %v", err)
			}
		})
	}
}

// Without udev it is blkid that knows what partitions hold.
func TestLayoutWithoutUdev(t *testing.T) {
	f := parsed(t, map[string]string{"firmware": "bios", "mountinfo": mounted("254:2 / / ext4 /dev/vda2"),
		"lsblk": `{"blockdevices": [{"name":"vda", "kname":"vda", "maj:min":"254:0", "type":"disk", "size":536870912, "fstype":null, "children": [
			{"name":"vda1", "kname":"vda1", "maj:min":"254:1", "type":"part", "size":1048576, "fstype":null, "parttype":null},
			{"name":"vda2", "kname":"vda2", "maj:min":"254:2", "type":"part", "size":535822336, "fstype":null, "parttype":null}]}]}`,
		"blkid": "\nDEVNAME=/dev/vda1\nPART_ENTRY_SCHEME=gpt\nPART_ENTRY_TYPE=21686148-6449-6e6f-744e-656564454649\n" +
			"\nDEVNAME=/dev/vda2\nLABEL=golden-root\nTYPE=ext4\nUSAGE=filesystem\nPART_ENTRY_TYPE=" + linuxType})
	l, err := f.Layout()
	want := disklayout.Layout{Partitions: []disklayout.Partition{
		{Name: "bios-boot", Size: "1MiB", Type: disklayout.BIOSBoot},
		{Name: "golden-root", Size: "*", Type: disklayout.Linux, FS: disklayout.Ext4, Mount: "/"},
	}}
	if err != nil || !reflect.DeepEqual(l, want) {
		t.Errorf("%+v, %v, want %+v", l, err, want)
	}
}

// The disks of LVM, as Debian's installer makes them.
func TestLayoutOfLVM(t *testing.T) {
	f := parsed(t, map[string]string{"firmware": "bios", "mountinfo": mounted("253:0 / / ext4 /dev/mapper/vg0-root"), "lsblk": `{"blockdevices": [
		{"name":"sda", "kname":"sda", "maj:min":"8:0", "type":"disk", "size":"1000", "children": [
			{"name":"sda1", "kname":"sda1", "maj:min":"8:1", "type":"part", "size":"900", "fstype":"LVM2_member", "children": [
				{"name":"vg0-root", "kname":"dm-0", "maj:min":"253:0", "type":"lvm", "size":null}]}]}]}`})
	if _, err := f.Layout(); err == nil || err.Error() != "the root filesystem is on lvm vg0-root, a layout takes partitions" {
		t.Errorf("layout: %v", err)
	}
}

func TestPlan(t *testing.T) {
	lvs := `{"report":[{"lv":[
		{"vg_name":"vg0","lv_name":"root","lv_size":"4194304000","lv_layout":"linear","lv_kernel_major":"253","lv_kernel_minor":"0","origin":"","pool_lv":""},
		{"vg_name":"vg0","lv_name":"srv","lv_size":"41943040","lv_layout":"linear","lv_kernel_major":"253","lv_kernel_minor":"1","origin":"","pool_lv":""},
		{"vg_name":"vg0","lv_name":"thin","lv_size":"41943040","lv_layout":"thin,sparse","lv_kernel_major":"253","lv_kernel_minor":"2","origin":"","pool_lv":"pool"},
		{"vg_name":"full","lv_name":"x","lv_size":"41943040","lv_layout":"linear","lv_kernel_major":"253","lv_kernel_minor":"3","origin":"","pool_lv":""},
		{"vg_name":"vg0","lv_name":"old","lv_size":"41943040","lv_layout":"linear","lv_kernel_major":"253","lv_kernel_minor":"4","origin":"srv","pool_lv":""}]}]}`
	vgs := `{"report":[{"vg":[{"vg_name":"vg0","vg_free_count":"200","vg_extent_size":"4194304"},{"vg_name":"full","vg_free_count":"0","vg_extent_size":"4194304"}]}]}`
	f := parsed(t, map[string]string{"firmware": "bios", "lvs": lvs, "vgs": vgs,
		"subvolumes": "at /@home /home\nID 257 gen 9 top level 256 path @home/nested\nID 258 gen 9 top level 256 path @home/seen\n",
		"mountinfo": mounted("253:0 / / ext4 /dev/mapper/vg0-root", "253:1 / /srv xfs /dev/mapper/vg0-srv", "253:2 / /thin ext4 /dev/mapper/vg0-thin",
			"253:3 / /full ext4 /dev/mapper/full-x", "253:4 / /old ext4 /dev/mapper/vg0-old", "0:30 /@home /home btrfs /dev/sdb1", "0:30 /@home/seen /home/seen btrfs /dev/sdb1",
			"8:1 / /boot ext4 /dev/sda1", "253:1 /sub /bound xfs /dev/mapper/vg0-srv", `8:1 / /again\040here ext4 /dev/sda1`,
			"0:40 / /mnt/nfs nfs4 server:/export", "0:5 / /proc proc proc", "0:6 / /run tmpfs tmpfs", "0:7 / /run/user/0 ext4 /dev/sdz", "7:0 / /snap/x/1 squashfs /dev/loop0")})
	p := NewPlan(f, tree.Builtin(), true)
	want := []string{
		"/ (ext4): LVM snapshot of vg0/root in 100 extents",
		"/again here (ext4): live, neither on LVM nor btrfs",
		"/full (ext4): live, volume group full has no free extents",
		"/home (btrfs): btrfs snapshot",
		"/home/seen (btrfs): btrfs snapshot",
		"/old (ext4): live, is a snapshot itself",
		"/srv (xfs): LVM snapshot of vg0/srv in 12 extents",
		"/thin (ext4): LVM snapshot of vg0/thin in its pool",
		"/mnt/nfs (nfs4) stays out", "/run/user/0 (ext4) stays out", "/snap/x/1 (squashfs) stays out",
		"/boot stays out: it is in /again here already", "/bound stays out: it is in /srv already",
		"/home/nested stays out: it is a subvolume of its own and not mounted",
	}
	if got := p.Describe(); !reflect.DeepEqual(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if rules := strings.Join(p.rules, "\n"); !strings.Contains(rules, "- /bound/*\n") || !strings.Contains(rules, "- /mnt/nfs/*\n") || strings.Contains(rules, "- /home/*") {
		t.Errorf("rules:\n%s", rules)
	}
	for _, part := range NewPlan(f, tree.Builtin(), false).parts {
		if part.how != live || part.why != "no snapshots are wanted" {
			t.Errorf("without snapshots: %s: %s, %s", part.at, part.how, part.why)
		}
	}
}

func TestChanged(t *testing.T) {
	got := changed(".d..t...... ./\n>f.st...... var/log/a b\n.d..t...... var/log/\ncd+++++++++ new/\n*deleting   gone\n.f....o.... owned\nnoise\n")
	want := []string{"/var/log/a b", "/new/", "/gone (gone)", "/owned"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestProgress(t *testing.T) {
	var done, total int64
	w := progressOf(func(d, n int64) { done, total = d, n })
	fmt.Fprint(w, "\r              0   0%    0.00kB/s    0:00:00 \r        1048576  25%    1.00MB/s    0:00:03  (xfr#1, to-chk=2/5)")
	if done != 1<<20 || total != 4<<20 {
		t.Errorf("%d of %d, want 1 MiB of 4 MiB", done, total)
	}
}

func FuzzFacts(f *testing.F) {
	f.Add(answers(map[string]string{"firmware": "bios", "mountinfo": mounted("8:1 / / ext4 /dev/sda1"), "lsblk": lsblk("gpt", map[string]string{"sda": "sda1 8:1 200 ext4 - 0x83 -\n"})}))
	f.Add(answers(map[string]string{"firmware": "uefi", "mountinfo": mounted("0:30 /@ / btrfs /dev/sda1"), "starts": "sda1 2048",
		"subvolumes": "at /@ /\nID 257 gen 9 top level 256 path @/x",
		"lvs":        `{"report":[{"lv":[{"vg_name":"v","lv_name":"l","lv_size":"1"}]}]}`, "vgs": `{"report":[{"vg":[{"vg_name":"v","vg_free_count":"9","vg_extent_size":"1"}]}]}`}))
	f.Fuzz(func(t *testing.T, text string) {
		facts, err := parseFacts(text, "mark")
		if err != nil {
			return
		}
		if l, err := facts.Layout(); err == nil && l.Check() != nil {
			t.Errorf("a layout that does not hold: %+v", l)
		}
		p := NewPlan(facts, tree.Builtin(), true)
		p.Describe()
		p.script("mark", "name")
		changed(text)
		stat(text, "Number of files")
	})
}
