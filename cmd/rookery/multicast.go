package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/spf13/pflag"

	"rookery/image/store"
	"rookery/server/carousel"
	"rookery/server/seed"
	"rookery/transport/multicast"
	"rookery/wire"
)

// A multicastConfig is the flags of rookery serve that are about multicast.
type multicastConfig struct {
	group      string
	port       uint16
	rate       string
	ttl        int
	iface      string
	minClients int
	wait       time.Duration
	parity     int
	always     []string
}

func (c *multicastConfig) flags(f *pflag.FlagSet) {
	f.StringVar(&c.group, "multicast-group", "239.192.0.0/16", "addresses of which each layer and torrent file has one; also of IPv6, such as ff15::1:0/112")
	f.Uint16Var(&c.port, "multicast-port", 6882, "UDP port of the groups")
	f.StringVar(&c.rate, "multicast-rate", "10MB", "what multicast sends in bytes a second, headers included, all layers together: 97 % of the slowest link that is to keep up; while it lasts nodes take no more by other transports")
	f.IntVar(&c.ttl, "multicast-ttl", 1, "routers that datagrams pass, and this one")
	f.StringVar(&c.iface, "multicast-interface", "", "network interface to send on (default --interface)")
	f.IntVar(&c.minClients, "multicast-min-clients", 2, "nodes that want a layer before it is sent")
	f.DurationVar(&c.wait, "multicast-wait", 10*time.Second, "after which it is sent to fewer")
	f.IntVar(&c.parity, "multicast-parity", 1, "percent that is sent beyond the data where no node says what it loses")
	f.StringSliceVar(&c.always, "multicast-always", nil, "images that are sent all the time, for networks without a way back")
}

// check also says what c means for scripts; own is the server's address.
func (c multicastConfig) check(served string, own netip.Addr) (outlet multicast.Outlet, m wire.Multicast, rate int64, err error) {
	outlet = multicast.Outlet{From: own, Via: served, TTL: c.ttl}
	if c.iface != "" {
		outlet.Via = c.iface
	}
	group, err := netip.ParsePrefix(c.group) // what is none is refused below
	if ipv4 := group.Addr().Is4(); err == nil && (outlet.Via != served || !ipv4) {
		if outlet.From, err = sendingAddress(outlet.Via, ipv4); err != nil {
			return outlet, m, 0, fmt.Errorf("multicast-interface: %w", err)
		}
	}
	m = wire.Multicast{Group: c.group, Port: c.port, Server: outlet.From.String()}
	if err := m.Check(); err != nil {
		return outlet, m, 0, fmt.Errorf("multicast-%w", err)
	}
	if rate, err = wire.ParseRate(c.rate); err == nil && rate == 0 {
		err = errors.New("none: it never waits for anybody, so there has to be one")
	}
	switch {
	case err != nil:
		return outlet, m, 0, fmt.Errorf("multicast-rate: %w", err)
	case c.ttl < 1 || c.ttl > 255:
		return outlet, m, 0, fmt.Errorf("multicast-ttl: %d, want 1 to 255", c.ttl)
	case c.minClients < 1:
		return outlet, m, 0, fmt.Errorf("multicast-min-clients: %d, want 1 or more", c.minClients)
	case c.parity < 0 || c.parity > 50:
		return outlet, m, 0, fmt.Errorf("multicast-parity: %d, want 0 to 50", c.parity)
	}
	return outlet, m, rate, nil
}

// sendingAddress is the address of an interface that datagrams of a family come
// from: one that routers carry rather than that of the link.
func sendingAddress(iface string, ipv4 bool) (netip.Addr, error) {
	card, err := net.InterfaceByName(iface)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%q: %w", iface, err)
	}
	addrs, err := card.Addrs()
	if err != nil {
		return netip.Addr{}, err
	}
	var link netip.Addr
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		switch {
		case err != nil || p.Addr().Is4() != ipv4:
		case p.Addr().IsLinkLocalUnicast():
			link = p.Addr()
		default:
			return p.Addr(), nil
		}
	}
	if !link.IsValid() {
		return link, fmt.Errorf("%s has no address to send from", iface)
	}
	return link, nil
}

// carousel sends what nodes ask of it, and what is to be sent always.
func (c multicastConfig) carousel(ctx context.Context, outlet multicast.Outlet, rate int64, images *store.Store, seeder *seed.Seeder, log *slog.Logger) (*carousel.Carousel, error) {
	s := &carousel.Carousel{
		Group: c.group, Port: c.port, Out: outlet, Rate: rate, Parity: float64(c.parity) / 100,
		MinClients: c.minClients, Wait: c.wait, Quiet: seeder.Quiet, Log: log,
		Layers: func(d wire.Digest) (carousel.Layer, bool) {
			info, index, content, ok := seeder.Layer(d)
			return carousel.Layer{Info: info, Bytes: content, First: index}, ok
		},
	}
	for _, name := range c.always {
		v, err := images.Resolve(ctx, name)
		if err == nil {
			err = v.Err
		}
		if err != nil {
			return nil, fmt.Errorf("multicast-always: %w", err)
		}
		for _, l := range v.Layers {
			s.Always = append(s.Always, l.Digest)
		}
	}
	return s, nil
}
