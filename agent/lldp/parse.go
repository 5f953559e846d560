package lldp

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"rookery/wire"
)

// A Frame is what a neighbor says of itself.
type Frame struct {
	ID       string        // what no other port of any switch has
	TTL      time.Duration // how long it is true; 0: the neighbor takes its leave
	Neighbor wire.Neighbor
	Station  bool // it is no switch, as it says
}

// The group that no switch forwards, of three (IEEE 802.1AB-2016, 7.1): who is heard
// by it is at the other end of the cable.
var group = [6]byte{0x01, 0x80, 0xc2, 0, 0, 0x0e}

const etherType = 0x88cc

// Types of TLVs (8.4), and values in them.
const (
	endTLV          = 0
	chassisTLV      = 1
	portTLV         = 2
	ttlTLV          = 3
	descriptionTLV  = 4 // of the port
	nameTLV         = 5 // of the system
	capabilitiesTLV = 7

	chassisMAC    = 4
	portMAC       = 3
	portInterface = 5    // its name
	stationOnly   = 0x80 // of the enabled capabilities
)

// Parse reads an Ethernet frame. What comes after the end of its TLVs is padding.
func Parse(frame []byte) (Frame, error) {
	const header = 14
	switch {
	case len(frame) < header:
		return Frame{}, fmt.Errorf("lldp: %d bytes, want at least %d", len(frame), header)
	case [6]byte(frame) != group:
		return Frame{}, fmt.Errorf("lldp: for %s, want %s", net.HardwareAddr(frame[:6]), net.HardwareAddr(group[:]))
	case binary.BigEndian.Uint16(frame[12:]) != etherType:
		return Frame{}, fmt.Errorf("lldp: type %#04x, want %#04x", binary.BigEndian.Uint16(frame[12:]), etherType)
	}
	f, err := parse(frame[header:])
	if err != nil {
		return Frame{}, fmt.Errorf("lldp: %w", err)
	}
	return f, nil
}

func parse(unit []byte) (f Frame, err error) {
	var first [3][]byte
	for i := range first {
		var kind int
		if kind, first[i], unit, err = next(unit); err != nil {
			return f, err
		}
		if kind != chassisTLV+i {
			return f, fmt.Errorf("TLV %d has type %d, want chassis, port and TTL, in this order", i+1, kind)
		}
	}
	chassis, port, ttl := first[0], first[1], first[2]
	if most := max(len(chassis), len(port)); min(len(chassis), len(port)) < 2 || most > 256 || len(ttl) != 2 {
		return f, fmt.Errorf("chassis, port and TTL have %d, %d and %d bytes, want 2 to 256, 2 to 256 and 2", len(chassis), len(port), len(ttl))
	}
	var name, description string
	for len(unit) > 0 {
		var kind int
		var value []byte
		if kind, value, unit, err = next(unit); err != nil {
			return f, err
		}
		switch kind {
		case endTLV:
			unit = nil
		case chassisTLV, portTLV, ttlTLV:
			return f, fmt.Errorf("type %d comes twice", kind)
		case descriptionTLV:
			description = text(value)
		case nameTLV:
			name = text(value)
		case capabilitiesTLV:
			f.Station = len(value) == 4 && binary.BigEndian.Uint16(value[2:]) == stationOnly
		}
	}
	f.ID = hex.EncodeToString(chassis) + " " + hex.EncodeToString(port)
	f.TTL = time.Duration(binary.BigEndian.Uint16(ttl)) * time.Second
	f.Neighbor = wire.Neighbor{Switch: cmp.Or(name, id(chassis, chassisMAC)), Port: id(port, portMAC)}
	if port[0] != portInterface { // some number then, that no cable is labelled with
		f.Neighbor.Port = cmp.Or(description, f.Neighbor.Port)
	}
	return f, nil
}

// next takes one TLV off a unit: 7 bits of type, 9 of length.
func next(unit []byte) (kind int, value, rest []byte, err error) {
	if len(unit) < 2 {
		return 0, nil, nil, fmt.Errorf("ends within a TLV's header")
	}
	head, rest := int(binary.BigEndian.Uint16(unit)), unit[2:]
	kind, length := head>>9, head&0x1ff
	if length > len(rest) {
		return 0, nil, nil, fmt.Errorf("type %d has %d bytes, and %d are left", kind, length, len(rest))
	}
	return kind, rest[:length], rest[length:], nil
}

// id is a chassis or port for people. Of both, what is MAC addresses is followed by
// addresses of a network, after a byte that says of which (RFC 3232): 1 IPv4, 2 IPv6.
func id(value []byte, mac byte) string {
	kind, value := value[0], value[1:]
	switch {
	case kind == mac && len(value) == 6:
		return net.HardwareAddr(value).String()
	case kind == mac+1:
		if addr, ok := netip.AddrFromSlice(value[1:]); ok {
			return addr.String()
		}
	}
	if s := text(value); s == string(bytes.TrimRight(value, "\x00")) && s != "" {
		return s
	}
	return hex.EncodeToString(value[:min(len(value), maxText/2)])
}

// maxText is what the standard allows for a name, in bytes.
const maxText = 255

// text is what a switch says, fit for a line of a terminal. Some end it with a NUL.
func text(value []byte) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r == utf8.RuneError {
			return '?'
		}
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, string(value[:min(len(value), maxText)])))
}
