package multicast

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"rookery/wire"
)

func TestPass(t *testing.T) {
	for _, tt := range []struct {
		name   string
		needs  []float64
		first  int
		always bool
		all    bool
		want   []order
	}{
		{name: "nothing", needs: []float64{0, 0, 0}},
		{name: "everything", needs: []float64{1, 1, 1}, first: 2, want: []order{{2, 1}, {0, 1}, {1, 1}}},
		{name: "what is lacked", needs: []float64{0, 1, 0.5}, want: []order{{1, 1}, {2, 0.5}}},
		{name: "a little first", needs: []float64{1, 0.1, 0, 0.2}, want: []order{{1, 0.1}, {3, 0.2}}},
		{name: "a little, and all others", needs: []float64{1, 0.1, 0}, all: true, want: []order{{1, 0.1}, {0, 1}}},
		{name: "nobody can say", needs: []float64{0, 0}, always: true, want: []order{{0, 1}, {1, 1}}},
		{name: "somebody can", needs: []float64{0, 0.1}, always: true, want: []order{{1, 0.1}}},
	} {
		if got := pass(tt.needs, tt.first, tt.always, tt.all); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestNeeds(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	sent := []time.Time{{}, at(5), at(15)}
	for _, tt := range []struct {
		name    string
		clients []client
		want    []float64
	}{
		{name: "nobody", want: []float64{0, 0, 0}},
		{name: "one that knows nothing yet", clients: []client{{at: at(10)}}, want: []float64{1, 1, 0}},
		{name: "the one that lacks most counts", clients: []client{
			{Want: wire.Want{Lacks: []byte{51, 0, 255}}, at: at(10)}, {Want: wire.Want{Lacks: []byte{0, 102, 255}}, at: at(10)},
		}, want: []float64{0.2, 0.4, 0}},
		{name: "it may have come since", clients: []client{{Want: wire.Want{Lacks: []byte{255, 255, 255}}, at: at(1)}}, want: []float64{1, 0, 0}},
		{name: "of fewer blocks", clients: []client{{Want: wire.Want{Lacks: []byte{255}}, at: at(20)}}, want: []float64{1, 0, 0}},
	} {
		if got := needs(tt.clients, sent); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// Three of four have enough; a slow one is not what all the others pay for.
func TestParity(t *testing.T) {
	helped := func(lost ...float64) (list []client) {
		for _, l := range lost {
			list = append(list, client{Want: wire.Want{Lost: l, Lacks: []byte{1}, Helped: true}})
		}
		return list
	}
	lose := func(lost ...float64) (list []client) {
		for _, l := range lost {
			list = append(list, client{Want: wire.Want{Lost: l, Lacks: []byte{1}}})
		}
		return list
	}
	for _, tt := range []struct {
		name     string
		clients  []client
		min, max float64
		last     bool
	}{
		{"nobody", nil, 0.01, 0.01, false},
		{"one that cannot say", []client{{}}, 0.1, 0.1, false},
		{"no losses", lose(0, 0, 0), 0, 0, false},
		{"5 %", lose(0.05, 0.05, 0.05, 0.05), 0.06, 0.08, false},
		{"30 %", lose(0.3, 0.3), 0.45, 0.55, false},
		{"5 %, few others help", helped(0.05, 0.05, 0.05, 0.05), 0.06, 0.07, false},
		{"5 %, many others help", helped(slices.Repeat([]float64{0.05}, manyHelp)...), 0.04, 0.05, false},
		{"5 %, many others help, at the end", helped(slices.Repeat([]float64{0.05}, manyHelp)...), 0.06, 0.08, true},
		{"30 %, others help", helped(0.3, 0.3), 0.44, 0.46, false},
		{"a slow one", lose(0, 0, 0, 0, 0, 0, 0.8), 0, 0, false},
		{"none can be waited for", lose(0.95, 0.95), 1, 1.1, false},
	} {
		if got := parity(tt.clients, 0.01, 512, tt.last); got < tt.min || got > tt.max {
			t.Errorf("%s: %.3f, want %.2f to %.2f", tt.name, got, tt.min, tt.max)
		}
	}
}

func TestDemand(t *testing.T) {
	var d Demand
	now := time.Unix(100, 0)
	changed := d.Changed()
	d.Hear(wire.Want{Client: "a"}, now)
	d.Hear(wire.Want{Client: "b"}, now.Add(20*time.Second))
	select {
	case <-changed:
	default:
		t.Error("nobody was told that somebody came")
	}
	if n, _ := d.Clients(now.Add(20 * time.Second)); n != 2 {
		t.Errorf("%d clients, want 2", n)
	}
	if n, _ := d.Clients(now.Add(StaleAfter + 1)); n != 1 {
		t.Errorf("%d clients when one is silent, want 1", n)
	}
	d.Hear(wire.Want{Client: "b", Done: true}, now)
	if n, _ := d.Clients(now); n != 0 {
		t.Errorf("%d clients when all are done, want 0", n)
	}
}
