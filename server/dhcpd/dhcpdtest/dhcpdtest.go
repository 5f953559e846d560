// Package dhcpdtest has fakes for what dhcpd asks of others, and the suite that
// every keeper of leases passes.
package dhcpdtest

import (
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"rookery/server/dhcpd"
)

// Leases keeps leases in memory. Its zero value is empty.
type Leases struct {
	mu     sync.Mutex
	leases map[netip.Addr]dhcpd.Lease
	err    error
}

// Fail makes All and Put return err from now on; nil heals them.
func (m *Leases) Fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

// All implements dhcpd.Leases.
func (m *Leases) All() ([]dhcpd.Lease, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	var all []dhcpd.Lease
	for _, l := range m.leases {
		all = append(all, l)
	}
	return all, nil
}

// Put implements dhcpd.Leases.
func (m *Leases) Put(l dhcpd.Lease) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	if m.leases == nil {
		m.leases = map[netip.Addr]dhcpd.Lease{}
	}
	m.leases[l.Addr] = l
	return nil
}

// Hosts are hosts in a slice.
type Hosts []dhcpd.Host

// ByMAC implements dhcpd.Hosts.
func (hs Hosts) ByMAC(mac string) (dhcpd.Host, bool) {
	return hs.find(func(h dhcpd.Host) bool { return h.MAC == mac })
}

// ByAddr implements dhcpd.Hosts.
func (hs Hosts) ByAddr(addr netip.Addr) (dhcpd.Host, bool) {
	return hs.find(func(h dhcpd.Host) bool { return h.Addr == addr })
}

func (hs Hosts) find(f func(dhcpd.Host) bool) (dhcpd.Host, bool) {
	i := slices.IndexFunc(hs, f)
	if i < 0 {
		return dhcpd.Host{}, false
	}
	return hs[i], true
}

// Run is what every keeper of leases passes. open opens the same, at first
// empty, store again on each call, as a restart of the server would.
func Run(t *testing.T, open func(t *testing.T) dhcpd.Leases) {
	addr := netip.MustParseAddr("10.0.0.100")
	noon := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	first := dhcpd.Lease{Addr: addr, MAC: "52:54:00:00:00:01", Expires: noon}
	later := dhcpd.Lease{Addr: addr, MAC: "52:54:00:00:00:02", Expires: noon.Add(time.Hour)}
	declined := dhcpd.Lease{Addr: addr.Next(), Expires: noon}

	check := func(step string, want ...dhcpd.Lease) {
		t.Helper()
		got, err := open(t).All()
		if err != nil {
			t.Fatalf("%s: All: %v", step, err)
		}
		slices.SortFunc(got, func(a, b dhcpd.Lease) int { return a.Addr.Compare(b.Addr) })
		same := func(a, b dhcpd.Lease) bool {
			return a.Addr == b.Addr && a.MAC == b.MAC && a.Expires.Equal(b.Expires)
		}
		if !slices.EqualFunc(got, want, same) {
			t.Fatalf("%s: All: %v, want %v", step, got, want)
		}
	}
	put := func(l dhcpd.Lease) {
		t.Helper()
		if err := open(t).Put(l); err != nil {
			t.Fatalf("Put(%v): %v", l, err)
		}
	}
	check("empty")
	put(first)
	check("one", first)
	put(declined)
	check("two", first, declined)
	put(later)
	check("replaced", later, declined)
}
