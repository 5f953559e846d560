// Package radvd answers IPv6 router solicitations with an advertisement that
// offers nothing: no router, no prefix. iPXE waits for an answer for 13 s each
// time it configures a card, and any answer ends that.
package radvd

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/ipv6"
)

// A Server answers on one link, as long as nobody else advertises there.
type Server struct {
	Interface string
	Log       *slog.Logger
}

// quiet is how long another router is taken to be there after it was heard: the
// longest that it may leave between two advertisements (RFC 4861, 6.2.1).
const quiet = 30 * time.Minute

var (
	allNodes   = net.ParseIP("ff02::1")
	allRouters = net.ParseIP("ff02::2")
)

// Run answers until ctx ends, and then returns nil. On a link without IPv6 it
// says so once and does nothing: machines boot there too, only later.
func (s *Server) Run(ctx context.Context) error {
	iface, err := net.InterfaceByName(s.Interface)
	if err != nil {
		return fmt.Errorf("%s: %w", s.Interface, err)
	}
	conn, err := listen(iface)
	if err != nil {
		s.Log.Warn("no router advertisements: iPXE will wait 13 s for one", "interface", s.Interface, "err", err)
		<-ctx.Done()
		return nil
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	// Ask once, to hear of other routers before the first machine does.
	if _, err := conn.WriteTo(solicitation(iface.HardwareAddr), nil, &net.IPAddr{IP: allRouters, Zone: iface.Name}); err != nil {
		s.Log.Debug("router solicitation not sent", "interface", s.Interface, "err", err)
	}
	r := responder{mac: iface.HardwareAddr, self: linkLocals(iface)}
	buf := make([]byte, 2048)
	for {
		n, control, from, err := conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.Interface, err)
		}
		addr, ok := netip.AddrFromSlice(from.(*net.IPAddr).IP)
		if !ok || control == nil || control.IfIndex != iface.Index {
			continue
		}
		before := r.other
		reply := r.answer(buf[:n], addr, control.HopLimit, time.Now())
		if r.other.Sub(before) > quiet {
			s.Log.Info("another router advertises: leaving it to that", "interface", s.Interface, "router", addr)
		}
		if reply == nil {
			continue
		}
		// To all, since a machine that solicits may not have finished its address.
		if _, err := conn.WriteTo(reply, nil, &net.IPAddr{IP: allNodes, Zone: iface.Name}); err != nil {
			s.Log.Debug("router advertisement not sent", "interface", s.Interface, "err", err)
		}
	}
}

func listen(iface *net.Interface) (*ipv6.PacketConn, error) {
	c, err := net.ListenPacket("ip6:ipv6-icmp", "::")
	if err != nil {
		return nil, err
	}
	conn := ipv6.NewPacketConn(c)
	if err := configure(conn, iface); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func configure(conn *ipv6.PacketConn, iface *net.Interface) error {
	var filter ipv6.ICMPFilter
	filter.SetAll(true)
	filter.Accept(ipv6.ICMPTypeRouterSolicitation)
	filter.Accept(ipv6.ICMPTypeRouterAdvertisement)
	for _, set := range []func() error{
		func() error { return conn.SetICMPFilter(&filter) },
		func() error { return conn.SetControlMessage(ipv6.FlagHopLimit|ipv6.FlagInterface, true) },
		func() error { return conn.SetMulticastHopLimit(255) },
		func() error { return conn.SetMulticastInterface(iface) },
		func() error { return conn.SetMulticastLoopback(false) },
		func() error { return conn.JoinGroup(iface, &net.IPAddr{IP: allRouters}) },
	} {
		if err := set(); err != nil {
			return err
		}
	}
	return nil
}

func linkLocals(iface *net.Interface) map[netip.Addr]bool {
	locals := map[netip.Addr]bool{}
	addrs, _ := iface.Addrs()
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				locals[addr] = true
			}
		}
	}
	return locals
}

// A responder decides what is answered.
type responder struct {
	mac   net.HardwareAddr
	self  map[netip.Addr]bool
	other time.Time // when another router was last heard
}

// answer is the reply to one ICMPv6 message, or nil.
func (r *responder) answer(msg []byte, from netip.Addr, hops int, now time.Time) []byte {
	// RFC 4861, 6.1: what went through a router, or is short, is not to be believed.
	if hops != 255 || len(msg) < 8 || msg[1] != 0 {
		return nil
	}
	switch {
	case msg[0] == byte(ipv6.ICMPTypeRouterAdvertisement) && len(msg) >= 16 && from.IsLinkLocalUnicast() && !r.self[from]:
		r.other = now
	case msg[0] == byte(ipv6.ICMPTypeRouterSolicitation) && now.Sub(r.other) > quiet:
		return advertisement(r.mac)
	}
	return nil
}

// advertisement is a router advertisement (RFC 4861, 4.2) with lifetime 0: "not
// a default router". The kernel fills the checksum in.
func advertisement(mac net.HardwareAddr) []byte {
	b := make([]byte, 16)
	b[0] = byte(ipv6.ICMPTypeRouterAdvertisement)
	return appendLinkAddr(b, mac)
}

func solicitation(mac net.HardwareAddr) []byte {
	b := make([]byte, 8)
	b[0] = byte(ipv6.ICMPTypeRouterSolicitation)
	return appendLinkAddr(b, mac)
}

// appendLinkAddr adds the source link-layer address option (RFC 4861, 4.6.1).
func appendLinkAddr(b []byte, mac net.HardwareAddr) []byte {
	if len(mac) != 6 {
		return b
	}
	return append(append(b, 1, 1), mac...)
}
