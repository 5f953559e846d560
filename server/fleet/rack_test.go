package fleet_test

import (
	"fmt"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"rookery/server/fleet"
	"rookery/transport/tracker"
	"rookery/wire"
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

func TestRackByLLDP(t *testing.T) {
	s := newSite(t)
	s.apply(`
kind: Defaults
image: debian12:1
---
kind: Node
name: n1
macs: ["52:54:00:00:00:01", "52:54:00:00:01:01"]
address: 10.0.0.7/24
`)
	type card struct{ addr, at string }
	says := func(boot string, cards ...card) {
		t.Helper()
		h := hello(boot, "52:54:00:00:00:01", "52:54:00:00:01:01")
		for i, c := range cards {
			h.Inventory.NICs[i].Address = c.addr
			if c.at != "" {
				h.Inventory.NICs[i].Neighbor = &wire.Neighbor{Switch: c.at, Port: "Gi1/0/7"}
			}
		}
		if _, err := s.Hello(t.Context(), h); err != nil {
			t.Fatal(err)
		}
	}
	const addr = "10.0.0.7/24"
	lldp := func(name string) *fleet.Rack { return &fleet.Rack{Name: name, From: "LLDP"} }
	before := func(name string) *fleet.Rack { return &fleet.Rack{Name: name, From: "LLDP, the start before"} }
	for _, tt := range []struct {
		name string
		do   func()
		want *fleet.Rack
	}{
		{"nothing heard", func() { says(boots[0], card{addr: addr}) }, nil},
		{"another card's switch", func() { says(boots[0], card{addr: addr}, card{at: "mgmt1"}) }, nil},
		{"the same start hears", func() { says(boots[0], card{addr, "leaf07"}, card{at: "mgmt1"}) }, lldp("leaf07")},
		{"the server starts anew", s.restart, lldp("leaf07")},
		{"the node starts anew and has not yet", func() { says(boots[1], card{addr: addr}) }, before("leaf07")},
		{"an installation is asked for", func() {
			if err := s.Install(t.Context(), "n1"); err != nil {
				t.Fatal(err)
			}
		}, before("leaf07")},
		{"the server starts anew once more", s.restart, before("leaf07")},
		{"no card has an address yet", func() { says(boots[1]) }, before("leaf07")},
		{"the cable is in another switch", func() { says(boots[1], card{addr, "leaf08"}) }, lldp("leaf08")},
		{"the address is on the other card", func() { says(boots[1], card{}, card{addr: addr}) }, before("mgmt1")},
		{"no card has an address", func() { says(boots[1], card{}, card{at: "mgmt2"}) }, lldp("mgmt2")},
		{"a name too long", func() { says(boots[1], card{addr, strings.Repeat("x", 65)}) }, nil},
		{"a name as long as can be", func() { says(boots[1], card{addr, strings.Repeat("x", 64)}) }, lldp(strings.Repeat("x", 64))},
		{"the DHCP relay comes first", func() {
			s.Relayed("52:54:00:00:00:01", "10.0.1.1")
			says(boots[1], card{addr, "leaf07"})
		}, &fleet.Rack{Name: "10.0.1.1", From: "the DHCP relay"}},
		{"and the record before all", func() {
			if err := s.Edit(t.Context(), "n1", func(n *fleet.Node) error { n.Rack = "r07"; return nil }); err != nil {
				t.Fatal(err)
			}
		}, &fleet.Rack{Name: "r07", From: "the node's record"}},
	} {
		tt.do()
		if got := s.node("n1").Rack; !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
		tracker := tracker.New(func([20]byte) bool { return true })
		tracker.Rack = s.RackAt
		req := httptest.NewRequest("GET", wire.PathAnnounce+"?info_hash=xxxxxxxxxxxxxxxxxxxx&peer_id=-RKP1-xxxxxxxxxxxxxx&port=6881&left=5&compact=1", nil)
		req.RemoteAddr = "10.0.0.7:40000"
		answer := httptest.NewRecorder()
		tracker.ServeHTTP(answer, req)
		rack := "10.0.0.0/24"
		if tt.want != nil {
			rack = tt.want.Name
		}
		if want := fmt.Sprintf("4:rack%d:%s", len(rack), rack); !strings.Contains(answer.Body.String(), want) {
			t.Errorf("%s: the tracker answers %q, want %q in it", tt.name, answer.Body, want)
		}
	}
}

// A node was moved to where no switch is heard: what it heard elsewhere counts for two
// minutes of its first start there.
func TestRackOfAMovedNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.apply(oneNode)
		says := func(boot, at string) {
			t.Helper()
			h := hello(boot, mac1)
			h.Inventory.NICs[0].Address = "10.0.0.7/24"
			if at != "" {
				h.Inventory.NICs[0].Neighbor = &wire.Neighbor{Switch: at}
			}
			if _, err := s.Hello(t.Context(), h); err != nil {
				t.Fatal(err)
			}
		}
		for _, tt := range []struct {
			name string
			do   func()
			want string
		}{
			{"it hears", func() { says(boots[0], "leaf07") }, "leaf07"},
			{"and is up for a month", func() { time.Sleep(30 * 24 * time.Hour) }, "leaf07"},
			{"it is moved", func() { says(boots[1], "") }, "leaf07"},
			{"the switch could still speak", func() { time.Sleep(119 * time.Second); says(boots[1], "") }, "leaf07"},
			{"it does not", func() { time.Sleep(time.Second) }, ""},
			{"it starts anew", func() { says(boots[2], "") }, ""},
			{"and once more", func() { says(boots[0], "") }, ""},
			{"a switch learns to speak", func() { time.Sleep(time.Hour); says(boots[0], "leaf08") }, "leaf08"},
			{"it starts anew at once", func() { says(boots[1], "") }, "leaf08"},
			{"and once more before anything is heard", func() { says(boots[2], "") }, ""},
		} {
			tt.do()
			if got := s.RackAt(netip.MustParseAddr("10.0.0.7")); got != tt.want {
				t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
			}
			if got := s.node("n1").Rack; (got == nil) != (tt.want == "") || got != nil && got.Name != tt.want {
				t.Errorf("%s: %v, want %q", tt.name, got, tt.want)
			}
		}
	})
}

// A machine that nobody knew brings along what it heard.
func TestRackOfAnAcceptedMachine(t *testing.T) {
	s := newSite(t)
	h := hello(boots[0], mac1)
	h.Inventory.NICs[0].Neighbor = &wire.Neighbor{Switch: "leaf07"}
	if _, err := s.Hello(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	if err := s.Accept(t.Context(), mac1, fleet.Node{Name: "n1", Settings: fleet.Settings{Image: "debian12"}}); err != nil {
		t.Fatal(err)
	}
	if got := s.node("n1").Rack; got == nil || got.Name != "leaf07" {
		t.Errorf("%v, want leaf07", got)
	}
}
