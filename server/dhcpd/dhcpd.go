// Package dhcpd gives machines their addresses and tells them what to boot. It
// is the only DHCP server of its subnets: fixed addresses by MAC for the nodes,
// a pool for everything else, directly or through relays.
package dhcpd

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"

	"rookery/boot/netboot"
)

// A Server answers DHCP requests. All fields are read once, by Run.
type Server struct {
	// Interface is where to listen, on port 67. Conn, when not nil, is listened
	// on instead, and closed at the end of Run.
	Interface string
	Conn      net.PacketConn

	Subnets []Subnet
	Site    netboot.Site // Server, in one of the subnets, is also the server identifier
	Hosts   Hosts        // nil: no fixed addresses
	Leases  Leases
	Log     *slog.Logger

	// Relayed, when not nil, hears which relay agent an acknowledged machine is
	// behind: a name of 1 to 64 characters.
	Relayed func(mac, relay string)
}

// A Subnet is one network that addresses are given in.
type Subnet struct {
	Prefix      netip.Prefix
	First, Last netip.Addr // the pool; both zero: fixed addresses only
	Router      netip.Addr // zero: none
	DNS         []netip.Addr
	Domain      string
	Lease       time.Duration // 0: an hour
}

// A Host is what is known of a machine. A zero Addr means one of the pool.
type Host struct {
	MAC  string // as netboot.ParseMAC gives it
	Name string
	Addr netip.Addr
}

// Hosts knows the fixed addresses. It is asked for every request, and may
// answer differently each time.
type Hosts interface {
	ByMAC(mac string) (Host, bool)
	ByAddr(addr netip.Addr) (Host, bool)
}

// A Lease says who has an address of the pool, or had it last. An empty MAC
// means that nobody can have it: a machine found it in use.
type Lease struct {
	Addr    netip.Addr `json:"addr"`
	MAC     string     `json:"mac"`
	Expires time.Time  `json:"expires"`
}

// Leases keeps leases, one per address, over a restart of the server.
type Leases interface {
	// All is every lease kept, expired ones too, in any order.
	All() ([]Lease, error)
	// Put keeps l in place of an earlier lease of the same address. When it
	// returns nil, l survives a power cut.
	Put(l Lease) error
}

// Run answers requests until ctx ends, and then returns nil. Its error is for
// someone who knows which service it is of.
func (s *Server) Run(ctx context.Context) error {
	leases, err := s.Leases.All()
	if err != nil {
		return fmt.Errorf("leases: %w", err)
	}
	table, err := newTable(s.Subnets, s.Site, s.Hosts, leases)
	if err != nil {
		return err
	}
	conn := s.Conn
	if conn == nil {
		conn, err = server4.NewIPv4UDPConn(s.Interface, &net.UDPAddr{Port: dhcpv4.ServerPort})
		if err != nil {
			return fmt.Errorf("%s: %w", s.Interface, err)
		}
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	buf := make([]byte, 2048) // no Ethernet frame holds more
	for {
		n, _, err := conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		req, err := dhcpv4.FromBytes(buf[:n])
		if err != nil {
			s.Log.Debug("dhcp: not understood", "bytes", n, "err", err)
			continue
		}
		s.act(conn, table.answer(req, time.Now()))
	}
}

// act carries an outcome out. A lease that could not be kept is not given.
func (s *Server) act(conn net.PacketConn, o outcome) {
	log := s.Log.With("client", o.mac)
	if o.lease != nil {
		if err := s.Leases.Put(*o.lease); err != nil {
			log.Error("dhcp: lease not kept", "addr", o.lease.Addr, "err", err)
			return
		}
	}
	log.Log(context.Background(), o.level, "dhcp: "+o.did, "addr", o.addr, "boot", o.boot, "why", o.why)
	if o.relay != "" && s.Relayed != nil {
		s.Relayed(o.mac, o.relay)
	}
	if o.reply == nil {
		return
	}
	if _, err := conn.WriteTo(o.reply.ToBytes(), o.to); err != nil {
		log.Error("dhcp: reply not sent", "to", o.to, "err", err)
	}
}
