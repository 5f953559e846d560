package netup

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"

	"rookery/netnstest"
)

// TestKernel runs the real thing against a real DHCP server over a veth pair,
// in a network namespace that needs no privileges.
func TestKernel(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}

	for _, pair := range []*netlink.Veth{
		{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "wire0"},
		{LinkAttrs: netlink.LinkAttrs{Name: "eth1"}, PeerName: "wire1"},
	} {
		if err := netlink.LinkAdd(pair); err != nil {
			t.Fatalf("veth: %v", err)
		}
	}
	wire, err := netlink.LinkByName("wire1")
	if err != nil {
		t.Fatal(err)
	}
	address, _ := netlink.ParseAddr("10.7.0.1/24")
	if err := netlink.AddrAdd(wire, address); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(wire); err != nil {
		t.Fatal(err)
	}
	serve(t, "wire1")

	// The far end of eth0 stays down: no link, which must not hold up eth1.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	network := only{Kernel{ResolvConf: resolv}}
	lease, err := Up(ctx, network, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	if lease.NIC != "eth1" || lease.Address.String() != "10.7.0.42/24" || lease.NextServer.String() != "10.7.0.1" {
		t.Errorf("lease: %+v", lease)
	}
	if err := network.Configure(lease); err != nil {
		t.Errorf("the same lease again: %v", err)
	}
	link, _ := netlink.LinkByName("eth1")
	addrs, _ := netlink.AddrList(link, netlink.FAMILY_V4)
	if len(addrs) != 1 || addrs[0].IPNet.String() != "10.7.0.42/24" {
		t.Errorf("addresses of eth1: %v", addrs)
	}
	routes, _ := netlink.RouteList(link, netlink.FAMILY_V4)
	if got := fmt.Sprint(routes); !strings.Contains(got, "10.7.0.254") {
		t.Errorf("routes of eth1: %v", got)
	}
	if b, _ := os.ReadFile(resolv); string(b) != "nameserver 10.7.0.1\n" {
		t.Errorf("resolv.conf: %q", b)
	}
}

// only hides the far ends of the wires.
type only struct{ Kernel }

func (o only) NICs() ([]NIC, error) {
	nics, err := o.Kernel.NICs()
	var mine []NIC
	for _, nic := range nics {
		if strings.HasPrefix(nic.Name, "eth") {
			mine = append(mine, nic)
		}
	}
	return mine, err
}

// serve answers DHCP, but for the first message, which is lost; and sends the
// offer of a proxy, without an address, before its own.
func serve(t *testing.T, iface string) {
	t.Helper()
	var lost atomic.Bool
	handler := func(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
		if lost.CompareAndSwap(false, true) {
			return
		}
		self := net.IP{10, 7, 0, 1}
		reply := func(modify ...dhcpv4.Modifier) {
			answer, err := dhcpv4.NewReplyFromRequest(m, append(modify, dhcpv4.WithServerIP(self), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(self)))...)
			if err == nil {
				_, _ = conn.WriteTo(answer.ToBytes(), peer)
			}
		}
		kind := dhcpv4.MessageTypeAck
		if m.MessageType() == dhcpv4.MessageTypeDiscover {
			kind = dhcpv4.MessageTypeOffer
			reply(dhcpv4.WithMessageType(kind))
		}
		reply(dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.IP{10, 7, 0, 42}), dhcpv4.WithNetmask(net.IPMask{255, 255, 255, 0}),
			dhcpv4.WithRouter(net.IP{10, 7, 0, 254}), dhcpv4.WithDNS(self), dhcpv4.WithLeaseTime(3600))
	}
	server, err := server4.NewServer(iface, &net.UDPAddr{IP: net.IPv4zero, Port: 67}, handler)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve() }()
	t.Cleanup(func() { _ = server.Close(); <-done })
}
