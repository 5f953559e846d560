package lldp

import (
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"rookery/wire"
)

// What Debian 12's lldpd 1.0.16 sent on a port of a bridge, on 27 Nov 2026, at its
// start and at its end.
const (
	lldpdSpeaks = "0180c200000e52540007000788cc02070452540007000704070352540007000706020078" +
		"0a066c65616630370c086120737769746368" + "0e04009c0004" + "10181102fe80000000000000505400fffe0700070200000002000804" +
		"73777037fe0900120f030100000000fe0900120f01008000" + "00360000"
	lldpdLeaves = "0180c200000e52540007000788cc0207045254000700070407035254000700070602" + "00000000"
)

// tlv is a TLV of a type, with the value's parts.
func tlv(kind int, parts ...string) string {
	value := strings.Join(parts, "")
	return string([]byte{byte(kind<<1 | len(value)>>8), byte(len(value))}) + value
}

// frame is a frame of TLVs, padded as Ethernet does it.
func frame(tlvs ...string) []byte {
	b := []byte("\x01\x80\xc2\x00\x00\x0e" + "\x00\x1b\x54\xc2\x03\x07" + "\x88\xcc" + strings.Join(tlvs, ""))
	return append(b, make([]byte, max(0, 60-len(b)))...)
}

var (
	chassis = tlv(1, "\x04\x00\x1b\x54\xc2\x03\x00")
	port    = tlv(2, "\x05Gi1/0/7")
	ttl     = tlv(3, "\x00\x78")
	end     = tlv(0)
)

