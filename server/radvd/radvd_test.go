package radvd

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/ipv6"

	"rookery/netnstest"
)

var (
	mac    = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	self   = netip.MustParseAddr("fe80::1")
	router = netip.MustParseAddr("fe80::2")
	noon   = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
)

func TestAnswer(t *testing.T) {
	ask := []byte{133, 0, 0, 0, 0, 0, 0, 0}
	offer := append([]byte{134, 0, 0, 0, 64, 0, 7, 8}, make([]byte, 8)...)
	empty := []byte{134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0x52, 0x54, 0, 0, 0, 1}
	type heard struct {
		msg   []byte
		from  netip.Addr
		hops  int
		after time.Duration
	}
	first := heard{ask, netip.MustParseAddr("fe80::9"), 255, 0}
	for _, tt := range []struct {
		name  string
		heard []heard // the answer to the last counts
		want  []byte
	}{
		{"a machine", []heard{first}, empty},
		{"a machine without an address", []heard{{ask, netip.IPv6Unspecified(), 255, 0}}, empty},
		{"from far away", []heard{{ask, router, 254, 0}}, nil},
		{"short", []heard{{ask[:7], router, 255, 0}}, nil},
		{"empty", []heard{{nil, router, 255, 0}}, nil},
		{"unknown code", []heard{{[]byte{133, 1, 0, 0, 0, 0, 0, 0}, router, 255, 0}}, nil},
		{"an advertisement", []heard{{offer, router, 255, 0}}, nil},
		{"beside a router", []heard{{offer, router, 255, 0}, {ask, self, 255, time.Minute}}, nil},
		{"after a router", []heard{{offer, router, 255, 0}, {ask, self, 255, 31 * time.Minute}}, empty},
		{"beside itself", []heard{{offer, self, 255, 0}, first}, empty},
		{"beside a router that is not of the link", []heard{{offer, netip.MustParseAddr("2001:db8::1"), 255, 0}, first}, empty},
		{"beside a forged router", []heard{{offer, router, 64, 0}, first}, empty},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := responder{mac: mac, self: map[netip.Addr]bool{self: true}}
			var got []byte
			for _, h := range tt.heard {
				got = r.answer(h.msg, h.from, h.hops, noon.Add(h.after))
			}
			if !bytes.Equal(got, tt.want) {
				t.Errorf("answer: %x, want %x", got, tt.want)
			}
		})
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte{133, 0, 0, 0, 0, 0, 0, 0}, 255)
	f.Add([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, 255)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, msg []byte, hops int) {
		r := responder{mac: mac}
		if got := r.answer(msg, router, hops, noon); got != nil && (msg[0] != 133 || hops != 255) {
			t.Fatalf("answered %x of %d hops", msg, hops)
		}
	})
}

// TestWire solicits over a veth pair, in a network namespace that needs no
// privileges.
func TestWire(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	// Without it an address can be used only when nobody objected for a second.
	for _, name := range []string{"default", "all"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0); err != nil {
			t.Skipf("no IPv6 here (%v): load the ipv6 module", err)
		}
	}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lan"}, PeerName: "eth0"}); err != nil {
		t.Fatalf("veth: %v", err)
	}
	for _, name := range []string{"lan", "eth0"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
	}
	iface, err := net.InterfaceByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := listen(iface)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- (&Server{Interface: "lan", Log: slog.Default()}).Run(ctx) }()

	buf := make([]byte, 100)
	deadline := time.Now().Add(20 * time.Second)
	for {
		if time.Now().After(deadline) {
			t.Fatal("no advertisement in 20 s")
		}
		// Again every 100 ms: the server may not have joined the group yet.
		if _, err := conn.WriteTo(solicitation(iface.HardwareAddr), nil, &net.IPAddr{IP: allRouters, Zone: "eth0"}); err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, control, from, err := conn.ReadFrom(buf)
		if err != nil || control.IfIndex != iface.Index || buf[0] != byte(ipv6.ICMPTypeRouterAdvertisement) {
			continue
		}
		if n != 24 || control.HopLimit != 255 || !from.(*net.IPAddr).IP.IsLinkLocalUnicast() || buf[6] != 0 || buf[7] != 0 {
			t.Errorf("advertisement %x from %s over %d hops", buf[:n], from, control.HopLimit)
		}
		break
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v, want nil after ctx", err)
	}
	if err := (&Server{Interface: "nosuch0", Log: slog.Default()}).Run(t.Context()); err == nil {
		t.Error("Run on no interface: nil")
	}
}
