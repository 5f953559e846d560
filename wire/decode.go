package wire

import (
	"fmt"
	"net"
	"strings"

	"rookery/disklayout"
)

// Bounds of what one machine may say of itself.
const (
	maxNICs   = 256
	maxDisks  = 4096
	maxText   = 256  // bytes of one word of the inventory
	maxLine   = 4096 // bytes of an event's text
	maxEvents = 1024 // in one request
)

// DecodeHello decodes and checks a hello.
func DecodeHello(b []byte) (Hello, error) {
	var h Hello
	if err := bounded(b, MaxHello, &h); err != nil {
		return Hello{}, fmt.Errorf("hello: %w", err)
	}
	if err := h.check(); err != nil {
		return Hello{}, fmt.Errorf("hello: %w", err)
	}
	return h, nil
}

func (h Hello) check() error {
	if !isHex(h.Boot, 32) {
		return fmt.Errorf("boot: %.80q is not 32 hex digits", h.Boot)
	}
	i := h.Inventory
	if i.Firmware != disklayout.BIOS && i.Firmware != disklayout.UEFI {
		return fmt.Errorf("inventory.firmware: %.80q is neither bios nor uefi", string(i.Firmware))
	}
	if len(i.NICs) == 0 || len(i.NICs) > maxNICs {
		return fmt.Errorf("inventory.nics: %d, want 1 to %d", len(i.NICs), maxNICs)
	}
	if len(i.Disks) > maxDisks {
		return fmt.Errorf("inventory.disks: %d, want at most %d", len(i.Disks), maxDisks)
	}
	words := []string{i.UUID, i.Serial, i.Vendor, i.Product, i.Arch}
	for _, n := range i.NICs {
		mac, err := net.ParseMAC(n.MAC)
		if err != nil || mac.String() != n.MAC {
			return fmt.Errorf("inventory.nics: %.80q is not a MAC address in lower case with colons", n.MAC)
		}
		words = append(words, n.Name, n.Driver, n.Address)
		if at := n.Neighbor; at != nil {
			if at.Switch == "" {
				return fmt.Errorf("inventory.nics: %s: neighbor: switch is missing", n.MAC)
			}
			words = append(words, at.Switch, at.Port)
		}
	}
	for _, d := range i.Disks {
		if d.Size < 0 {
			return fmt.Errorf("inventory.disks: %.80q has %d bytes", d.Name, d.Size)
		}
		words = append(words, d.Name, d.Path, d.Model, d.Serial, d.WWN)
	}
	for _, w := range words {
		if len(w) > maxText || hasControl(w) {
			return fmt.Errorf("inventory: %.80q is longer than %d bytes or has control characters", w, maxText)
		}
	}
	return nil
}

// DecodeWelcome decodes and checks the answer to a hello.
func DecodeWelcome(b []byte) (Welcome, error) {
	var w Welcome
	if err := bounded(b, MaxHello, &w); err != nil {
		return Welcome{}, fmt.Errorf("welcome: %w", err)
	}
	switch w.Do {
	case Wait, Install, Local:
		return w, nil
	}
	return Welcome{}, fmt.Errorf("welcome: do: %.80q is not one of wait, install, local", string(w.Do))
}

// DecodeTree decodes and checks the answer to who asks for an image's files.
func DecodeTree(b []byte) (Tree, error) {
	var t Tree
	if err := bounded(b, MaxHello, &t); err != nil {
		return Tree{}, fmt.Errorf("tree: %w", err)
	}
	// It becomes a word of a command line, and a part of a path.
	if strings.Trim(t.Module, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return Tree{}, fmt.Errorf("tree: module: %.80q: want letters a-z and digits", t.Module)
	}
	for _, port := range []int{t.Port, t.TLSPort, t.SSHPort} {
		if port < 0 || port > 65535 {
			return Tree{}, fmt.Errorf("tree: port %d: want 0 to 65535", port)
		}
	}
	return t, nil
}

// DecodeEvents decodes and checks one request's events.
func DecodeEvents(b []byte) ([]Event, error) {
	var events []Event
	if err := bounded(b, MaxEvents, &events); err != nil {
		return nil, fmt.Errorf("events: %w", err)
	}
	if len(events) > maxEvents {
		return nil, fmt.Errorf("events: %d in one request, at most %d are taken", len(events), maxEvents)
	}
	for _, e := range events {
		if err := e.check(); err != nil {
			return nil, fmt.Errorf("events: %w", err)
		}
	}
	return events, nil
}

func (e Event) check() error {
	if !isHex(e.Boot, 32) {
		return fmt.Errorf("boot: %.80q is not 32 hex digits", e.Boot)
	}
	if e.Seq < 1 {
		return fmt.Errorf("seq: %d, want 1 or more", e.Seq)
	}
	if Order(e.Phase) < 0 {
		return fmt.Errorf("phase: %.80q is not a phase", string(e.Phase))
	}
	switch e.State {
	case Started, Progress, Finished, Failed, Log, Switched:
	default:
		return fmt.Errorf("state: %.80q is not a state", string(e.State))
	}
	if len(e.Text) > maxLine {
		return fmt.Errorf("text: %d bytes, at most %d are taken", len(e.Text), maxLine)
	}
	if t := e.Fetch; t != nil && min(t.Total, t.Done, t.FromServer, t.FromPeers, t.Uploaded, t.Rate, int64(t.Peers)) < 0 {
		return fmt.Errorf("fetch: negative number in %+v", *t)
	}
	return nil
}

// Phases are all phases in the order of an installation.
var Phases = []Phase{
	PhaseBoot, PhaseNetwork, PhaseHello, PhaseScript, PhasePlan, PhasePartition,
	PhaseFetch, PhaseFixup, PhaseLoader, PhaseLinger, PhaseEnd,
}

// Order is the place of p in an installation, from 0; -1 for an unknown phase.
func Order(p Phase) int {
	for i, known := range Phases {
		if p == known {
			return i
		}
	}
	return -1
}

func bounded(b []byte, most int, v any) error {
	if len(b) > most {
		return fmt.Errorf("%d bytes, at most %d are read", len(b), most)
	}
	return Strict(b, v)
}

// DecodeWant decodes and checks what a node wants.
func DecodeWant(b []byte) (Want, error) {
	var w Want
	if err := bounded(b, MaxWant, &w); err != nil {
		return Want{}, fmt.Errorf("want: %w", err)
	}
	if err := w.check(); err != nil {
		return Want{}, fmt.Errorf("want: %w", err)
	}
	return w, nil
}

// DecodeSending decodes and checks what a server says of what it sends.
func DecodeSending(b []byte) (Sending, error) {
	var s Sending
	if err := bounded(b, MaxSending, &s); err != nil {
		return Sending{}, fmt.Errorf("sending: %w", err)
	}
	if s.Size < 1 {
		return Sending{}, fmt.Errorf("sending: size: %d, want 1 or more", s.Size)
	}
	return s, nil
}

func (w Want) check() error {
	if !isHex(w.Client, 16) {
		return fmt.Errorf("client: %.80q is not 16 hex digits", w.Client)
	}
	if err := w.Layer.Check(); err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	if err := checkRate(w.Rate); err != nil {
		return fmt.Errorf("rate: %w", err)
	}
	if !(w.Lost >= 0 && w.Lost <= 1) {
		return fmt.Errorf("lost: %v, want 0 to 1", w.Lost)
	}
	return nil
}
