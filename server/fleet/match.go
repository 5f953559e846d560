package fleet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"rookery/wire"
)

// An id is one thing that a single node may have.
type id struct{ key, value string } // the record's key

// index has the nodes that claim an id: one, in records that were checked.
type index map[id][]string

func (n Node) ids() []id {
	var all []id
	for _, m := range n.MACs {
		all = append(all, id{"macs", m})
	}
	if n.UUID != "" {
		all = append(all, id{"uuid", n.UUID})
	}
	if n.Serial != "" {
		all = append(all, id{"serial", n.Serial})
	}
	if p, err := netip.ParsePrefix(n.Address); err == nil {
		all = append(all, id{"address", p.Addr().String()})
	}
	return all
}

func newIndex(nodes map[string]Node) index {
	ids := index{}
	for name, n := range nodes {
		for _, id := range n.ids() {
			if !slices.Contains(ids[id], name) {
				ids[id] = append(ids[id], name)
			}
		}
	}
	return ids
}

// match finds the node that a machine is: by a MAC address, only without one
// by its UUID, and without that by its serial number. So a machine whose network
// card was replaced is still itself, and a card that was moved takes its node
// along. A machine with the cards of several nodes is the one whose UUID it
// has; without that it is none, and the error says so.
func (ids index) match(inv wire.Inventory) (name string, err error) {
	var found []string
	for _, nic := range inv.NICs {
		for _, name := range ids[id{"macs", normalMAC(nic.MAC)}] {
			if !slices.Contains(found, name) {
				found = append(found, name)
			}
		}
	}
	byUUID := ids[id{"uuid", strings.ToLower(inv.UUID)}]
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1 && len(byUUID) == 1 && slices.Contains(found, byUUID[0]):
		return byUUID[0], nil
	case len(found) > 1:
		slices.Sort(found)
		return "", fmt.Errorf("this machine has MAC addresses of several nodes: %s", strings.Join(found, ", "))
	case len(byUUID) == 1:
		return byUUID[0], nil
	}
	if bySerial := ids[id{"serial", inv.Serial}]; len(bySerial) == 1 {
		return bySerial[0], nil
	}
	return "", nil
}
