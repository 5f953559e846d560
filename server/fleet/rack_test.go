package fleet_test

import (
	"net/netip"
	"strings"
	"testing"

	"rookery/server/fleet"
)

func TestRack(t *testing.T) {
	s := newSite(t)
	s.apply(`
kind: Defaults
image: debian12:1
---
kind: Node
name: n1
macs: ["52:54:00:00:00:01"]
address: 10.0.0.7/24
rack: r07
---
kind: Node
name: n2
macs: ["52:54:00:00:00:02"]
---
kind: Node
name: n3
macs: ["52:54:00:00:00:03"]
---
kind: Group
name: row2
rack: r21
---
kind: Node
name: n4
macs: ["52:54:00:00:00:04"]
groups: [row2]
`)
	says := func(mac, addr string) {
		t.Helper()
		h := hello(boots[0], mac)
		h.Inventory.NICs[0].Address = addr
		if _, err := s.Hello(t.Context(), h); err != nil {
			t.Fatal(err)
		}
	}
	says("52:54:00:00:00:03", "10.0.2.9/24")
	s.Relayed("52:54:00:00:00:02", "10.0.1.1")
	s.Relayed("52:54:00:00:00:01", "10.0.1.1")
	says("52:54:00:00:00:01", "10.0.3.7/24")
	says("52:54:00:00:00:02", "10.0.1.9/24")

	check := func(when string) {
		t.Helper()
		for _, tt := range []struct{ addr, want string }{
			{"10.0.0.7", "r07"}, // by its record's address
			{"10.0.3.7", "r07"}, // and that of its hello
			{"10.0.1.9", "10.0.1.1"},
			{"10.0.2.9", ""},
			{"10.0.9.9", ""},
		} {
			if got := s.RackAt(netip.MustParseAddr(tt.addr)); got != tt.want {
				t.Errorf("%s: %s is in %q, want %q", when, tt.addr, got, tt.want)
			}
		}
		for name, want := range map[string]*fleet.Rack{"n1": {Name: "r07", From: "the node's record"}, "n2": {Name: "10.0.1.1", From: "the DHCP relay"}, "n3": nil, "n4": {Name: "r21", From: "group row2"}} {
			if got := s.node(name).Rack; (got == nil) != (want == nil) || got != nil && *got != *want {
				t.Errorf("%s: %s is in %v, want %v", when, name, got, want)
			}
		}
	}
	check("at once")
	s.restart()
	check("after a restart")
	if err := s.Install(t.Context(), "n2"); err != nil {
		t.Fatal(err)
	}
	check("when it is installed anew")
	says("52:54:00:00:00:03", "10.0.1.9/24")
	if got := s.RackAt(netip.MustParseAddr("10.0.1.9")); got != "" {
		t.Errorf("another node has the address by now, and is in %q", got)
	}

	for _, name := range []string{"r 7", "-r7", strings.Repeat("r", 65)} {
		err := s.Edit(t.Context(), "n1", func(n *fleet.Node) error { n.Rack = name; return nil })
		if err == nil || !strings.Contains(err.Error(), "rack: ") {
			t.Errorf("rack %q: %v", name, err)
		}
	}
}
