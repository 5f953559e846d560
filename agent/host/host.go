// Package host reads from /sys and /proc what this computer is: its firmware,
// processors, memory, network interfaces and disks.
package host

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"rookery/disklayout"
	"rookery/wire"
)

// Inventory reads the whole machine. sys and proc are the trees of /sys and
// /proc. What a machine does not tell stays empty; an error means that the
// trees themselves cannot be read.
func Inventory(sys, proc fs.FS) (wire.Inventory, error) {
	inv := wire.Inventory{
		UUID:     strings.ToLower(dmi(sys, "product_uuid")),
		Serial:   dmi(sys, "product_serial"),
		Vendor:   dmi(sys, "sys_vendor"),
		Product:  dmi(sys, "product_name"),
		Firmware: Firmware(sys),
		Arch:     runtime.GOARCH,
		CPUs:     cpus(text(sys, "devices/system/cpu/online")),
	}
	meminfo, err := fs.ReadFile(proc, "meminfo")
	if err != nil {
		return inv, fmt.Errorf("memory: %w", err)
	}
	inv.Memory = memory(string(meminfo))
	if inv.NICs, err = NICs(sys); err != nil {
		return inv, err
	}
	inv.Disks, err = Disks(sys)
	return inv, err
}

// Firmware says how the machine was started.
func Firmware(sys fs.FS) disklayout.Firmware {
	if _, err := fs.Stat(sys, "firmware/efi"); err == nil {
		return disklayout.UEFI
	}
	return disklayout.BIOS
}

// NICs lists the wired network interfaces that are real devices, by name.
func NICs(sys fs.FS) ([]wire.NIC, error) {
	names, err := fs.ReadDir(sys, "class/net")
	if err != nil {
		return nil, fmt.Errorf("network interfaces: %w", err)
	}
	var nics []wire.NIC
	for _, entry := range names {
		dir := path.Join("class/net", entry.Name())
		if text(sys, dir, "type") != "1" || !exists(sys, dir, "device") || exists(sys, dir, "phy80211") {
			continue // not Ethernet, a bridge or the like, or wireless
		}
		nic := wire.NIC{
			Name: entry.Name(),
			MAC:  strings.ToLower(text(sys, dir, "address")),
			// Reading carrier of an interface that is down is an error (EINVAL).
			Carrier: text(sys, dir, "carrier") == "1",
		}
		if driver, err := fs.ReadLink(sys, path.Join(dir, "device/driver")); err == nil {
			nic.Driver = path.Base(driver)
		}
		nics = append(nics, nic)
	}
	slices.SortFunc(nics, func(a, b wire.NIC) int { return byKernel(a.Name, b.Name) })
	return nics, nil
}

// notDisks are block devices that are no place for an operating system, or are
// made of other disks.
var notDisks = []string{"loop", "ram", "zram", "sr", "fd", "dm-", "md", "nbd", "mtdblock", "drbd"}

// Disks lists the disks with a medium in them, in the order of their kernel
// names: sda, sdb, ... sdz, sdaa.
func Disks(sys fs.FS) ([]disklayout.Disk, error) {
	names, err := fs.ReadDir(sys, "block")
	if err != nil {
		return nil, fmt.Errorf("disks: %w", err)
	}
	var disks []disklayout.Disk
	for _, entry := range names {
		if disk, ok := disk(sys, entry.Name()); ok {
			disks = append(disks, disk)
		}
	}
	slices.SortFunc(disks, func(a, b disklayout.Disk) int { return byKernel(a.Name, b.Name) })
	return disks, nil
}

