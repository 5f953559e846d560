package loader

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"

	"rookery/disklayout"
)

// loadOption is an EFI_LOAD_OPTION (UEFI 2.10, 3.1.3) that starts file, a path
// with backslashes, from partition esp. The device path is the short form that
// begins with the hard drive node (3.1.2): it stays right when the disk moves
// to another port.
func loadOption(label string, esp disklayout.PlannedPartition, sector int64, file string) ([]byte, error) {
	guid, err := mixedGUID(esp.PartGUID)
	if err != nil {
		return nil, err
	}
	name := ucs2(file)

	// 10.3.5.1 hard drive: media path 4, subtype 1, 42 bytes
	path := []byte{4, 1, 42, 0}
	path = binary.LittleEndian.AppendUint32(path, uint32(esp.Number))
	path = binary.LittleEndian.AppendUint64(path, uint64(esp.Start/sector))
	path = binary.LittleEndian.AppendUint64(path, uint64((esp.End-esp.Start)/sector))
	path = append(path, guid[:]...)
	path = append(path, 2, 2) // a GPT, and its partition's GUID
	// 10.3.5.4 file path: subtype 4
	path = append(path, 4, 4)
	path = binary.LittleEndian.AppendUint16(path, uint16(4+len(name)))
	path = append(path, name...)
	// 10.3.1 end of the entire device path
	path = append(path, 0x7f, 0xff, 4, 0)

	const active = 1
	option := binary.LittleEndian.AppendUint32(nil, active)
	option = binary.LittleEndian.AppendUint16(option, uint16(len(path)))
	option = append(option, ucs2(label)...)
	return append(option, path...), nil
}

// label is the description of a load option, "" when b is none.
func label(b []byte) string {
	var units []uint16
	for at := 6; at+1 < len(b); at += 2 {
		u := binary.LittleEndian.Uint16(b[at:])
		if u == 0 {
			return string(utf16.Decode(units))
		}
		units = append(units, u)
	}
	return ""
}

// ucs2 is s as firmware writes strings, with the final NUL.
func ucs2(s string) []byte {
	var b []byte
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// mixedGUID is a GUID in EFI's byte order: the first three groups little endian.
func mixedGUID(s string) (g [16]byte, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 {
		return g, fmt.Errorf("GUID %q: want 32 hex digits", s)
	}
	slices.Reverse(b[0:4])
	slices.Reverse(b[4:6])
	slices.Reverse(b[6:8])
	copy(g[:], b)
	return g, nil
}

// bootOrder puts entry into order: right after current, what the firmware
// started this time, so that a machine that starts from the network goes on
// doing so; first, when current is unknown.
func bootOrder(order []uint16, current uint16, known bool, entry uint16) []uint16 {
	order = slices.DeleteFunc(slices.Clone(order), func(n uint16) bool { return n == entry })
	at := slices.Index(order, current)
	if !known {
		at = -1
	}
	return slices.Insert(order, at+1, entry)
}
