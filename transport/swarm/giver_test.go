package swarm

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"rookery/transport/swarm/rules"
)

// A server gives a torrent file to a few at a time, until they come with it or are
// given up, and names each host that has come to a few others, and again later.
func TestGiver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 16)
		defer end()
		server := s.server().torrent
		asks := func() (netip.AddrPort, time.Duration) {
			begin := time.Now()
			addr := server.Giver(t.Context())
			return addr, time.Since(begin)
		}
		comes := func(n int, host, addr string) *conn {
			c := attach(t, server, nodePrefix, n)
			server.mu.Lock()
			defer server.mu.Unlock()
			c.Host, c.addr = netip.MustParseAddr(host), netip.MustParseAddrPort(addr)
			server.comes(c)
			return c
		}
		for range rules.MaxGiving {
			if addr, took := asks(); addr.IsValid() || took > 0 {
				t.Fatalf("one of the first: %v after %v", addr, took)
			}
		}
		if addr, took := asks(); addr.IsValid() || took != rules.GivingFor {
			t.Errorf("one more, and nobody comes: %v after %v, want the server's after %v", addr, took, rules.GivingFor)
		}
		synctest.Wait() // others are given up at the same time
		comes(1, "fe80::1%eth0", "[fe80::1%eth0]:6881")
		c := comes(2, "192.0.2.2", "192.0.2.2:6881")
		comes(3, "192.0.2.2", "192.0.2.2:6882") // the same host
		if addr, took := asks(); addr != c.addr || took > 0 {
			t.Errorf("who has come: %v after %v, want %v at once", addr, took, c.addr)
		}
		for range rules.NamedTo - 1 {
			asks()
		}
		begin := time.Now()
		select {
		case <-server.names: // it may be named again
		case <-time.After(2 * giverWait):
		}
		if took := time.Since(begin); took != rules.GivingFor {
			t.Errorf("who was named often is named again after %v, want %v", took, rules.GivingFor)
		}
		synctest.Wait() // as many times
		if addr, took := asks(); addr != c.addr || took > 0 {
			t.Errorf("who was named often, later: %v after %v, want %v at once", addr, took, c.addr)
		}
		server.detach(c)
		for n := range rules.MaxGiving {
			if addr, took := asks(); addr.IsValid() || took > 0 {
				t.Errorf("server's %d: %v after %v: %d are awaited", n+1, addr, took, len(server.giving))
			}
		}
		// Those do not come: nobody waits for them, until somebody comes.
		time.Sleep(2 * rules.GivingFor)
		for n := range 2 * rules.MaxGiving {
			if addr, took := asks(); addr.IsValid() || took > 0 {
				t.Errorf("in vain, %d: %v after %v", n+1, addr, took)
			}
		}
		comes(4, "fe80::4%eth0", "[fe80::4%eth0]:6881") // it cannot be named, and has come
		for range rules.MaxGiving {
			asks()
		}
		if _, took := asks(); took != rules.GivingFor {
			t.Errorf("one more: after %v, want %v", took, rules.GivingFor)
		}
		synctest.Wait()
		comes(5, "192.0.2.5", "192.0.2.5:6881") // it gives in place of the server
		for range rules.NamedTo + rules.MaxGiving - 1 {
			if _, took := asks(); took > 0 {
				t.Errorf("after one came: after %v, want at once", took)
			}
		}
		if _, took := asks(); took != rules.GivingFor {
			t.Errorf("and one more: after %v, want %v", took, rules.GivingFor)
		}
		time.Sleep(2 * rules.GivingFor)
		// Perhaps nobody reaches who is named: it is not for ever.
		for len(server.names) > 0 {
			<-server.names
			server.name()
		}
		select {
		case <-server.names:
			t.Error("a node is named again though none has come to whom it was named")
		case <-time.After(2 * giverWait):
		}
		server.mu.Lock()
		defer server.mu.Unlock()
		if len(server.giving) != 0 || len(server.awaited) != 0 {
			t.Errorf("%d places are taken, %d timers run, after all", len(server.giving), len(server.awaited))
		}
	})
}