func bytesOf(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func TestParse(t *testing.T) {
	const bridge, station = "\x00\x14\x00\x04", "\x00\x80\x00\x80"
	for _, tt := range []struct {
		name        string
		frame       []byte
		switchN, at string
		seconds     int
		station     bool
	}{
		{"lldpd", bytesOf(lldpdSpeaks), "leaf07", "swp7", 120, false},
		{"lldpd that ends", bytesOf(lldpdLeaves), "52:54:00:07:00:07", "52:54:00:07:00:07", 0, false},
		{"Cisco IOS", frame(chassis, port, ttl, tlv(5, "leaf07.example.com"), tlv(6, "Cisco IOS Software, C2960S Software\nCopyright (c) 1986-2015"),
			tlv(4, "to n7"), tlv(7, bridge), tlv(8, "\x05\x01\x0a\x00\x00\x02\x02\x00\x00\x00\x01\x00"), tlv(127, "\x00\x80\xc2\x01\x00\x01"), end),
			"leaf07.example.com", "Gi1/0/7", 120, false},
		{"Juniper, whose ports are numbers", frame(tlv(1, "\x04\x00\x05\x86\x71\x5d\xc0"), tlv(2, "\x07", "517"), ttl, tlv(5, "qfx-r12"), tlv(4, "ge-0/0/7"), tlv(7, bridge), end),
			"qfx-r12", "ge-0/0/7", 120, false},
		{"Extreme, which ends names with NUL", frame(tlv(1, "\x04\x00\x01\x30\xf9\xad\xa0"), tlv(2, "\x051/1"), ttl, tlv(4, "Summit300-48-Port 1001\x00"), tlv(5, "Summit300-48\x00"), end),
			"Summit300-48", "1/1", 120, false},
		{"no name", frame(chassis, port, ttl, end), "00:1b:54:c2:03:00", "Gi1/0/7", 120, false},
		{"an empty name", frame(chassis, port, ttl, tlv(5, ""), tlv(5, "\x00"), end), "00:1b:54:c2:03:00", "Gi1/0/7", 120, false},
		{"a port that is a MAC address", frame(chassis, tlv(2, "\x03\x00\x1b\x54\xc2\x03\x07"), ttl, end), "00:1b:54:c2:03:00", "00:1b:54:c2:03:07", 120, false},
		{"IPv4", frame(tlv(1, "\x05\x01\x0a\x00\x00\x02"), tlv(2, "\x04\x01\x0a\x00\x00\x07"), ttl, end), "10.0.0.2", "10.0.0.7", 120, false},
		{"IPv6", frame(tlv(1, "\x05\x02\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02"), port, ttl, end), "2001:db8::2", "Gi1/0/7", 120, false},
		{"an address of neither", frame(tlv(1, "\x05\x01\x0a\x00"), port, ttl, end), "010a00", "Gi1/0/7", 120, false},
		{"an address of nothing", frame(tlv(1, "\x05\x01"), port, ttl, end), "01", "Gi1/0/7", 120, false},
		{"names of chassis", frame(tlv(1, "\x07rack 7"), tlv(2, "\x01uplink"), ttl, end), "rack 7", "uplink", 120, false},
		{"bytes that are no name", frame(tlv(1, "\x07\x00\xff"), tlv(2, "\x05\x00"), ttl, end), "00ff", "00", 120, false},
		{"a name for a terminal to obey", frame(chassis, port, ttl, tlv(5, "leaf\x1b[2J\u202e\xff7\u0085"), end), "leaf [2J ?7", "Gi1/0/7", 120, false},
		{"a name of another script", frame(chassis, port, ttl, tlv(5, "коммутатор 7"), end), "коммутатор 7", "Gi1/0/7", 120, false},
		{"long ones", frame(tlv(1, "\x07"+strings.Repeat("\xff", 255)), port, ttl, tlv(5, ""), end), strings.Repeat("ff", 127), "Gi1/0/7", 120, false},
		{"a name that is too long", frame(chassis, port, ttl, tlv(5, strings.Repeat("x", 511)), end), strings.Repeat("x", 255), "Gi1/0/7", 120, false},
		{"no end", frame(chassis, port, ttl, tlv(5, "sw"), tlv(127, strings.Repeat("\x00", 40))), "sw", "Gi1/0/7", 120, false},
		{"what follows the end", frame(chassis, port, ttl, end, tlv(5, "another"), "\xff"), "00:1b:54:c2:03:00", "Gi1/0/7", 120, false},
		{"eighteen hours", frame(chassis, port, tlv(3, "\xff\xff"), end), "00:1b:54:c2:03:00", "Gi1/0/7", 65535, false},
		{"another computer", frame(chassis, port, ttl, tlv(5, "pc"), tlv(7, station), end), "pc", "Gi1/0/7", 120, true},
		{"a computer that is a bridge", frame(chassis, port, ttl, tlv(5, "kvm1"), tlv(7, "\x00\x9c\x00\x84"), end), "kvm1", "Gi1/0/7", 120, false},
		{"abilities cut short", frame(chassis, port, ttl, tlv(7, "\x00\x80"), end), "00:1b:54:c2:03:00", "Gi1/0/7", 120, false},
	} {
		f, err := Parse(tt.frame)
		if want := (wire.Neighbor{Switch: tt.switchN, Port: tt.at}); err != nil || f.Neighbor != want || f.TTL != time.Duration(tt.seconds)*time.Second || f.Station != tt.station {
			t.Errorf("%s: %+v, %v; want %+v", tt.name, f, err, tt)
		}
	}

	speaks, _ := Parse(bytesOf(lldpdSpeaks))
	leaves, _ := Parse(bytesOf(lldpdLeaves))
	if speaks.ID == "" || speaks.ID != leaves.ID {
		t.Errorf("the same port is %q and %q", speaks.ID, leaves.ID)
	}
	if other, _ := Parse(frame(chassis, port, ttl, end)); other.ID == speaks.ID {
		t.Errorf("two switches are %q", other.ID)
	}
}

func TestParseRefuses(t *testing.T) {
	good := frame(chassis, port, ttl, end)
	with := func(at int, b ...byte) []byte { return slices.Concat(good[:at], b, good[at+len(b):]) }
	for _, tt := range []struct {
		name, want string
		frame      []byte
	}{
		{"nothing", "0 bytes, want at least 14", nil},
		{"half a header", "13 bytes, want at least 14", good[:13]},
		{"a header alone", "ends within a TLV's header", good[:14]},
		{"half a TLV", "type 1 has 7 bytes, and 3 are left", good[:19]},
		{"half a TLV's header", "ends within a TLV's header", good[:14+9+1]},
		{"another group", "for 01:80:c2:00:00:00, want 01:80:c2:00:00:0e", with(5, 0)},
		{"another protocol", "type 0x88f7, want 0x88cc", with(12, 0x88, 0xf7)},
		{"port first", "TLV 1 has type 2, want chassis", frame(port, chassis, ttl, end)},
		{"no port", "TLV 2 has type 3, want chassis", frame(chassis, ttl, end)},
		{"no TTL", "TLV 3 has type 0, want chassis", frame(chassis, port, end)},
		{"an empty unit", "TLV 1 has type 0, want chassis", frame(end)},
		{"two ports", "type 2 comes twice", frame(chassis, port, ttl, port, end)},
		{"an empty chassis", "have 1, 8 and 2 bytes", frame(tlv(1, "\x04"), port, ttl, end)},
		{"an endless port", "have 7, 257 and 2 bytes", frame(chassis, tlv(2, strings.Repeat("x", 257)), ttl, end)},
		{"a TTL of one byte", "have 7, 8 and 1 bytes", frame(chassis, port, tlv(3, "\x78"), end)},
		{"a name beyond the frame", "type 5 has 511 bytes, and", frame(chassis, port, ttl, "\x0b\xff", "sw")},
	} {
		if f, err := Parse(tt.frame); err == nil || !strings.HasPrefix(err.Error(), "lldp: ") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %+v, %v; want %q", tt.name, f, err, tt.want)
		}
	}
}

