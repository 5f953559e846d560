package netup

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// fake is a machine with interfaces whose link and DHCP come when the test says.
type fake struct {
	mu         sync.Mutex
	nics       []NIC
	link       map[string]time.Time // when there is link
	answer     map[string]time.Time // when DHCP answers
	configured []Lease
	discovers  int
}

func (f *fake) NICs() ([]NIC, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	nics := append([]NIC(nil), f.nics...)
	for i, nic := range nics {
		at, ok := f.link[nic.Name]
		nics[i].Carrier = nic.Up && ok && !time.Now().Before(at)
	}
	return nics, nil
}

func (f *fake) SetUp(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.nics {
		if f.nics[i].Name == name {
			f.nics[i].Up = true
		}
	}
	return nil
}

func (f *fake) Discover(ctx context.Context, nic string, patience time.Duration) (Lease, error) {
	f.mu.Lock()
	f.discovers++
	at, ok := f.answer[nic]
	f.mu.Unlock()
	if ok && !time.Now().Before(at) {
		return Lease{NIC: nic, Address: netip.MustParsePrefix("10.0.0.7/24"), Valid: time.Hour}, nil
	}
	select {
	case <-time.After(patience):
		return Lease{}, errors.New("dhcp: discover: no answer")
	case <-ctx.Done():
		return Lease{}, ctx.Err()
	}
}

func (f *fake) Configure(l Lease) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.configured = append(f.configured, l)
	return nil
}

func TestUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		f := &fake{
			nics:   []NIC{{Name: "eth0", MAC: "52:54:00:00:00:01"}, {Name: "eth1", MAC: "52:54:00:00:00:02"}, {Name: "eth2", MAC: "52:54:00:00:00:03"}},
			link:   map[string]time.Time{"eth0": now, "eth1": now.Add(3 * time.Second)},
			answer: map[string]time.Time{"eth1": now.Add(35 * time.Second)}, // spanning tree
		}
		var out bytes.Buffer
		lease, err := Up(t.Context(), f, slog.New(slog.NewTextHandler(&out, nil)))
		if err != nil || lease.NIC != "eth1" || len(f.configured) != 1 {
			t.Fatalf("Up: %v, %v, configured %v", lease, err, f.configured)
		}
		if took := time.Since(now); took < 35*time.Second || took > 60*time.Second {
			t.Errorf("Up took %v, want about 35 s", took)
		}
		for _, want := range []string{"eth0 (52:54:00:00:00:01) link, no DHCP answer", "eth2 (52:54:00:00:00:03) no link"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("the log does not say %q:\n%s", want, out.String())
			}
		}
	})
}

func TestUpTriesForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		f := &fake{nics: []NIC{{Name: "eth0"}}, link: map[string]time.Time{"eth0": time.Now()}}
		var out bytes.Buffer
		_, err := Up(ctx, f, slog.New(slog.NewTextHandler(&out, nil)))
		if err == nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Up: %v", err)
		}
		if f.discovers < 4000 || f.discovers > 4400 {
			t.Errorf("%d tries in a day, want one in 20 s", f.discovers)
		}
		if lines := strings.Count(out.String(), "\n"); lines > 24*60+20 {
			t.Errorf("%d lines on the console in a day", lines)
		}
	})
}

func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Hour)
		defer cancel()
		now := time.Now()
		f := &fake{answer: map[string]time.Time{"eth0": now.Add(2 * time.Hour)}}
		if err := Keep(ctx, f, Lease{NIC: "eth0", Valid: time.Hour}, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
		if len(f.configured) < 14 {
			t.Errorf("renewed %d times in 8 hours of half-hours", len(f.configured))
		}
	})
}

func TestDescribe(t *testing.T) {
	for want, nics := range map[string][]NIC{
		"no network interface found": nil,
		"eth0 (aa) down":             {{Name: "eth0", MAC: "aa"}},
		"eth0 (aa) no link":          {{Name: "eth0", MAC: "aa", Up: true}},
	} {
		if got := Describe(nics); !strings.HasPrefix(got, want) {
			t.Errorf("Describe = %q, want %q...", got, want)
		}
	}
}

func ack(t *testing.T, modify ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	p, err := dhcpv4.New(modify...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLeaseOf(t *testing.T) {
	good := ack(t, dhcpv4.WithYourIP(net.IP{10, 0, 0, 7}), dhcpv4.WithNetmask(net.IPMask{255, 255, 255, 0}),
		dhcpv4.WithRouter(net.IP{10, 0, 0, 1}), dhcpv4.WithDNS(net.IP{10, 0, 0, 2}), dhcpv4.WithServerIP(net.IP{10, 0, 0, 3}),
		dhcpv4.WithLeaseTime(600), dhcpv4.WithOption(dhcpv4.OptDomainName("lab.example")))
	lease, err := leaseOf("eth0", good)
	if err != nil {
		t.Fatal(err)
	}
	if lease.Address.String() != "10.0.0.7/24" || lease.Gateway.String() != "10.0.0.1" || lease.NextServer.String() != "10.0.0.3" || lease.Valid != 10*time.Minute {
		t.Errorf("lease: %+v", lease)
	}
	if got := resolvConf(lease); got != "search lab.example\nnameserver 10.0.0.2\n" {
		t.Errorf("resolv.conf: %q", got)
	}
	if got := resolvConf(Lease{Domain: "x\nnameserver 6.6.6.6"}); got != "" {
		t.Errorf("resolv.conf of a hostile domain: %q", got)
	}
	for name, bad := range map[string]*dhcpv4.DHCPv4{
		"no address":         ack(t),
		"multicast":          ack(t, dhcpv4.WithYourIP(net.IP{224, 0, 0, 1})),
		"holes in the mask":  ack(t, dhcpv4.WithYourIP(net.IP{10, 0, 0, 7}), dhcpv4.WithNetmask(net.IPMask{255, 0, 255, 0})),
		"nothing but a mask": ack(t, dhcpv4.WithYourIP(net.IP{10, 0, 0, 7}), dhcpv4.WithNetmask(net.IPMask{0, 0, 0, 0})),
	} {
		if lease, err := leaseOf("eth0", bad); err == nil {
			t.Errorf("%s: %+v", name, lease)
		}
	}
	if isLease(ack(t, dhcpv4.WithMessageType(dhcpv4.MessageTypeOffer))) {
		t.Error("an offer without an address (proxy DHCP) is taken for a lease")
	}
}

func FuzzLeaseOf(f *testing.F) {
	p, _ := dhcpv4.New(dhcpv4.WithYourIP(net.IP{10, 0, 0, 7}), dhcpv4.WithNetmask(net.IPMask{255, 255, 255, 0}), dhcpv4.WithRouter(net.IP{10, 0, 0, 1}))
	f.Add(p.ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		if lease, err := leaseOf("eth0", p); err == nil && !lease.Address.IsValid() {
			t.Fatalf("%+v", lease)
		}
	})
}