func disk(sys fs.FS, name string) (disklayout.Disk, bool) {
	dir := path.Join("block", name)
	switch {
	case slices.ContainsFunc(notDisks, func(prefix string) bool { return strings.HasPrefix(name, prefix) }),
		text(sys, dir, "hidden") == "1", // one path of an NVMe multipath device
		strings.HasPrefix(name, "mmcblk") && (strings.Contains(name, "boot") || strings.Contains(name, "rpmb")):
		return disklayout.Disk{}, false
	}
	// Always in 512 byte units, whatever the sector size.
	size := number(text(sys, dir, "size")) * 512
	if size <= 0 {
		return disklayout.Disk{}, false // a card reader without a card
	}
	return disklayout.Disk{
		Name:       name,
		Path:       "/dev/" + strings.ReplaceAll(name, "!", "/"), // cciss!c0d0
		Size:       size,
		SectorSize: int(number(text(sys, dir, "queue/logical_block_size"))),
		Model:      cmp.Or(text(sys, dir, "device/model"), text(sys, dir, "device/name")),
		Serial:     cmp.Or(text(sys, dir, "serial"), text(sys, dir, "device/serial"), unitSerial(sys, dir)),
		WWN:        cmp.Or(text(sys, dir, "wwid"), text(sys, dir, "device/wwid")),
		Rotational: text(sys, dir, "queue/rotational") == "1",
		Removable:  text(sys, dir, "removable") == "1",
		ReadOnly:   text(sys, dir, "ro") == "1",
	}, true
}

// unitSerial is the serial number of a SCSI or ATA disk, from the vital product
// data page 0x80 (SPC-4, 7.8.13): four bytes of header with the length, then text.
func unitSerial(sys fs.FS, dir string) string {
	page, err := fs.ReadFile(sys, path.Join(dir, "device/vpd_pg80"))
	if err != nil || len(page) < 4 || page[1] != 0x80 {
		return ""
	}
	n := min(int(binary.BigEndian.Uint16(page[2:])), len(page)-4)
	return printable(page[4 : 4+n])
}

// byKernel orders names of one kind as the kernel gave them out.
func byKernel(a, b string) int {
	kind := func(s string) string { return s[:min(len(s), 2)] }
	return cmp.Or(cmp.Compare(kind(a), kind(b)), cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
}

// fillers are what mainboards say when nobody filled the field in.
var fillers = []string{"to be filled by o.e.m.", "default string", "not specified", "not applicable",
	"none", "system serial number", "system product name", "system manufacturer", "0", "0123456789",
	"03000200-0400-0500-0006-000700080009", "00000000-0000-0000-0000-000000000000",
	"ffffffff-ffff-ffff-ffff-ffffffffffff"}

func dmi(sys fs.FS, name string) string {
	s := text(sys, "class/dmi/id", name)
	if slices.Contains(fillers, strings.ToLower(s)) {
		return ""
	}
	return s
}

// cpus counts a list of the kernel: "0-3,8".
func cpus(list string) int {
	total := 0
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		a, errA := strconv.Atoi(first)
		b, errB := strconv.Atoi(last)
		if errA == nil && errB == nil && a <= b {
			total += b - a + 1
		}
	}
	return total
}

// memory is MemTotal of /proc/meminfo, in bytes.
func memory(meminfo string) int64 {
	for line := range strings.Lines(meminfo) {
		if fields := strings.Fields(line); len(fields) >= 2 && fields[0] == "MemTotal:" {
			return number(fields[1]) << 10
		}
	}
	return 0
}

func exists(sys fs.FS, elem ...string) bool {
	_, err := fs.Stat(sys, path.Join(elem...))
	return err == nil
}

// text is what a file of /sys holds, or "".
func text(sys fs.FS, elem ...string) string {
	b, err := fs.ReadFile(sys, path.Join(elem...))
	if err != nil {
		return ""
	}
	return printable(b)
}

// maxText is more than any honest firmware says.
const maxText = 200

// printable keeps firmware's idea of text from reaching a terminal or JSON.
func printable(b []byte) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return ' '
		}
		return r
	}, string(b[:min(len(b), maxText)])))
}

func number(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > 1<<54 { // times 512 it must stay a size
		return 0
	}
	return n
}
