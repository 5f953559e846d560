package host

import (
	"io/fs"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/fstest"

	"rookery/disklayout"
	"rookery/wire"
)

// tree makes a /sys or /proc: "path" to content, and "path ->" to a link's target.
func tree(files map[string]string) fstest.MapFS {
	m := fstest.MapFS{}
	for name, content := range files {
		if link, ok := strings.CutSuffix(name, " ->"); ok {
			m[link] = &fstest.MapFile{Data: []byte(content), Mode: fs.ModeSymlink | 0o777}
		} else {
			m[name] = &fstest.MapFile{Data: []byte(content)}
		}
	}
	return m
}

// A QEMU machine with OVMF: one virtio disk, one virtio NIC, as its /sys shows them.
func vm() fstest.MapFS {
	return tree(map[string]string{
		"class/dmi/id/product_uuid":     "8C1F6A5E-0D3B-4F3D-9B8F-0B6B3B9B1A11\n",
		"class/dmi/id/product_serial":   "Not Specified\n",
		"class/dmi/id/sys_vendor":       "QEMU\n",
		"class/dmi/id/product_name":     "Standard PC (i440FX + PIIX, 1996)\n",
		"firmware/efi/fw_platform_size": "64\n",
		"devices/system/cpu/online":     "0-1\n",

		"class/net/lo ->":                                                            "../../devices/virtual/net/lo",
		"class/net/eth0 ->":                                                          "../../devices/pci0000:00/0000:00:02.0/virtio0/net/eth0",
		"devices/virtual/net/lo/type":                                                "772\n",
		"devices/virtual/net/lo/address":                                             "00:00:00:00:00:00\n",
		"devices/pci0000:00/0000:00:02.0/virtio0/net/eth0/type":                      "1\n",
		"devices/pci0000:00/0000:00:02.0/virtio0/net/eth0/address":                   "52:54:00:12:34:56\n",
		"devices/pci0000:00/0000:00:02.0/virtio0/net/eth0/carrier":                   "1\n",
		"devices/pci0000:00/0000:00:02.0/virtio0/net/eth0/device ->":                 "../../../virtio0",
		"devices/pci0000:00/0000:00:02.0/virtio0/driver ->":                          "../../../../bus/virtio/drivers/virtio_net",
		"bus/virtio/drivers/virtio_net/bind":                                         "",
		"block/loop0/size":                                                           "8192\n",
		"block/vda ->":                                                               "../devices/pci0000:00/0000:00:03.0/virtio1/block/vda",
		"devices/pci0000:00/0000:00:03.0/virtio1/block/vda/size":                     "8388608\n",
		"devices/pci0000:00/0000:00:03.0/virtio1/block/vda/ro":                       "0\n",
		"devices/pci0000:00/0000:00:03.0/virtio1/block/vda/removable":                "0\n",
		"devices/pci0000:00/0000:00:03.0/virtio1/block/vda/serial":                   "disk-n1",
		"devices/pci0000:00/0000:00:03.0/virtio1/block/vda/queue/logical_block_size": "512\n",
		"devices/pci0000:00/0000:00:03.0/virtio1/block/vda/queue/rotational":         "1\n",
	})
}

