package sim

import (
	"math/rand/v2"
	"testing"
	"time"
)

// small is a site with everything that can happen, in 2 racks.
func small(seed uint64) Scenario {
	return Scenario{
		Name: "small", N: 40, Bytes: 16 << 20, Piece: 64 << 10, Rate: 2e6, MTU: 9000, Window: 64 << 10,
		Rack: 20, Uplink: 8e6, Die: 0.1, Late: 0.2, Slow: 0.2, Seed: seed,
	}
}

// The same seed gives the same row, another one another.
func TestOneSeedOneRow(t *testing.T) {
	for _, coarse := range []int{0, 32 << 10} {
		c := small(1)
		c.Packet = coarse
		first := Run(c)
		if again := Run(c); again != first {
			t.Errorf("Run: %+v, then %+v", first, again)
		}
		c.Seed = 2
		if other := Run(c); other.Events == first.Events {
			t.Errorf("seeds 1 and 2: both %d events", other.Events)
		}
	}
}

// Nobody has a piece that was not sent by somebody who has it, everybody who lives
// has all in the end, and no link carries more than it can.
func TestNothingComesFromNowhere(t *testing.T) {
	s := newSim(small(3))
	var gave int64
	s.watch = func(from, to *node, p int) {
		gave += int64(s.pieceSize)
		if !from.have.Has(p) {
			t.Fatalf("node %d gets piece %d from node %d, which does not have it", to.id, p, from.id)
		}
		if from.dead && from.died < s.now-int64(s.ideal()) || to.dead {
			t.Fatalf("node %d, dead since %d, gives piece %d to node %d at %d", from.id, from.died, p, to.id, s.now)
		}
	}
	s.play()
	r := s.row()
	if r.Died != 4 || r.Unfinished != 0 || r.Late == 0 || r.Slow == 0 || r.UplinkCopies < 1 {
		t.Errorf("row: %+v, want 4 dead, nobody unfinished, figures of late and slow ones and of uplinks", r)
	}
	var up, down, kept int64
	for _, n := range s.nodes {
		up += n.up.carried
		down += n.down.carried
		if !n.server {
			kept += int64(len(n.order)) * int64(s.pieceSize)
			if !n.dead && len(n.order) != s.pieces {
				t.Errorf("node %d has %d of %d pieces", n.id, len(n.order), s.pieces)
			}
		}
		for way, l := range map[string]link{"up": n.up, "down": n.down} {
			if busy := float64(l.carried) * l.perByte; busy > float64(max(l.free, s.now))*1.0001 {
				t.Errorf("node %d %s: %d bytes need %.0f ns, there were %d", n.id, way, l.carried, busy, max(l.free, s.now))
			}
		}
	}
	if down > up || kept > gave || kept > down {
		t.Errorf("%d bytes sent, %d arrived, in pieces %d, kept %d", up, down, gave, kept)
	}
}

// What is lost with a node is given out again: when half of them lose power, the
// others are done all the same.
func TestHalfDies(t *testing.T) {
	c := small(4)
	c.Die, c.Late, c.Slow = 0.5, 0, 0
	if r := Run(c); r.Died != 20 || r.Unfinished != 0 {
		t.Errorf("row: %+v, want 20 dead and nobody unfinished", r)
	}
}

// Links of half the rate take twice as long, and cost the others little: a tenth of all
// links is missing, and a slow one brings as many pieces into its rack as any other. In
// so small a site one run says little.
func TestSlowLinks(t *testing.T) {
	const runs = 3
	var with, without float64
	for seed := range uint64(runs) {
		c := small(seed)
		c.Die, c.Late, c.Slow = 0, 0, 0.2
		r := Run(c)
		if r.Slow < 1 || r.Slow > 1.3 {
			t.Errorf("seed %d: slow ones took %.3f of twice the ideal time", seed, r.Slow)
		}
		c.Slow = 0
		with, without = with+r.TOverIdeal/runs, without+Run(c).TOverIdeal/runs
	}
	if with > 1.2*without {
		t.Errorf("last %.3f with slow ones, %.3f without", with, without)
	}
}

// On a fair link what begins a flow waits for the card only, others wait for it, and
// all bytes take their time.
func TestWhatBeginsAFlowGoesFirst(t *testing.T) {
	const ms = int64(time.Millisecond)
	l := newLink(1e6) // a byte takes a microsecond
	l.fair = true
	for i, tt := range []struct {
		carry func(int64, int) int64
		now   int64
		n     int
		want  int64
	}{
		{l.carry, 0, 100_000, 100 * ms},
		{l.starts, 0, 1000, 2 * ms},
		{l.starts, 0, 1000, 3 * ms},
		{l.starts, 50 * ms, 1000, 52 * ms},
		{l.starts, 50 * ms, 10_000, 113 * ms},
		{l.carry, 50 * ms, 1000, 114 * ms},
		{l.starts, 200 * ms, 1000, 201 * ms},
		{l.carry, 200 * ms, 1000, 202 * ms},
	} {
		if got := tt.carry(tt.now, tt.n); got != tt.want {
			t.Errorf("%d: %d bytes at %d have passed at %d, want %d", i, tt.n, tt.now, got, tt.want)
		}
	}
}

func TestQueue(t *testing.T) {
	const slot = 1 << slotBits
	var q queue
	var all int
	chance := rand.New(rand.NewPCG(1, 1))
	push := func(at int64) {
		q.push(event{at: at, x: int32(all)})
		all++
	}
	for _, at := range []int64{5, 3, 9, 3, 1, slot, slot, 8, 2 * slots * slot, 2*slots*slot - 1, slots * slot, slots*slot - 1, (slots + 1) * slot, 5 * slots * slot} {
		push(at)
	}
	last := event{at: -1}
	for came := range 1000 {
		if q.len() != all-came {
			t.Errorf("%d events, want %d", q.len(), all-came)
		}
		if q.len() == 0 {
			break
		}
		ev := q.pop()
		if !before(&last, &ev) || ev.x != int32(ev.n)-1 {
			t.Errorf("%+v after %+v", ev, last)
		}
		last = ev
		if ev.at == (slots+1)*slot {
			push(2*slots*slot + 1) // soon, in the slot of one that was late
		}
		for range chance.IntN(4) {
			if all < 899 { // and the one above
				push(ev.at + chance.Int64N(1<<chance.IntN(40)))
			}
		}
	}
	if all != 900 || q.len() != 0 {
		t.Errorf("%d events planned and %d left, want 900 and 0", all, q.len())
	}
}
