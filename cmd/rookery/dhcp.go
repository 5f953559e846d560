package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"rookery/server/dhcpd"
	"rookery/server/fleet"
	"rookery/server/store"
)

// A dhcpConfig is the flags that are about addresses.
type dhcpConfig struct {
	pools   []string
	routers []string
	dns     []string
	domain  string
	lease   time.Duration
}

// subnets makes the networks that addresses are given in: that of the server,
// and one for each pool that lies elsewhere, behind a relay agent.
func (c dhcpConfig) subnets(own netip.Prefix) ([]dhcpd.Subnet, error) {
	dns, err := addrs("dns", c.dns)
	if err != nil {
		return nil, err
	}
	routers, err := addrs("router", c.routers)
	if err != nil {
		return nil, err
	}
	all := []dhcpd.Subnet{{Prefix: own.Masked()}}
	for _, text := range c.pools {
		prefix, first, last, err := parsePool(text, own)
		if err != nil {
			return nil, fmt.Errorf("pool %q: %w", text, err)
		}
		if prefix == own.Masked() {
			if all[0].First.IsValid() {
				return nil, fmt.Errorf("pool %q: %s has a pool already", text, prefix)
			}
			all[0].First, all[0].Last = first, last
			continue
		}
		all = append(all, dhcpd.Subnet{Prefix: prefix, First: first, Last: last})
	}
	for i := range all {
		s := &all[i]
		s.DNS, s.Domain, s.Lease = dns, c.domain, c.lease
	}
	for _, r := range routers {
		i := slices.IndexFunc(all, func(s dhcpd.Subnet) bool { return s.Prefix.Contains(r) })
		switch {
		case i < 0:
			return nil, fmt.Errorf("router: %s is in none of the networks that have addresses: %s", r, prefixes(all))
		case all[i].Router.IsValid():
			return nil, fmt.Errorf("router: %s and %s are both in %s", all[i].Router, r, all[i].Prefix)
		}
		all[i].Router = r
	}
	return all, nil
}

func prefixes(all []dhcpd.Subnet) string {
	var words []string
	for _, s := range all {
		words = append(words, s.Prefix.String())
	}
	return strings.Join(words, ", ")
}

// parsePool reads FIRST-LAST, or FIRST-LAST/BITS for a network that is not the
// server's own.
func parsePool(text string, own netip.Prefix) (prefix netip.Prefix, first, last netip.Addr, err error) {
	text, bits, other := strings.Cut(text, "/")
	from, to, ok := strings.Cut(text, "-")
	if !ok {
		return prefix, first, last, errors.New("want FIRST-LAST, such as 10.0.0.100-10.0.0.200")
	}
	if first, err = netip.ParseAddr(from); err != nil {
		return prefix, first, last, err
	}
	if last, err = netip.ParseAddr(to); err != nil {
		return prefix, first, last, err
	}
	prefix = own.Masked()
	if other {
		n, err := strconv.Atoi(bits)
		if err != nil {
			return prefix, first, last, fmt.Errorf("prefix length %q is not a number", bits)
		}
		if prefix, err = first.Prefix(n); err != nil {
			return prefix, first, last, err
		}
	}
	switch {
	case !first.Is4() || !last.Is4():
		return prefix, first, last, errors.New("want IPv4 addresses")
	case !prefix.Contains(first) || !prefix.Contains(last):
		return prefix, first, last, fmt.Errorf("is not inside %s; for a network behind a relay append its prefix length, such as /24", prefix)
	case last.Less(first):
		return prefix, first, last, fmt.Errorf("%s comes before %s", last, first)
	}
	return prefix, first, last, nil
}

func addrs(key string, texts []string) ([]netip.Addr, error) {
	var all []netip.Addr
	for _, t := range texts {
		a, err := netip.ParseAddr(t)
		if err != nil || !a.Is4() {
			return nil, fmt.Errorf("%s: %q is not an IPv4 address", key, t)
		}
		all = append(all, a)
	}
	return all, nil
}

// ownAddress is the server's address: text, or the first IPv4 address of the
// interface. A text without a prefix length takes that of the interface.
func ownAddress(iface, text string) (netip.Prefix, error) {
	i, err := net.InterfaceByName(iface)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		return netip.Prefix{}, fmt.Errorf("interface %q: %w", iface, err)
	}
	all, err := i.Addrs()
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("interface %q: %w", iface, err)
	}
	var have []string
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !p.Addr().Is4() {
			continue
		}
		if text == "" || p.String() == text || p.Addr().String() == text {
			return p, nil
		}
		have = append(have, p.String())
	}
	if text == "" {
		return netip.Prefix{}, fmt.Errorf("interface %q has no IPv4 address", iface)
	}
	return netip.Prefix{}, fmt.Errorf("address %s: interface %q has %s", text, iface, strings.Join(have, ", "))
}

// hosts shows the fleet's fixed addresses to the DHCP server.
type hosts struct{ *fleet.Fleet }

func (h hosts) ByMAC(mac string) (dhcpd.Host, bool) {
	host, ok := h.Host(mac, "")
	return dhcpd.Host{MAC: mac, Name: host.Name, Addr: host.Address.Addr()}, ok
}

func (h hosts) ByAddr(addr netip.Addr) (dhcpd.Host, bool) {
	mac, host, ok := h.HostAt(addr)
	return dhcpd.Host{MAC: mac, Name: host.Name, Addr: addr}, ok
}

// kindLease is the store's kind of a DHCP lease; its name is the address.
const kindLease = "Lease"

// leases keeps DHCP leases among the records. The DHCP server is the only one
// that writes them.
type leases struct {
	ctx   context.Context
	store store.Store
}

func (l leases) All() ([]dhcpd.Lease, error) {
	records, err := l.store.List(l.ctx, kindLease)
	if err != nil {
		return nil, err
	}
	var all []dhcpd.Lease
	for _, r := range records {
		var lease dhcpd.Lease
		if err := json.Unmarshal(r.Value, &lease); err != nil {
			return nil, fmt.Errorf("lease %s: %w", r.Name, err)
		}
		all = append(all, lease)
	}
	return all, nil
}

func (l leases) Put(lease dhcpd.Lease) error {
	name := lease.Addr.String()
	old, err := l.store.Get(l.ctx, kindLease, name)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	b, err := json.Marshal(lease)
	if err != nil {
		return err
	}
	_, err = l.store.Put(l.ctx, store.Record{Kind: kindLease, Name: name, Value: b, Revision: old.Revision})
	return err
}
