package disklayout

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

const seed = "0b7e5a9c-install-1"

var (
	root = Partition{Name: "root", Size: "*", Type: Linux, FS: Ext4, Mount: "/"}
	esp  = Partition{Name: "esp", Size: "100MiB", Type: ESP, FS: VFAT, Mount: "/boot/efi"}
	boot = Partition{Name: "bios-boot", Size: "1MiB", Type: BIOSBoot}
	swap = Partition{Name: "swap", Size: "256MiB", Type: Swap, FS: SwapFS}
	home = Partition{Name: "home", Size: "20%", Type: Linux, FS: Ext4, Mount: "/home"}
)

func sized(p Partition, size string) Partition { p.Size = size; return p }
func only(p Partition, fw Firmware) Partition  { p.Firmware = fw; return p }

func TestFit(t *testing.T) {
	for _, tt := range []struct {
		name   string
		size   int64
		sector int
		fw     Firmware
		parts  []Partition
		want   [][2]int64 // start, end in MiB
		err    string     // of ErrTooSmall
	}{
		{name: "rest last", size: 1024 * MiB, fw: UEFI, parts: []Partition{esp, root}, want: [][2]int64{{1, 101}, {101, 1023}}},
		{name: "rest first", size: 1024 * MiB, fw: UEFI, parts: []Partition{root, esp}, want: [][2]int64{{1, 923}, {923, 1023}}},
		{name: "rest in the middle", size: 1024 * MiB, fw: UEFI, parts: []Partition{esp, root, swap}, want: [][2]int64{{1, 101}, {101, 767}, {767, 1023}}},
		{name: "no rest leaves the end free", size: 1024 * MiB, fw: UEFI, parts: []Partition{esp, sized(root, "1GB")},
			err: "sda holds 1073741824 bytes, layout needs 1107296256: disk too small"},
		{name: "decimal sizes are rounded up", size: 2048 * MiB, fw: UEFI, parts: []Partition{esp, sized(root, "1GB")}, want: [][2]int64{{1, 101}, {101, 1055}}},
		{name: "percent of the disk", size: 1000 * MiB, fw: UEFI, parts: []Partition{esp, home, root}, want: [][2]int64{{1, 101}, {101, 301}, {301, 999}}},
		{name: "other firmware's partition is left out", size: 1024 * MiB, fw: BIOS,
			parts: []Partition{only(boot, BIOS), only(esp, UEFI), root}, want: [][2]int64{{1, 2}, {2, 1023}}},
		{name: "odd disk size, second GPT in the odd part", size: 1023*MiB + 17*KiB, fw: UEFI, parts: []Partition{esp, root}, want: [][2]int64{{1, 101}, {101, 1023}}},
		{name: "odd disk size, second GPT would not fit there", size: 1023*MiB + 16*KiB, fw: UEFI, parts: []Partition{esp, root}, want: [][2]int64{{1, 101}, {101, 1022}}},
		{name: "sectors of 4096", size: 1023*MiB + 20*KiB, sector: 4096, fw: UEFI, parts: []Partition{esp, root}, want: [][2]int64{{1, 101}, {101, 1023}}},
		{name: "just enough", size: 118 * MiB, fw: UEFI, parts: []Partition{esp, root}, want: [][2]int64{{1, 101}, {101, 117}}},
		{name: "no room for the rest", size: 117 * MiB, fw: UEFI, parts: []Partition{esp, root},
			err: "sda holds 122683392 bytes, layout needs 123731968: disk too small"},
		{name: "much too small", size: 50 * MiB, fw: UEFI, parts: []Partition{esp, root},
			err: "sda holds 52428800 bytes, layout needs 123731968: disk too small"},
		{name: "nothing", size: 0, fw: UEFI, parts: []Partition{esp, root},
			err: "sda holds 0 bytes, layout needs 123731968: disk too small"},
		{name: "percentage too small for its filesystem", size: 1000 * MiB, fw: UEFI, parts: []Partition{esp, sized(home, "1%"), root},
			err: "sda holds 1048576000 bytes, layout needs 1677721600: disk too small"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			disk := Disk{Name: "sda", Path: "/dev/sda", Size: tt.size, SectorSize: tt.sector}
			plan, err := Fit(Layout{Partitions: tt.parts}, []Disk{disk}, tt.fw, seed)
			if tt.err != "" {
				if !errors.Is(err, ErrTooSmall) || err.Error() != tt.err {
					t.Fatalf("Fit: %v, want %s", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got [][2]int64
			for i, p := range plan.Partitions {
				if p.Number != i+1 {
					t.Errorf("partition %s has number %d, want %d", p.Name, p.Number, i+1)
				}
				got = append(got, [2]int64{p.Start / MiB, p.End / MiB})
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Fatalf("Fit: %v, want %v", got, tt.want)
			}
		})
	}
}

// Whatever a layout is said to need is enough.
func TestFitNeeds(t *testing.T) {
	parts := []Partition{boot, esp, swap, sized(home, "37%"), root, {Name: "var", Size: "3%", Type: Linux, FS: Ext4, Mount: "/var"}}
	for size := int64(1); size < 4*GiB; size += 7777777 {
		disk := Disk{Name: "sda", Path: "/dev/sda", Size: size}
		_, err := Fit(Layout{Partitions: parts}, []Disk{disk}, UEFI, seed)
		if err == nil {
			continue
		}
		sizes, err := share(parts, disk)
		if err == nil {
			t.Fatalf("%d bytes: share gives %v", size, sizes)
		}
		_, after, _ := strings.Cut(err.Error(), "layout needs ")
		need, _ := number(strings.TrimSuffix(after, ": disk too small"))
		if need <= size {
			t.Fatalf("%d bytes are said to be less than %d", size, need)
		}
		if _, err := share(parts, Disk{Name: "sda", Size: need}); err != nil {
			t.Fatalf("the needed bytes are not enough: %v", err)
		}
	}
}

func TestFitChoosesDisk(t *testing.T) {
	disks := []Disk{
		{Name: "sdz", Path: "/dev/sdz", Size: GiB, Removable: true},
		{Name: "sr0", Path: "/dev/sr0", Size: GiB, ReadOnly: true},
		{Name: "nvme0n1", Path: "/dev/nvme0n1", Size: GiB},
		{Name: "sda", Path: "/dev/sda", Size: GiB},
	}
	for _, tt := range []struct {
		name, want string
		disks      []Disk
		got, err   string
	}{
		{name: "first fixed", disks: disks, got: "nvme0n1"},
		{name: "by name", want: "sda", disks: disks, got: "sda"},
		{name: "by path", want: "/dev/sda", disks: disks, got: "sda"},
		{name: "removable, when named", want: "sdz", disks: disks, got: "sdz"},
		{name: "unknown", want: "vda", disks: disks, err: "no disk to install on: want vda, there are sdz, sr0 (read-only), nvme0n1, sda"},
		{name: "read-only", want: "sr0", disks: disks, err: "no disk to install on: want sr0, there are sdz, sr0 (read-only), nvme0n1, sda"},
		{name: "none that will do", disks: disks[:2], err: "no disk to install on: there are sdz (removable), sr0 (read-only)"},
		{name: "none at all", err: "no disk to install on: the machine has none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := Fit(Layout{Disk: tt.want, Partitions: []Partition{esp, root}}, tt.disks, UEFI, seed)
			if got := errText(err); got != tt.err || plan.Disk.Name != tt.got {
				t.Fatalf("Fit: disk %q, error %q; want %q, %q", plan.Disk.Name, got, tt.got, tt.err)
			}
		})
	}
}

func TestFitRefuses(t *testing.T) {
	disks := []Disk{{Name: "sda", Path: "/dev/sda", Size: GiB}}
	for _, tt := range []struct {
		name  string
		parts []Partition
		disks []Disk
		fw    Firmware
		err   string
	}{
		{"UEFI without ESP", []Partition{boot, root}, disks, UEFI, "layout: uefi: wants a partition of type esp, there is none"},
		{"BIOS without its partition", []Partition{esp, root}, disks, BIOS, "layout: bios: wants a partition of type bios-boot, there is none"},
		{"firmware", []Partition{esp, root}, disks, "coreboot", `firmware "coreboot": want bios or uefi`},
		{"layout", []Partition{esp}, disks, UEFI, `layout: bios: no partition has the mount "/"`},
		{"sectors", []Partition{esp, root}, []Disk{{Name: "sda", Size: GiB, SectorSize: -1 << 62}}, UEFI, "sda has sectors of -4611686018427387904 bytes: want a power of two from 512 on"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Fit(Layout{Partitions: tt.parts}, tt.disks, tt.fw, seed)
			if errText(err) != tt.err {
				t.Fatalf("Fit: %v, want %s", err, tt.err)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	change := func(p Partition, f func(*Partition)) Partition { f(&p); return p }
	for _, tt := range []struct {
		name  string
		parts []Partition
		err   string
	}{
		{"default", Default().Partitions, ""},
		{"none", nil, "partitions: there are none"},
		{"too many", make([]Partition, 129), "partitions: there are 129, a GPT has room for 128"},
		{"no name", []Partition{esp, sized(Partition{}, "*")}, "partition 2: name: is missing"},
		{"long name", []Partition{change(root, func(p *Partition) { p.Name = strings.Repeat("x", 37) })},
			`partition "` + strings.Repeat("x", 37) + `": name: has 37 characters, a GPT takes 36`},
		{"odd name", []Partition{change(root, func(p *Partition) { p.Name = "a/b" })}, `partition "a/b": name: want letters, digits, '-', '_' and '.' only`},
		{"two of a name", []Partition{esp, root, root}, `partition "root": name: there is another of that name`},
		{"two roots", []Partition{esp, root, change(root, func(p *Partition) { p.Name, p.Size = "root2", "1GiB" })},
			`bios: partition "root2": mount "/": is the mount of "root" already`},
		{"two roots for two firmwares", []Partition{esp, only(root, BIOS), only(change(root, func(p *Partition) { p.Name = "root2" }), UEFI)}, ""},
		{"no root", []Partition{esp, home}, `bios: no partition has the mount "/"`},
		{"no root for one", []Partition{esp, only(root, BIOS)}, `uefi: no partition has the mount "/"`},
		{"type", []Partition{change(root, func(p *Partition) { p.Type = "raid" })}, `partition "root": type "raid": want esp, bios-boot, swap or linux`},
		{"fs", []Partition{change(root, func(p *Partition) { p.FS = "zfs" })}, `partition "root": fs "zfs": type linux wants ext4 or vfat or none`},
		{"esp with ext4", []Partition{change(esp, func(p *Partition) { p.FS = Ext4 }), root}, `partition "esp": fs "ext4": type esp wants vfat`},
		{"swap without", []Partition{change(swap, func(p *Partition) { p.FS = "" }), root}, `partition "swap": fs "": type swap wants swap`},
		{"bios-boot with fs", []Partition{change(boot, func(p *Partition) { p.FS = Ext4 }), root}, `partition "bios-boot": fs "ext4": type bios-boot wants none`},
		{"root on vfat", []Partition{esp, change(root, func(p *Partition) { p.FS = VFAT })}, `partition "root": fs "vfat": the root filesystem wants ext4`},
		{"relative mount", []Partition{change(root, func(p *Partition) { p.Mount = "srv" })}, `partition "root": mount "srv": want an absolute path`},
		{"climbing mount", []Partition{change(root, func(p *Partition) { p.Mount = "/srv/../.." })}, `partition "root": mount "/srv/../..": want it as "/"`},
		{"mount with a space", []Partition{change(root, func(p *Partition) { p.Mount = "/my data" })}, `partition "root": mount "/my data": want no spaces, backslashes or control characters`},
		{"mounted swap", []Partition{change(swap, func(p *Partition) { p.Mount = "/swap" })}, `partition "swap": mount "/swap": there is no filesystem to mount`},
		{"firmware", []Partition{only(root, "efi")}, `partition "root": firmware "efi": want bios, uefi or nothing`},
		{"size", []Partition{sized(root, "8G")}, `partition "root": size "8G": want a number with MiB, GiB or TiB, a percentage, or "*"`},
		{"too small for ext4", []Partition{sized(root, "15MiB")}, `partition "root": size 15MiB: want at least 16 MiB for ext4`},
		{"too small for vfat", []Partition{sized(esp, "10MiB"), root}, `partition "esp": size 10MiB: want at least 32 MiB for vfat`},
		{"two rests", []Partition{esp, sized(home, "*"), root}, `bios: partition "root": size "*": "home" takes the rest already`},
		{"all by percentage", []Partition{esp, sized(home, "50%"), sized(root, "50%")}, "bios: sizes take 100% of the disk, want 99% at the most"},
		{"starts nowhere", []Partition{root}, "no machine could start from it: bios: wants a partition of type bios-boot, there is none; uefi: wants a partition of type esp, there is none"},
		{"ESP without mount", []Partition{change(esp, func(p *Partition) { p.Mount = "" }), root},
			`no machine could start from it: bios: wants a partition of type bios-boot, there is none; uefi: partition "esp": mount: is missing, the loader goes there`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := tt.err
			if want != "" {
				want = "layout: " + want
			}
			if got := errText(Layout{Partitions: tt.parts}.Check()); got != want {
				t.Fatalf("Check: %q, want %q", got, want)
			}
		})
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]Size{
		"*": {Rest: true}, "20%": {Percent: 20}, "1KiB": {Bytes: 1024}, "512MiB": {Bytes: 512 << 20},
		"8 GiB": {Bytes: 8 << 30}, "2TB": {Bytes: 2e12}, "5kB": {Bytes: 5000},
	} {
		if got, err := ParseSize(in); err != nil || got != want {
			t.Errorf("ParseSize(%q): %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "0MiB", "-1MiB", "+1MiB", "1", "1G", "1.5GiB", "%", "0%", "100%", "MiB", "99999999999999999999MiB", "9000000TiB", "**", "1MiB "} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q): %v, want an error", in, got)
		}
	}
}

// The server plans and the agent plans: they must come to the same UUIDs.
func TestFitIsDeterministic(t *testing.T) {
	disks := []Disk{{Name: "vda", Path: "/dev/vda", Size: 8 * GiB}}
	one, _ := Fit(Default(), disks, UEFI, seed)
	two, _ := Fit(Default(), disks, UEFI, seed)
	if !reflect.DeepEqual(one, two) {
		t.Fatalf("two plans differ:\n%v\n%v", one, two)
	}
	other, _ := Fit(Default(), disks, UEFI, "another")
	seen := map[string]bool{}
	for _, plan := range []Plan{one, other} {
		ids := []string{plan.DiskGUID}
		for _, p := range plan.Partitions {
			ids = append(ids, p.PartGUID)
			if p.FS != "" {
				ids = append(ids, p.FSUUID)
			}
		}
		for _, id := range ids {
			if id == "" || seen[id] {
				t.Errorf("identity %q is missing or used twice", id)
			}
			seen[id] = true
		}
	}
}

func TestUUID(t *testing.T) {
	// python3: uuid.uuid5(uuid.UUID('726f6f6b-6572-7940-8d1a-5e0c93b721f6'), 'seed\0disk')
	if got, want := uuid("seed", "disk"), "182ea2ee-9850-5cc3-ab7d-a58b58e255c8"; got != want {
		t.Fatalf("uuid: %s, want %s", got, want)
	}
}

func TestDescribe(t *testing.T) {
	disk := Disk{Name: "nvme0n1", Path: "/dev/nvme0n1", Size: 8 * GiB}
	plan, err := Fit(Default(), []Disk{disk}, UEFI, seed)
	if err != nil {
		t.Fatal(err)
	}
	id := func(n int) string { return plan.Partitions[n-1].FSUUID }
	want := []string{
		"disk nvme0n1: /dev/nvme0n1, 8589934592 bytes (8 GiB), GPT " + plan.DiskGUID,
		"     name         type                 start             end       size  fs    mount",
		"  1  esp          esp                1048576       269484032    256 MiB  vfat  /boot/efi",
		"  2  swap         swap             269484032       537919488    256 MiB  swap",
		"  3  root         linux            537919488      8588886016    7.4 GiB  ext4  /",
		"wipe old signatures",
		"write the partition table",
		"mkfs.vfat -F 32 -i " + strings.ReplaceAll(id(1), "-", "") + " -n ESP /dev/nvme0n1p1",
		"mkswap -U " + id(2) + " -L swap /dev/nvme0n1p2",
		"mke2fs -q -F -t ext4 -O ^metadata_csum_seed,^orphan_file -E lazy_itable_init=1,lazy_journal_init=1 -U " + id(3) + " -L root /dev/nvme0n1p3",
		"mount -t ext4 /dev/nvme0n1p3 at /",
		"mount -t vfat /dev/nvme0n1p1 at /boot/efi",
	}
	if got := plan.Describe(); !reflect.DeepEqual(got, want) {
		t.Fatalf("Describe:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestCommandQuotes(t *testing.T) {
	c := Command{"echo", []string{"it's", "", "a=b"}}
	if got, want := c.String(), `echo 'it'\''s' '' a=b`; got != want {
		t.Fatalf("String: %s, want %s", got, want)
	}
}

func TestDevice(t *testing.T) {
	for path, want := range map[string]string{"/dev/sda": "/dev/sda2", "/dev/loop3": "/dev/loop3p2", "": "2"} {
		if got := (Plan{Disk: Disk{Path: path}}).Device(2); got != want {
			t.Errorf("Device on %q: %s, want %s", path, got, want)
		}
	}
}

func FuzzFit(f *testing.F) {
	f.Add("100MiB", "*", "20%", int64(GiB), 512)
	f.Add("36028797018963968kB", "99%", "1TiB", int64(-5), 4096)
	f.Fuzz(func(t *testing.T, a, b, c string, size int64, sector int) {
		disk := Disk{Name: "sda", Path: "/dev/sda", Size: size, SectorSize: sector}
		plan, err := Fit(Layout{Partitions: []Partition{sized(esp, a), sized(root, b), sized(home, c)}}, []Disk{disk}, UEFI, seed)
		if err != nil {
			return
		}
		at := int64(MiB)
		for _, p := range plan.Partitions {
			if p.Start != at || p.End <= p.Start || p.End%MiB != 0 {
				t.Fatalf("%s from %d to %d, after %d", p.Name, p.Start, p.End, at)
			}
			at = p.End
		}
		if at > size-17*KiB+512 {
			t.Fatalf("plan ends at %d of %d: no room for the second GPT", at, size)
		}
	})
}