func TestAfter(t *testing.T) {
	now := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	at := func(id string, seconds int) Frame {
		return Frame{ID: id, TTL: time.Duration(seconds) * time.Second, Neighbor: wire.Neighbor{Switch: id}}
	}
	pc := at("pc", 120)
	pc.Station = true
	var h heard
	for _, tt := range []struct {
		name  string
		later time.Duration
		frame Frame
		want  string
	}{
		{"another computer", 0, pc, ""},
		{"one leaves that was never heard", 0, at("a", 0), ""},
		{"the first", 0, at("a", 120), "a"},
		{"another one beside it", 30 * time.Second, at("b", 120), "a"},
		{"which leaves", time.Second, at("b", 0), "a"},
		{"it speaks again", 59 * time.Second, at("a", 120), "a"},
		{"its time is not over", 119 * time.Second, at("b", 120), "a"},
		{"its time is over", time.Second, at("b", 120), "b"},
		{"and it is back", time.Second, at("a", 120), "b"},
		{"who is there leaves, and the cable stays", time.Second, at("b", 0), "b"},
		{"then another one is at its end", time.Second, at("a", 120), "a"},
		{"a computer", time.Hour, pc, "a"},
	} {
		now = now.Add(tt.later)
		if h = h.after(tt.frame, now); h.Neighbor.Switch != tt.want {
			t.Fatalf("%s: %q, want %q", tt.name, h.Neighbor.Switch, tt.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(bytesOf(lldpdSpeaks))
	f.Add(bytesOf(lldpdLeaves))
	f.Add(frame(tlv(1, "\x05\x01\x0a\x00\x00\x02"), tlv(2, "\x07\xff"), ttl, tlv(5, "leaf\x1b[2J\xff"), end))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := Parse(b)
		if err != nil {
			return
		}
		if got.ID == "" || got.Neighbor.Switch == "" || got.Neighbor.Port == "" {
			t.Fatalf("without a name: %+v", got)
		}
		for _, s := range []string{got.Neighbor.Switch, got.Neighbor.Port} {
			if len(s) > maxText || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Fatalf("%q is not fit for a hello", s)
			}
		}
	})
}
