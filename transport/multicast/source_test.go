package multicast

import (
	"bytes"
	"context"
	"net/netip"
	"os/exec"
	"sync"
	"testing"

	"rookery/netnstest"
	"rookery/transport"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// card is an interface that has groups: what is sent there is heard there, too.
const card = "wire"

func loop(t *testing.T) {
	t.Helper()
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"link", "add", card, "type", "veth", "peer", "end"},
		{"link", "set", "end", "up"},
		{"address", "add", "10.9.0.1/24", "dev", card},
		{"address", "add", "fd00::1/64", "dev", card, "nodad"},
		{"link", "set", card, "up"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
}

var families = map[string]wire.Multicast{
	"IPv4": {Group: "239.192.0.0/16", Port: 6882, Server: "10.9.0.1"},
	"IPv6": {Group: "ff15::1:0/112", Port: 6882, Server: "fd00::1"},
}

// send has a sender of content run until the test ends, and stop ends it earlier.
func send(t *testing.T, m wire.Multicast, info transport.Info, content []byte, d *Demand, change func(*Sender)) (stop func()) {
	t.Helper()
	group, err := GroupOf(m.Group, info.InfoHash, m.Rate)
	if err != nil {
		t.Fatal(err)
	}
	s := &Sender{
		Info: info, Layer: bytes.NewReader(content), Demand: d, Rate: 50 << 20,
		Out: Outlet{From: netip.MustParseAddr(m.Server), Via: card, TTL: 1},
		To:  netip.AddrPortFrom(group, m.Port),
	}
	if change != nil {
		change(s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

func TestSource(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	for name, m := range families {
		t.Run(name, func(t *testing.T) {
			transporttest.Run(t, func(t *testing.T, info transport.Info, content []byte) transport.Source {
				send(t, m, info, content, &Demand{}, func(s *Sender) { s.Always = true })
				return &Source{Config: m, Alone: true, Via: card}
			})
		})
	}
}
