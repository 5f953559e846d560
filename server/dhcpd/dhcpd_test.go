package dhcpd_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"rookery/boot/netboot"
	"rookery/server/dhcpd"
	"rookery/server/dhcpd/dhcpdtest"
)

const (
	first  = "52:54:00:00:00:01"
	second = "52:54:00:00:00:02"
)

// server has one address to give, for an hour.
func server(conn net.PacketConn, leases dhcpd.Leases) *dhcpd.Server {
	addr := netip.MustParseAddr("10.0.0.100")
	return &dhcpd.Server{
		Conn: conn,
		Subnets: []dhcpd.Subnet{{
			Prefix: netip.MustParsePrefix("10.0.0.0/24"), First: addr, Last: addr, Lease: time.Hour,
		}},
		Site:   netboot.Site{Server: netip.MustParseAddr("10.0.0.1")},
		Leases: leases,
		Log:    slog.New(slog.DiscardHandler),
	}
}

// A wire is a packet connection made of channels.
type wire struct {
	net.PacketConn
	in, out chan []byte
	closed  chan struct{}
}

func newWire() *wire {
	return &wire{in: make(chan []byte), out: make(chan []byte, 16), closed: make(chan struct{})}
}

func (w *wire) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case p := <-w.in:
		return copy(b, p), &net.UDPAddr{}, nil
	case <-w.closed:
		return 0, nil, net.ErrClosed
	}
}

func (w *wire) WriteTo(b []byte, _ net.Addr) (int, error) {
	w.out <- b
	return len(b), nil
}

func (w *wire) Close() error {
	select {
	case <-w.closed:
	default:
		close(w.closed)
	}
	return nil
}

// ask sends a request and gives the reply, or nil when there is none.
func (w *wire) ask(t *testing.T, kind dhcpv4.MessageType, mac string, options ...dhcpv4.Option) *dhcpv4.DHCPv4 {
	t.Helper()
	hw, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	m := &dhcpv4.DHCPv4{OpCode: dhcpv4.OpcodeBootRequest, HWType: iana.HWTypeEthernet, ClientHWAddr: hw,
		Options: dhcpv4.OptionsFromList(append(options, dhcpv4.OptMessageType(kind))...)}
	w.in <- m.ToBytes()
	synctest.Wait()
	select {
	case p := <-w.out:
		r, err := dhcpv4.FromBytes(p)
		if err != nil {
			t.Fatal(err)
		}
		return r
	default:
		return nil
	}
}

// take asks for an address to the end, and says which it got, "" for none.
func (w *wire) take(t *testing.T, mac string) string {
	t.Helper()
	offer := w.ask(t, dhcpv4.MessageTypeDiscover, mac)
	if offer == nil {
		return ""
	}
	ack := w.ask(t, dhcpv4.MessageTypeRequest, mac, dhcpv4.OptServerIdentifier(offer.ServerIdentifier()), dhcpv4.OptRequestedIPAddress(offer.YourIPAddr))
	if ack == nil || ack.MessageType() != dhcpv4.MessageTypeAck {
		return ""
	}
	return ack.YourIPAddr.String()
}

// start runs a server until stop is called.
func start(t *testing.T, leases dhcpd.Leases) (w *wire, stop func()) {
	t.Helper()
	w = newWire()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- server(w, leases).Run(ctx) }()
	synctest.Wait() // it has read the leases
	return w, func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v, want nil after ctx", err)
		}
	}
}

func TestLeaseLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leases := &dhcpdtest.Leases{}
		w, stop := start(t, leases)
		if got := w.take(t, first); got != "10.0.0.100" {
			t.Fatalf("first: %q, want 10.0.0.100", got)
		}
		time.Sleep(59 * time.Minute) // of the bubble's time
		if got := w.take(t, second); got != "" {
			t.Errorf("second, a minute before the end: %q, want none", got)
		}
		stop()

		w, stop = start(t, leases)
		if got := w.take(t, second); got != "" {
			t.Errorf("second, after a restart: %q, want none", got)
		}
		if got := w.take(t, first); got != "10.0.0.100" {
			t.Errorf("first, after a restart: %q, want 10.0.0.100", got)
		}
		time.Sleep(61 * time.Minute)
		if got := w.take(t, second); got != "10.0.0.100" {
			t.Errorf("second, after the end: %q, want 10.0.0.100", got)
		}
		if got := w.take(t, first); got != "" {
			t.Errorf("first, too late: %q, want none", got)
		}
		stop()
	})
}

func TestLeaseNotKeptIsNotGiven(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leases := &dhcpdtest.Leases{}
		w, stop := start(t, leases)
		defer stop()
		leases.Fail(errors.New("disk full"))
		if got := w.take(t, first); got != "" {
			t.Errorf("with a full disk: %q, want none", got)
		}
		leases.Fail(nil)
		if got := w.take(t, first); got != "10.0.0.100" {
			t.Errorf("afterwards: %q, want 10.0.0.100", got)
		}
	})
}

func TestRunSaysWhy(t *testing.T) {
	broken := &dhcpdtest.Leases{}
	broken.Fail(errors.New("disk on fire"))
	if err := server(newWire(), broken).Run(t.Context()); err == nil || err.Error() != "leases: disk on fire" {
		t.Errorf("Run: %v", err)
	}
	w := newWire()
	w.Close()
	if err := server(w, &dhcpdtest.Leases{}).Run(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Run on a closed connection: %v, want %v", err, net.ErrClosed)
	}
	s := server(nil, &dhcpdtest.Leases{})
	s.Interface = "nosuch0"
	if err := s.Run(t.Context()); err == nil {
		t.Errorf("Run without an interface: %v", err)
	}
}

func TestMemoryLeases(t *testing.T) {
	leases := &dhcpdtest.Leases{}
	dhcpdtest.Run(t, func(*testing.T) dhcpd.Leases { return leases })
}
