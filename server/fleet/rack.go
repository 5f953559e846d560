package fleet

import (
	"net/netip"
	"regexp"
	"slices"
	"sync"
	"time"

	"rookery/wire"
)

// A Rack is the switch that a node hangs on, as far as it is known. Traffic
// within it is cheaper than any other.
type Rack struct {
	Name string `json:"name"`
	From string `json:"from"` // "the node's record", "group compute", "the Defaults", "the DHCP relay", "LLDP", "LLDP, the start before"
}

const maxRack = 64 // bytes of a name

var rackForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$`)

func checkRack(name string) error {
	if name != "" && !rackForm.MatchString(name) {
		return bad("rack", "%.80q is not a name such as r07 or b2/07: want at most %d letters, digits and . _ : / -", name, maxRack)
	}
	return nil
}

// hold is for how long of a start what the start before heard counts. A switch that
// speaks has spoken four times by then: others forget it after that time, too.
const hold = 2 * time.Minute

// rack is where a node stands by now: as its records say, or what was seen of it.
func (r records) rack(n Node, s Status, now time.Time) *Rack {
	for _, l := range r.levels(n) {
		if l.Rack != "" {
			return &Rack{l.Rack, l.of}
		}
	}
	if s.Relay != "" {
		return &Rack{s.Relay, "the DHCP relay"}
	}
	// A node can say what it likes: it moves itself to other neighbors, and nobody else.
	at, from := neighbor(s.Inventory, heard(s.Inventory)), "LLDP"
	if at == "" && now.Sub(s.started()) < hold {
		at, from = neighbor(s.Inventory, s.Before), "LLDP, the start before"
	}
	if at == "" || len(at) > maxRack {
		return nil
	}
	return &Rack{at, from}
}

// neighbor is the switch that the card with the node's address heard, or "". Another
// card's is not the one that layers pass, so it counts only where no card has an address.
func neighbor(inv *wire.Inventory, heard map[string]string) string {
	if inv == nil {
		return ""
	}
	i := slices.IndexFunc(inv.NICs, func(nic wire.NIC) bool { return nic.Address != "" })
	if i < 0 {
		i = slices.IndexFunc(inv.NICs, func(nic wire.NIC) bool { return heard[nic.MAC] != "" })
	}
	if i < 0 {
		return ""
	}
	return heard[inv.NICs[i].MAC]
}

// heard are the switches that a machine's cards heard, by MAC address.
func heard(inv *wire.Inventory) map[string]string {
	if inv == nil {
		return nil
	}
	heard := map[string]string{}
	for _, nic := range inv.NICs {
		if nic.Neighbor != nil {
			heard[nic.MAC] = nic.Neighbor.Switch
		}
	}
	return heard
}

// RackAt names the rack of the node that has an address, by its record or as it
// said in its last hello; "" when neither is known.
func (f *Fleet) RackAt(addr netip.Addr) string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	name := f.seen.at(addr)
	if names := f.ids[id{"address", addr.String()}]; len(names) > 0 {
		name = names[0]
	}
	n, ok := f.records.nodes[name]
	if !ok {
		return ""
	}
	if rack := f.records.rack(n, f.machines[name].status, time.Now()); rack != nil {
		return rack.Name
	}
	return ""
}

// Relayed notes through which relay agent a machine reached the DHCP server. It is
// the node's when it says hello.
func (f *Fleet) Relayed(mac, rack string) { f.seen.relayed(normalMAC(mac), rack) }

// maxSeen bounds what is kept of machines of which most may be nobody's.
const maxSeen = 50_000

// A seen is what was seen of machines on the network. Its zero value is ready.
type seen struct {
	mu     sync.Mutex
	nodes  map[netip.Addr]string // that said hello from there last
	relays map[string]string     // by MAC address
}

func (s *seen) at(addr netip.Addr) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes[addr]
}

func (s *seen) relayed(mac, rack string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.relays) >= maxSeen || s.relays == nil {
		s.relays = map[string]string{}
	}
	s.relays[mac] = rack
}

// hello notes where a node is, and returns the relay that was seen of it.
func (s *seen) hello(name string, inv wire.Inventory) (relay string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.nodes) >= maxSeen || s.nodes == nil {
		s.nodes = map[netip.Addr]string{}
	}
	for _, nic := range inv.NICs {
		if p, err := netip.ParsePrefix(nic.Address); err == nil {
			s.nodes[p.Addr()] = name
		}
		if r := s.relays[normalMAC(nic.MAC)]; r != "" {
			relay = r
		}
	}
	return relay
}
