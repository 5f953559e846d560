package fleet

import "net/netip"

// HostAt is the node whose fixed address addr is, and the MAC address of the
// interface that gets it; false when it is nobody's.
func (f *Fleet) HostAt(addr netip.Addr) (mac string, h Host, ok bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	names := f.ids[id{"address", addr.String()}]
	if len(names) == 0 {
		return "", Host{}, false
	}
	n := f.records.nodes[names[0]]
	if len(n.MACs) > 0 {
		mac = n.MACs[0]
	}
	n.Settings = f.records.settings(n)
	return mac, host(n, f.machines[n.Name].status.Next, mac), true
}