func TestInventory(t *testing.T) {
	proc := tree(map[string]string{"meminfo": "MemTotal:        1014452 kB\nMemFree:          801232 kB\n"})
	got, err := Inventory(vm(), proc)
	if err != nil {
		t.Fatal(err)
	}
	want := wire.Inventory{
		UUID: "8c1f6a5e-0d3b-4f3d-9b8f-0b6b3b9b1a11", Vendor: "QEMU", Product: "Standard PC (i440FX + PIIX, 1996)",
		Firmware: disklayout.UEFI, Arch: got.Arch, CPUs: 2, Memory: 1014452 << 10,
		NICs:  []wire.NIC{{Name: "eth0", MAC: "52:54:00:12:34:56", Driver: "virtio_net", Carrier: true}},
		Disks: []disklayout.Disk{{Name: "vda", Path: "/dev/vda", Size: 4 << 30, SectorSize: 512, Serial: "disk-n1", Rotational: true}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("Inventory:\n got %+v\nwant %+v", got, want)
	}
}

func TestInventoryOfAnEmptyTree(t *testing.T) {
	if _, err := Inventory(fstest.MapFS{}, tree(map[string]string{"meminfo": ""})); err == nil || !strings.Contains(err.Error(), "class/net") {
		t.Fatalf("Inventory of nothing: %v, want an error that names class/net", err)
	}
}

// A server: SATA and SAS disks, NVMe with a hidden path, a card reader without
// a card, a USB stick, a DVD drive, arrays and volumes made of the others.
func TestDisks(t *testing.T) {
	sys := tree(map[string]string{
		"block/sdaa/size": "2000\n",
		"block/sdb/size":  "1000\n", "block/sdb/removable": "1\n", "block/sdb/ro": "1\n",
		"block/sda/size": "7814037168\n", "block/sda/queue/logical_block_size": "512\n", "block/sda/queue/rotational": "1\n",
		"block/sda/device/model":    "ST4000NM0035-1V4\n",
		"block/sda/device/wwid":     "naa.5000c500a1b2c3d4\n",
		"block/sda/device/vpd_pg80": "\x00\x80\x00\x14            ZC12ABCD",
		"block/nvme0n1/size":        "1953525168\n", "block/nvme0n1/queue/logical_block_size": "4096\n",
		"block/nvme0n1/device/model":  "SAMSUNG MZVL21T0HCLR-00B00              \n",
		"block/nvme0n1/device/serial": "S676NX0R123456      \n",
		"block/nvme0n1/wwid":          "eui.002538b111b2c3d4\n",
		"block/nvme0c0n1/size":        "1953525168\n", "block/nvme0c0n1/hidden": "1\n",
		"block/sdc/size": "0\n", "block/sdc/removable": "1\n",
		"block/sr0/size": "2097151\n", "block/md127/size": "10\n", "block/dm-0/size": "10\n",
		"block/zram0/size": "10\n", "block/fd0/size": "8\n", "block/ram0/size": "10\n", "block/mmcblk0boot0/size": "8192\n",
	})
	got, err := Disks(sys)
	if err != nil {
		t.Fatal(err)
	}
	want := []disklayout.Disk{
		{Name: "nvme0n1", Path: "/dev/nvme0n1", Size: 1953525168 * 512, SectorSize: 4096,
			Model: "SAMSUNG MZVL21T0HCLR-00B00", Serial: "S676NX0R123456", WWN: "eui.002538b111b2c3d4"},
		{Name: "sda", Path: "/dev/sda", Size: 7814037168 * 512, SectorSize: 512, Rotational: true,
			Model: "ST4000NM0035-1V4", Serial: "ZC12ABCD", WWN: "naa.5000c500a1b2c3d4"},
		{Name: "sdb", Path: "/dev/sdb", Size: 512000, Removable: true, ReadOnly: true},
		{Name: "sdaa", Path: "/dev/sdaa", Size: 1024000},
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("Disks:\n got %+v\nwant %+v", got, want)
	}
}

func TestHostileSerial(t *testing.T) {
	for _, page := range []string{"", "\x00\x80\xff\xff", "\x00\x80\x00\x04\x1b[2J", "\x00\x83\x00\x01a", "\x00\x80\x00"} {
		sys := tree(map[string]string{"block/sda/device/vpd_pg80": page})
		if got := unitSerial(sys, "block/sda"); strings.ContainsAny(got, "\x1b\x00") {
			t.Errorf("unitSerial(%q) = %q", page, got)
		}
	}
}

func TestCPUs(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-1": 2, "0-3,8": 5, "": 0, "3-1": 0, "x": 0} {
		if got := cpus(list); got != want {
			t.Errorf("cpus(%q) = %d, want %d", list, got, want)
		}
	}
}

// The machine the test runs on can be read as well.
func TestThisMachine(t *testing.T) {
	if _, err := os.Stat("/sys/block"); err != nil {
		t.Skip("no /sys/block here: run the test where /sys is mounted")
	}
	inv, err := Inventory(os.DirFS("/sys"), os.DirFS("/proc"))
	if err != nil {
		t.Fatal(err)
	}
	if inv.CPUs < 1 || inv.Memory < 16<<20 {
		t.Fatalf("this machine has %d CPUs and %d bytes of memory", inv.CPUs, inv.Memory)
	}
	t.Logf("%+v", inv)
}
