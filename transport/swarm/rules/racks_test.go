package rules

import (
	"crypto/sha1"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// id is as random as those of peers.
func id(n byte) [20]byte { return sha1.Sum([]byte{n}) }

// Each piece has one node that brings it in, each node about as many, and a mate
// that comes or goes takes only its own along.
func TestLots(t *testing.T) {
	const pieces, nodes = 4000, 8
	var ids [][20]byte
	for range nodes {
		ids = append(ids, id(byte(len(ids))))
	}
	firsts := func(ids [][20]byte) []int {
		first := make([]int, pieces)
		for n := range first {
			first[n] = -1
		}
		for i, id := range ids {
			mates := slices.Concat(ids[:i], ids[i+1:])
			for n, k := range before(id, mates, pieces) {
				if k > 0 {
					continue
				}
				if first[n] >= 0 {
					t.Fatalf("piece %d is that of nodes %d and %d", n, first[n], i)
				}
				first[n] = i
			}
		}
		return first
	}
	all, fewer := firsts(ids), firsts(ids[:nodes-1])
	count := make([]int, nodes)
	for n, first := range all {
		if first < 0 {
			t.Fatalf("piece %d is nobody's", n)
		}
		count[first]++
		if first < nodes-1 && fewer[n] != first {
			t.Fatalf("piece %d is that of node %d, and of %d when another one is gone", n, first, fewer[n])
		}
	}
	if least, most := slices.Min(count), slices.Max(count); least < pieces/nodes*3/4 || most > pieces/nodes*5/4 {
		t.Errorf("nodes bring in %v of %d pieces", count, pieces)
	}
}

// A racked is a peer in a rack, with what it has.
type racked struct {
	Client
	has map[int]bool
}

func (p *racked) Offers() *Client { return &p.Client }
func (p *racked) Has(n int) bool  { return p.has[n] }

// A room is a server and peers that join it.
type room struct {
	Handout[*racked]
	peers  []*racked
	copies []int32
	now    time.Time
}

func newRoom(pieces int) *room {
	return &room{Handout: NewHandout[*racked](make([]bool, pieces)), copies: make([]int32, pieces), now: time.Unix(0, 0)}
}

func (r *room) join(rack string) *racked {
	p := &racked{NewClient(len(r.copies), netip.AddrFrom4([4]byte{10, 0, 0, byte(len(r.peers))}), r.now), map[int]bool{}}
	p.ID, p.Met, p.took = id(byte(len(r.peers))), true, true
	r.peers = append(r.peers, p)
	r.Stand(p, rack)
	r.Idle = false
	return p
}

// offer lets the server offer what it likes, and says how often it has offered each
// piece in each rack.
func (r *room) offer() []map[string]int {
	r.Offer(slices.Values(r.peers), r.copies, 1<<16, 1<<20, r.now, func(*racked, int) {})
	of := make([]map[string]int, len(r.copies))
	for n := range of {
		of[n] = map[string]int{}
		for _, p := range r.peers {
			if p.told.Has(n) {
				of[n][p.Rack]++
			}
		}
	}
	return of
}

func (r *room) gains(p *racked, n int) {
	p.has[n] = true
	r.copies[n]++
	r.Taken(p, n, r.now)
}

// A server offers a piece to one peer of each rack, and to another one of it when
// that does not take it. In one rack alone it offers each to anybody.
func TestOffersToRacks(t *testing.T) {
	r := newRoom(4)
	for range 3 {
		r.join("r1")
	}
	first := r.offer()
	total := 0
	for _, of := range first {
		total += of["r1"]
	}
	if total <= len(first) {
		t.Errorf("in one rack %d offers of %d pieces", total, len(first))
	}
	for range 3 {
		r.join("r2")
	}
	r.join("r3")
	for n, of := range r.offer() {
		if of["r2"] != 1 || of["r3"] != 1 || of["r1"] != first[n]["r1"] {
			t.Errorf("piece %d is offered to %v, want to one of r2 and of r3, and to no more of r1 than %d", n, of, first[n]["r1"])
		}
	}
	r.now = r.now.Add(StallAfter + time.Second)
	r.Expire(r.now)
	r.Idle = false
	for n, of := range r.offer() {
		if of["r2"] != 2 || of["r3"] != 1 {
			t.Errorf("piece %d, offered in vain, is now offered to %v, want to two of r2", n, of)
		}
	}
}

// Where the rack of a piece's first bearer has it, other racks get it from the server
// all the same, however many peers there are.
func TestEveryRackIsHelped(t *testing.T) {
	r := newRoom(4)
	for range 2 * maxHelped {
		r.join("r1")
	}
	for n := range r.copies {
		r.gains(r.peers[n], n)
	}
	r.join("r2")
	for n, of := range r.offer() {
		if of["r1"] != 0 || of["r2"] != 1 {
			t.Errorf("piece %d, which r1 has, is offered to %v, want to r2", n, of)
		}
	}
}

// A peer that has no use for a piece does not bring it in.
func TestUsesInRacks(t *testing.T) {
	r := newRoom(4)
	a, _, _ := r.join("r1"), r.join("r1"), r.join("r2")
	a.Use = make([]bool, 4)
	r.Uses(a)
	for n, of := range r.offer() {
		if of["r1"] != 1 || a.told.Has(n) {
			t.Errorf("piece %d is offered to %v, to who has no use for it: %v", n, of, a.told.Has(n))
		}
	}
}

// A share counts who has what, whatever is known first, and forgets who is gone.
func TestShares(t *testing.T) {
	r := newRoom(4)
	a, b := r.join(""), r.join("r1")
	r.gains(a, 1)
	r.Stand(a, "r1")
	for n := range 4 {
		r.gains(b, n)
	}
	r.Stand(b, "r2")
	r.Stand(b, "r1")
	if got := r.racks["r1"].live; !slices.Equal(got, []int32{1, 2, 1, 1}) {
		t.Errorf("pieces are live %v", got)
	}
	r.Forget(b)
	if got := r.racks["r1"].live; !slices.Equal(got, []int32{0, 1, 0, 0}) {
		t.Errorf("when one is gone %v", got)
	}
	r.Forget(a)
	if n := len(r.racks); n != 0 {
		t.Errorf("%d racks of nobody", n)
	}
}

// A mate sleeps when it gets nothing while we do.
func TestSleepers(t *testing.T) {
	came := time.Unix(100, 0)
	for _, tt := range []struct {
		mate   bool
		ours   time.Duration
		sleeps bool
	}{
		{true, -time.Hour, false},
		{true, asleep, false},
		{true, asleep + 1, true},
		{false, asleep + 1, false},
	} {
		f := Feed{Mate: tt.mate, Gained: came}
		if changed := f.Watch(came.Add(tt.ours)); f.Sleeps != tt.sleeps || changed != tt.sleeps || f.Watch(came.Add(tt.ours)) {
			t.Errorf("mate %v, ours %v later: sleeps %v, want %v", tt.mate, tt.ours, f.Sleeps, tt.sleeps)
		}
	}
}

// A known is a peer that gives.
type known struct{ Feed }

func (k *known) Gives() *Feed { return &k.Feed }

// Mates do not crowd out the last connections to other racks: a large rack would have
// nothing but the server to bring in pieces from. Of those that may end, the one that
// is asked for least does.
func TestCrowded(t *testing.T) {
	mate := func(open int) *known { return &known{Feed{Mate: true, Open: open}} }
	far := func(open int) *known { return &known{Feed{Far: true, Open: open}} }
	mates, enough, few := []*known{mate(2), mate(1)}, []*known{far(1), far(1), far(0), far(2), far(1)}, []*known{far(1), far(0), far(2), far(1)}
	for _, tt := range []struct {
		comes  *known
		others []*known
		leaves int // of others; -1: who comes
	}{
		{mate(0), slices.Concat(mates, enough), 4},
		{mate(0), slices.Concat(mates, few), -1},
		{mate(0), slices.Concat(mates, []*known{mate(0)}, few), 2},
		{far(0), slices.Concat(mates, few), -1},
		{far(0), slices.Concat(mates, few[1:]), 1},
		{&known{}, slices.Concat(mates, enough), -1},
	} {
		want := tt.comes
		if tt.leaves >= 0 {
			want = tt.others[tt.leaves]
		}
		if got := Crowded(tt.comes, slices.Values(append(tt.others, tt.comes))); got != want {
			t.Errorf("comes %+v beside %d: leaves %+v, want %+v", tt.comes, len(tt.others), got, want)
		}
	}
}

func TestEnough(t *testing.T) {
	for _, tt := range []struct {
		count, far int
		abroad     bool
		want       bool
	}{
		{Wanted - 1, 0, false, false},
		{Wanted, 0, false, true},
		{Wanted, leastFar - 1, true, false},
		{Wanted, leastFar, true, true},
		{Wanted, minFar, true, true},
		{Wanted, Wanted - minMates, true, true},
		{Wanted, Wanted - minMates + 1, true, false},
		{MaxNode - minFree - 1, 0, true, false},
		{MaxNode - minFree, 0, true, true},
		{MaxNode - minFree - 1, MaxNode - minFree - 1, true, false},
		{MaxNode - minFree, MaxNode - minFree, true, true},
	} {
		if got := Enough(tt.count, tt.far, tt.abroad); got != tt.want {
			t.Errorf("Enough(%d, %d, %v): %v, want %v", tt.count, tt.far, tt.abroad, got, tt.want)
		}
	}
}
