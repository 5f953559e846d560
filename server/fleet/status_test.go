package fleet

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"rookery/wire"
)

var (
	bootA = strings.Repeat("a", 32)
	bootB = strings.Repeat("b", 32)
	noon  = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
)

// running is a node whose agent has the script of the installation "1".
func running() Status {
	s := Status{}.request(wire.Install, "1").hello(wire.Hello{Boot: bootA}, noon)
	return s.fetched("debian12", Image{Image: wire.Image{Name: "debian12:1"}})
}

func event(boot string, seq int, phase wire.Phase, state wire.State) wire.Event {
	return wire.Event{Boot: boot, Seq: seq, Phase: phase, State: state, Took: float64(seq), Text: fmt.Sprintf("text %d", seq)}
}

func TestStatusEvent(t *testing.T) {
	type want struct {
		next   wire.Do
		phases string
		failed string
	}
	for _, tt := range []struct {
		name   string
		start  Status
		events []wire.Event
		want   want
	}{
		{"started and finished", running(), []wire.Event{
			event(bootA, 1, wire.PhasePlan, wire.Started),
			event(bootA, 2, wire.PhasePlan, wire.Finished),
			event(bootA, 3, wire.PhaseFetch, wire.Started),
		}, want{next: wire.Install, phases: "plan finished 2, fetch started 0"}},
		{"only the ending was heard", running(), []wire.Event{
			event(bootA, 4, wire.PhasePlan, wire.Finished),
		}, want{next: wire.Install, phases: "plan finished 4"}},
		{"a repeated event counts once", running(), []wire.Event{
			event(bootA, 1, wire.PhasePlan, wire.Started),
			event(bootA, 2, wire.PhasePlan, wire.Finished),
			event(bootA, 1, wire.PhasePlan, wire.Started),
		}, want{next: wire.Install, phases: "plan finished 2"}},
		{"an earlier start of the agent counts no more", running(), []wire.Event{
			event(bootB, 9, wire.PhaseEnd, wire.Finished),
		}, want{next: wire.Install}},
		{"the end is the end", running(), []wire.Event{
			event(bootA, 1, wire.PhaseFetch, wire.Finished),
			event(bootA, 2, wire.PhaseEnd, wire.Finished),
		}, want{next: wire.Local, phases: "fetch finished 1, end finished 2"}},
		{"a failed installation stays one", running(), []wire.Event{
			event(bootA, 1, wire.PhaseFetch, wire.Failed),
			event(bootA, 2, wire.PhaseEnd, wire.Finished),
		}, want{next: wire.Install, phases: "fetch failed 1, end finished 2", failed: "fetch: text 1"}},
		{"what was tried again and worked is no failure", running(), []wire.Event{
			event(bootA, 1, wire.PhaseFetch, wire.Failed),
			event(bootA, 2, wire.PhaseFetch, wire.Started),
			event(bootA, 3, wire.PhaseFetch, wire.Finished),
			event(bootA, 4, wire.PhaseEnd, wire.Finished),
		}, want{next: wire.Local, phases: "fetch finished 3, end finished 4"}},
		{"an agent without a script installs nothing", Status{}.request(wire.Install, "1").hello(wire.Hello{Boot: bootA}, noon), []wire.Event{
			event(bootA, 1, wire.PhaseEnd, wire.Finished),
		}, want{next: wire.Install, phases: "end finished 1"}},
		{"asked for again meanwhile", running().request(wire.Install, "2"), []wire.Event{
			event(bootA, 7, wire.PhaseEnd, wire.Finished),
		}, want{next: wire.Install, phases: "end finished 7"}},
		{"a log line is no phase", running(), []wire.Event{
			event(bootA, 1, wire.PhaseFetch, wire.Log),
		}, want{next: wire.Install}},
		{"a failure is shown until an installation succeeds", func() Status {
			s, _ := running().event(event(bootA, 1, wire.PhasePartition, wire.Failed), noon)
			return s.hello(wire.Hello{Boot: bootB}, noon).fetched("debian12", Image{})
		}(), []wire.Event{
			event(bootB, 1, wire.PhasePartition, wire.Started),
		}, want{next: wire.Install, phases: "partition started 0", failed: "partition: text 1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := tt.start
			for _, e := range tt.events {
				before := fmt.Sprintf("%+v", s)
				was := s
				s, _ = s.event(e, noon)
				if after := fmt.Sprintf("%+v", was); after != before {
					t.Fatalf("event changed the state it was given:\n%s\n%s", before, after)
				}
			}
			got := want{next: s.Next}
			var phases []string
			for _, p := range s.Phases {
				phases = append(phases, fmt.Sprintf("%s %s %v", p.Phase, p.State, p.Seconds))
			}
			got.phases = strings.Join(phases, ", ")
			if s.Error != nil {
				got.failed = string(s.Error.Step) + ": " + s.Error.Cause
			}
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestTurns(t *testing.T) {
	s := running()
	for seq := 1; seq <= maxTurns+3; seq++ {
		s, _ = s.event(event(bootA, seq, wire.PhaseFetch, wire.Switched), noon)
	}
	if len(s.Phases) != 0 || len(s.Turns) != maxTurns || s.Turns[0] != (Turn{wire.PhaseFetch, noon, "text 4"}) {
		t.Errorf("%d phases and the turns %+v, want the last %d", len(s.Phases), s.Turns, maxTurns)
	}
	if s = s.hello(wire.Hello{Boot: bootB}, noon); len(s.Turns) != 0 {
		t.Errorf("turns of an earlier start: %+v", s.Turns)
	}
}

func TestHelloStartsTheStoryAnew(t *testing.T) {
	s, _ := running().event(event(bootA, 5, wire.PhaseFetch, wire.Started), noon)
	if again := s.hello(wire.Hello{Boot: bootA}, noon); again.Seq != 5 || len(again.Phases) != 1 || len(again.Boots) != 1 {
		t.Errorf("a repeated hello changed the state: %+v", again)
	}
	fresh := s.hello(wire.Hello{Boot: bootB}, noon.Add(time.Minute))
	if fresh.Seq != 0 || fresh.Phases != nil || fresh.Script != "" || fresh.ID != s.ID || fresh.Image != s.Image {
		t.Errorf("after a new hello: %+v", fresh)
	}
	if want := []Boot{{bootA, noon}, {bootB, noon.Add(time.Minute)}}; !reflect.DeepEqual(fresh.Boots, want) {
		t.Errorf("boots %v, want %v", fresh.Boots, want)
	}
	for i := range 100 {
		fresh = fresh.hello(wire.Hello{Boot: fmt.Sprintf("%032x", i)}, noon)
	}
	if len(fresh.Boots) != maxBoots {
		t.Errorf("%d boots remembered, want %d", len(fresh.Boots), maxBoots)
	}
}

func TestHistoryIsBoundedAndKeepsTheStory(t *testing.T) {
	var history []NodeEvent
	for n := range 2 * maxHistory {
		e := NodeEvent{N: int64(n), Event: event(bootA, n, wire.PhaseFetch, wire.Log)}
		if n%100 == 0 {
			e.State = wire.Finished
		}
		history = remember(history, e)
	}
	phases := 0
	for i, e := range history {
		if e.State == wire.Finished {
			phases++
		}
		if i > 0 && e.N <= history[i-1].N {
			t.Fatalf("event %d after %d", e.N, history[i-1].N)
		}
	}
	if len(history) != maxHistory || phases != 2*maxHistory/100 {
		t.Errorf("%d events with %d phases, want %d with %d", len(history), phases, maxHistory, 2*maxHistory/100)
	}

	for n := range 100 { // long ones, all of them part of the story
		e := NodeEvent{N: int64(n), Event: event(bootA, n, wire.PhaseFetch, wire.Failed)}
		e.Text = strings.Repeat("x", 4096)
		history = remember(history, e)
	}
	bytes := 0
	for _, e := range history {
		bytes += e.size()
	}
	if bytes > maxHistoryBytes || len(history) == 0 || history[len(history)-1].N != 99 {
		t.Errorf("%d events of %d bytes, want at most %d and the last one among them", len(history), bytes, maxHistoryBytes)
	}
}

func TestMatch(t *testing.T) {
	const (
		u1, u2 = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
		m1, m2 = "52:54:00:00:00:01", "52:54:00:00:00:02"
		m3     = "52:54:00:00:00:03"
	)
	ids := newIndex(map[string]Node{
		"n1": {Name: "n1", MACs: []string{m1}, UUID: u1},
		"n2": {Name: "n2", MACs: []string{m2}, UUID: u2, Serial: "S2"},
	})
	for _, tt := range []struct {
		name         string
		uuid, serial string
		macs         []string
		want         string
		err          string
	}{
		{name: "by MAC", macs: []string{m3, m1}, want: "n1"},
		{name: "by MAC in capitals", macs: []string{"52-54-00-00-00-01"}, want: "n1"},
		{name: "nobody", macs: []string{m3}},
		{name: "by UUID, with a new card", macs: []string{m3}, uuid: strings.ToUpper(u2), want: "n2"},
		{name: "by serial number", macs: []string{m3}, serial: "S2", want: "n2"},
		{name: "a moved card takes its node along", macs: []string{m1}, uuid: u2, want: "n1"},
		{name: "cards of two nodes, own UUID", macs: []string{m1, m2}, uuid: u2, want: "n2"},
		{name: "cards of two nodes", macs: []string{m2, m1}, err: "this machine has MAC addresses of several nodes: n1, n2"},
		{name: "a machine that does not say who it is"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inv := wire.Inventory{UUID: tt.uuid, Serial: tt.serial}
			for _, m := range tt.macs {
				inv.NICs = append(inv.NICs, wire.NIC{MAC: m})
			}
			got, err := ids.match(inv)
			if got != tt.want || fmt.Sprint(err) != cmpOr(tt.err, "<nil>") {
				t.Errorf("match: %q, %v, want %q, %s", got, err, tt.want, tt.err)
			}
		})
	}
}

func cmpOr(s, or string) string {
	if s == "" {
		return or
	}
	return s
}

func TestNewcomersAreBounded(t *testing.T) {
	var all newcomers
	hello := func(n int) wire.Hello {
		return wire.Hello{Boot: bootA, Inventory: wire.Inventory{NICs: []wire.NIC{{MAC: fmt.Sprintf("52:54:00:00:%02x:%02x", n>>8, n&0xff)}}}}
	}
	for n := range maxNewcomers + 10 {
		all.add(hello(n), noon.Add(time.Duration(n)*time.Second))
	}
	if len(all.byMAC) != maxNewcomers || all.find("52:54:00:00:00:09") != nil || all.find("52:54:00:00:00:0a") == nil {
		t.Errorf("%d machines, want %d without the ten oldest", len(all.byMAC), maxNewcomers)
	}
	if all.add(hello(20), noon) {
		t.Error("a machine that says hello again is no new one")
	}
	all = newcomers{}
	all.add(hello(0), noon)
	big := wire.Hello{Inventory: wire.Inventory{NICs: []wire.NIC{{MAC: "52:54:01:00:00:00"}}, Vendor: strings.Repeat("x", maxNewcomerBytes/2)}}
	for n := range 3 {
		big.Inventory.NICs = []wire.NIC{{MAC: fmt.Sprintf("52:54:01:00:00:%02x", n)}}
		all.add(big, noon.Add(24*time.Hour))
	}
	if all.bytes > maxNewcomerBytes || all.find("52:54:01:00:00:02") == nil {
		t.Errorf("machines take %d bytes, want at most %d and the latest among them", all.bytes, maxNewcomerBytes)
	}
	for _, c := range all.list() {
		all.remove(c)
	}
	if all.bytes != 0 {
		t.Errorf("no machine takes %d bytes", all.bytes)
	}
}

func TestNetwork(t *testing.T) {
	nic := func(mac string, carrier bool) wire.NIC { return wire.NIC{MAC: mac, Carrier: carrier} }
	n := Node{MACs: []string{"a", "b"}, Address: "10.0.0.7/24", Settings: Settings{Gateway: "10.0.0.1"}}
	for _, tt := range []struct {
		name string
		node Node
		nics []wire.NIC
		want []wire.Network
	}{
		{"the first of the record", n, []wire.NIC{nic("b", true), nic("a", false)}, []wire.Network{{MAC: "a", Address: "10.0.0.7/24", Gateway: "10.0.0.1"}}},
		{"the first that is there", n, []wire.NIC{nic("c", true), nic("b", false)}, []wire.Network{{MAC: "b", Address: "10.0.0.7/24", Gateway: "10.0.0.1"}}},
		{"none of them is there", n, []wire.NIC{nic("c", false), nic("d", true)}, []wire.Network{{MAC: "d", Address: "10.0.0.7/24", Gateway: "10.0.0.1"}}},
		{"nothing is known of the machine", n, nil, []wire.Network{{MAC: "a", Address: "10.0.0.7/24", Gateway: "10.0.0.1"}}},
		{"DHCP gives the gateway too", Node{MACs: []string{"a"}, Settings: Settings{Gateway: "10.0.0.1"}}, nil, []wire.Network{{MAC: "a"}}},
		{"nothing is known at all", Node{UUID: "u"}, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var inv *wire.Inventory
			if tt.nics != nil {
				inv = &wire.Inventory{NICs: tt.nics}
			}
			if got := network(tt.node, inv); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("network: %v, want %v", got, tt.want)
			}
		})
	}
}

func TestToken(t *testing.T) {
	key := []byte("key")
	token := newToken(key, "n1", bootA)
	if node, boot, ok := openToken(key, token); node != "n1" || boot != bootA || !ok {
		t.Errorf("openToken: %q, %q, %v", node, boot, ok)
	}
	for _, forged := range []string{
		"", ".", "..", token + ".", token[:len(token)-1], strings.Replace(token, "n1", "n2", 1),
		strings.Replace(token, bootA, bootB, 1), newToken([]byte("other"), "n1", bootA),
	} {
		if _, _, ok := openToken(key, forged); ok {
			t.Errorf("openToken(%q): taken", forged)
		}
	}
}

func TestMachineID(t *testing.T) {
	a, b := machineID("1"), machineID("2")
	if a == b || len(a) != 32 || a[12] != '4' || !strings.Contains("89ab", a[16:17]) || machineID("1") != a {
		t.Errorf("machineID: %s, %s, want two random UUIDs in hex", a, b)
	}
}
