package loader

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"rookery/disklayout"
)

// The bytes are laid out by UEFI 2.10 3.1.3, 10.3.1, 10.3.5.1 and 10.3.5.4;
// efibootmgr 17 reads them as
// HD(1,GPT,6af9a8d0-7e2b-4c1d-9a55-0123456789ab,0x800,0x32000)/File(\EFI\debian\grubx64.efi).
const entry = "01000000" + "6200" + // active, 98 bytes of device path
	"72006f006f006b00650072007900" + "0000" + // rookery
	"0401" + "2a00" + "01000000" + "0008000000000000" + "0020030000000000" +
	"d0a8f96a2b7e1d4c9a550123456789ab" + "0202" +
	"0404" + "3400" + "5c004500460049005c00640065006200690061006e005c0067007200750062007800360034002e006500660069000000" +
	"7fff0400"

var espPart = disklayout.PlannedPartition{
	Number: 1, Start: disklayout.MiB, End: 101 * disklayout.MiB, PartGUID: "6AF9A8D0-7E2B-4C1D-9A55-0123456789AB",
}

func TestLoadOption(t *testing.T) {
	got, err := loadOption("rookery", espPart, 512, `\EFI\debian\grubx64.efi`)
	if err != nil {
		t.Fatal(err)
	}
	if hex.EncodeToString(got) != entry {
		t.Fatalf("loadOption:\n%x, want\n%s", got, entry)
	}
	large, err := loadOption("rookery", espPart, 4096, `\EFI\debian\grubx64.efi`)
	if err != nil {
		t.Fatal(err)
	}
	if want := "0001000000000000" + "0064000000000000"; !strings.Contains(hex.EncodeToString(large), want) {
		t.Fatalf("with sectors of 4096: %x, want %s in it", large, want)
	}
	if _, err := loadOption("x", disklayout.PlannedPartition{PartGUID: "6AF9"}, 512, "x"); err == nil {
		t.Fatal("a short GUID is taken")
	}
}

// The first two begin as entries of OVMF and of a shell on it do.
func TestLabel(t *testing.T) {
	for in, want := range map[string]string{
		"010000005e007300680065006c006c00000004012a00":                                                     "shell",
		"010000002c00450046004900200049006e007400650072006e0061006c0020005300680065006c006c00000004071400": "EFI Internal Shell",
		"":                                 "",
		"01000000":                         "",
		"010000005e0073":                   "",
		"010000005e007300680065006c006c00": "", // no end
	} {
		b, err := hex.DecodeString(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := label(b); got != want {
			t.Errorf("label(%s): %q, want %q", in, got, want)
		}
	}
}

func FuzzLabel(f *testing.F) {
	b, _ := hex.DecodeString(entry)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) { label(b) })
}

func TestBootOrder(t *testing.T) {
	for _, tt := range []struct {
		name    string
		order   []uint16
		current uint16
		known   bool
		want    []uint16
	}{
		{"after the network", []uint16{6, 1, 2}, 6, true, []uint16{6, 9, 1, 2}},
		{"after one in the middle", []uint16{6, 1, 2}, 1, true, []uint16{6, 1, 9, 2}},
		{"current is not in the order", []uint16{1, 2}, 6, true, []uint16{9, 1, 2}},
		{"current is unknown", []uint16{0, 1}, 0, false, []uint16{9, 0, 1}},
		{"empty", nil, 6, true, []uint16{9}},
		{"moved", []uint16{9, 6, 1}, 6, true, []uint16{6, 9, 1}},
	} {
		if got := bootOrder(tt.order, tt.current, tt.known, 9); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestSetEntry(t *testing.T) {
	option, _ := hex.DecodeString(entry)
	longer, err := loadOption(Label, espPart, 512, `\EFI\a-much-longer-name\grubx64.efi`)
	if err != nil {
		t.Fatal(err)
	}
	vars := nvram(t.TempDir())
	other, _ := loadOption("UEFI PXEv4", espPart, 512, `\x`)
	set := func(name string, value []byte) {
		t.Helper()
		if err := vars.write(name, value); err != nil {
			t.Fatal(err)
		}
	}
	set("Boot0000", other)
	set("Boot0001", longer)
	set("Boot0002", other)
	set("BootOrder", []byte{1, 0, 2, 0, 0, 0})
	set("BootCurrent", []byte{2, 0})
	if err := os.WriteFile(filepath.Join(string(vars), "BootXYZ1"+global), []byte("no number"), 0o644); err != nil {
		t.Fatal(err)
	}

	for range 2 { // a second installation changes nothing more
		n, err := vars.setEntry(option)
		if err != nil || n != 1 {
			t.Fatalf("setEntry: %d, %v; want 1", n, err)
		}
		if b, _ := os.ReadFile(vars.path("Boot0001")); !bytes.Equal(b, append([]byte{7, 0, 0, 0}, option...)) {
			t.Errorf("entry: %x", b)
		}
		if order, _ := vars.numbers("BootOrder"); !reflect.DeepEqual(order, []uint16{2, 1, 0}) {
			t.Errorf("order: %v, want [2 1 0]", order)
		}
	}
	if b, _ := vars.read("Boot0000"); !bytes.Equal(b, other) {
		t.Error("another's entry was changed")
	}
	if _, err := nvram(filepath.Join(string(vars), "none")).setEntry(option); err == nil {
		t.Error("setEntry without efivarfs gives no error")
	}
}
