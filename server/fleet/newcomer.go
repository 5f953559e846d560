package fleet

import (
	"cmp"
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"time"

	"rookery/wire"
)

// Bounds of what is remembered of machines that nobody knows.
const (
	maxNewcomers     = 4096
	maxNewcomerBytes = 32 << 20
)

// A newcomer is a machine that said hello and is nobody's.
type newcomer struct {
	wire.Hello
	Seen time.Time
	size int // bytes of its hello
}

// newcomers are the machines that nobody knows, by their smallest MAC address:
// the order of interfaces can differ between two starts. They say hello every
// few seconds, so a server that restarts need not remember them.
type newcomers struct {
	byMAC map[string]*newcomer
	bytes int
}

func (all *newcomers) key(inv wire.Inventory) string {
	return slices.MinFunc(inv.NICs, func(a, b wire.NIC) int { return cmp.Compare(a.MAC, b.MAC) }).MAC
}

// add lists a machine or notes that it is still there. The one that was silent
// the longest goes when there are too many. It says whether the machine is new
// in the list.
func (all *newcomers) add(h wire.Hello, now time.Time) (fresh bool) {
	b, _ := json.Marshal(h) // nothing in it can fail
	c := &newcomer{h, now, len(b)}
	was := all.byMAC[all.key(h.Inventory)]
	if was != nil {
		all.remove(was)
	}
	for len(all.byMAC) > 0 && (len(all.byMAC) >= maxNewcomers || all.bytes+c.size > maxNewcomerBytes) {
		all.remove(all.oldest())
	}
	if all.byMAC == nil {
		all.byMAC = map[string]*newcomer{}
	}
	all.byMAC[all.key(h.Inventory)] = c
	all.bytes += c.size
	return was == nil
}

func (all *newcomers) remove(c *newcomer) {
	delete(all.byMAC, all.key(c.Inventory))
	all.bytes -= c.size
}

func (all *newcomers) oldest() (oldest *newcomer) {
	for _, c := range all.byMAC {
		if oldest == nil || c.Seen.Before(oldest.Seen) {
			oldest = c
		}
	}
	return oldest
}

// list is sorted by MAC address.
func (all *newcomers) list() []*newcomer {
	var list []*newcomer
	for _, mac := range slices.Sorted(maps.Keys(all.byMAC)) {
		list = append(list, all.byMAC[mac])
	}
	return list
}

// find is the machine with any interface of that address, or nil.
func (all *newcomers) find(mac string) *newcomer {
	for _, c := range all.byMAC {
		if slices.ContainsFunc(c.Inventory.NICs, func(nic wire.NIC) bool { return nic.MAC == mac }) {
			return c
		}
	}
	return nil
}

func sameInventory(a, b *wire.Inventory) bool { return reflect.DeepEqual(a, b) }
