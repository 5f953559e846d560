package main

import (
	"math"
	"testing"
)

// What was measured on real links comes out on paper, within a twentieth.
func TestSimulationIsAsMeasured(t *testing.T) {
	if raced {
		t.Skip("takes minutes with the race detector, and has one goroutine: run it without -race, as `make unit` does too")
	}
	for _, m := range measured {
		r := game{onLinks(m.load), 3}.play()
		t.Logf("%d nodes: last %.3f, measured %.3f; egress %.3f, measured %.3f", m.n, r.TOverIdeal, m.last, r.Egress, m.egress)
		if math.Abs(r.TOverIdeal/m.last-1) > 0.05 {
			t.Errorf("%d nodes: last %.3f, measured %.3f", m.n, r.TOverIdeal, m.last)
		}
		if math.Abs(r.Egress/m.egress-1) > 0.05 {
			t.Errorf("%d nodes: egress %.3f, measured %.3f", m.n, r.Egress, m.egress)
		}
	}
}
