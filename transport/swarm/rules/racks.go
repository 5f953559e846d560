package rules

import (
	"encoding/binary"
	"iter"
	"time"
)

// Who stands where. The uplink of a rack is slower than all the links in it
// together, so each piece should pass it once. A tracker tells a node in what rack it
// stands, and the node tells its peers. For each piece one node of a rack, drawn by
// lot from those who know each other, is to bring it in: a server offers it to that
// one, and of other racks' nodes only that one asks for it. All draw the same lots, so
// nothing need be said about them.
const (
	MaxRack   = 64 // bytes of a rack's name
	MaxGuests = 4  // connections of a node for which there is no place, until they say where they stand
	FarBatch  = 4  // times as long other racks wait for news
	minFar    = 4  // connections to other racks that those to mates leave room for
	leastFar  = 2  // of these that a node looks for beyond Wanted
	minMates  = 8  // of its own rack that a node looks for beyond Wanted
	minFree   = 2  // places that it leaves to those who look for it

	asleep    = 2 * time.Second // without a piece, while we got one: others bring in what it should
	turnAfter = time.Second     // with nothing else on its way: so does who has drawn the next lot
)

// lot is what a peer has drawn for a piece. The lowest brings it in.
func lot(id [20]byte, n int) uint64 {
	x := binary.LittleEndian.Uint64(id[len(id)-8:]) + uint64(n)*0x9e3779b97f4a7c15
	x ^= x >> 30 // the finalizer of splitmix64
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// before is, for each piece, how many of the mates have drawn a lower lot than id.
func before(id [20]byte, mates [][20]byte, pieces int) []int32 {
	counts := make([]int32, pieces)
	for n := range counts {
		own := lot(id, n)
		for _, mate := range mates {
			counts[n] += int32(btoi(lot(mate, n) < own))
		}
	}
	return counts
}

// farFeeds is how many of a node's feeds stand in other racks, when it has so many
// mates in its own: each of them brings in a part.
func farFeeds(mates int) int { return (MaxFeeds + mates) / (mates + 1) }

// Stand notes where a peer stands, as it says, and the node itself, as its tracker
// does; "" is not known, and no other rack.
func (f *Feed) Stand(theirs, ours string) {
	known := !f.Server && theirs != "" && ours != ""
	f.Far, f.Mate = known && theirs != ours, known && theirs == ours
}

// Enough says whether a node with so many connections, those to servers not counted,
// looks for no more. Who has few mates to be fed by looks on, once with each that it knows,
// and they take the places of far ones: what mates have is not asked of another rack.
// So does who knows nodes of other racks, abroad, and has hardly anybody there:
// it could not bring in what it draws.
func Enough(count, far int, abroad bool) bool {
	return count >= Wanted && (far <= minFar || count-far >= minMates) && (far >= leastFar || !abroad) ||
		count >= MaxNode-minFree
}

// Crowded is whose connection ends where there are more than places, when p of the
// peers has just said where it stands: that of a far one for a mate, while there
// are enough of these, then that of a mate that is asked for nothing, which has others;
// that of a mate for a far one; or else its own.
func Crowded[P Giver](p P, peers iter.Seq[P]) P {
	far := 0
	for other := range peers {
		far += btoi(other.Gives().Far)
	}
	leaves, comes := p, p.Gives()
	for other := range peers {
		f := other.Gives()
		yields := comes.Mate && f.Far && far > minFar || comes.Far && f.Mate && far <= minFar ||
			comes.Mate && f.Mate && far <= minFar && f.Open == 0 && other != p
		if yields && (leaves == p || f.Open < leaves.Gives().Open) {
			leaves = other
		}
	}
	return leaves
}

// Watch says whether a mate has fallen asleep or woken up: it gets nothing while
// the node, which got its latest piece at ours, does.
func (f *Feed) Watch(ours time.Time) (changed bool) {
	was := f.Sleeps
	f.Sleeps = f.Mate && ours.Sub(f.Gained) > asleep
	return f.Sleeps != was
}

// A Nearby is what a node knows of the pieces that are in its rack and in others.
type Nearby struct {
	near []int32     // how many peers have a piece that are not far, and do not stall
	afar []time.Time // since when one that is far has it
	lots []int32     // how many mates bring it in before the node does; nil: to be drawn
	busy time.Time   // when there was something on its way
}

// NewNearby is that of a node which comes at now.
func NewNearby(pieces int, now time.Time) Nearby {
	return Nearby{near: make([]int32, pieces), afar: make([]time.Time, pieces), busy: now}
}

// Count adds d to the number of peers like f that have piece n. Of one that stalls
// it cannot be had: it does not keep others from bringing it in.
func (b *Nearby) Count(f *Feed, n, d int, now time.Time) {
	switch {
	case f.Far && d > 0 && b.afar[n].IsZero():
		b.afar[n] = now
	case !f.Far && f.Stalled == 0:
		b.near[n] += int32(d)
	}
}

// Here says whether somebody near has piece n.
func (b *Nearby) Here(n int) bool { return b.near[n] > 0 }

// Busy notes that there is something on its way to the node.
func (b *Nearby) Busy(now time.Time) { b.busy = now }

// Redraw has lots drawn anew: the mates have changed.
func (b *Nearby) Redraw() { b.lots = nil }

// MayBring says whether a node to which so many pieces are on their way asks another
// rack for piece n now: nobody near has it, and it is its turn. mates are the ids of
// those who are awake.
func (b *Nearby) MayBring(n, open int, id [20]byte, mates func() [][20]byte, now time.Time) bool {
	if b.near[n] > 0 {
		return false
	}
	if b.lots == nil {
		b.lots = before(id, mates(), len(b.near))
	}
	turn := time.Duration(b.lots[n]) * turnAfter
	return turn == 0 || open == 0 && now.Sub(b.busy) > turn && now.Sub(b.afar[n]) > turn
}

// A share is what a server knows of one rack.
type share[P Offered] struct {
	peers map[P]bool
	live  []int32 // how many have a piece, or are offered it and not late
	first []P     // who brings a piece in; nil: to be drawn
}

// Stand notes in what rack a peer stands, as it says.
func (h *Handout[P]) Stand(p P, rack string) {
	c := p.Offers()
	if rack == c.Rack {
		return
	}
	h.leave(p)
	if c.Rack = rack; rack == "" {
		return
	}
	if h.racks == nil {
		h.racks = map[string]*share[P]{}
	}
	s := h.racks[rack]
	if s == nil {
		s = &share[P]{peers: map[P]bool{}, live: make([]int32, len(h.first))}
		h.racks[rack] = s
	}
	s.peers[p] = true
	h.tally(s, p, 1)
}

// Uses notes that a peer has said what it has a use for.
func (h *Handout[P]) Uses(p P) {
	if s := h.share(p); s != nil {
		s.first = nil
		s.again()
	}
}

// leave counts a peer no longer among those of its rack.
func (h *Handout[P]) leave(p P) {
	s := h.share(p)
	if s == nil {
		return
	}
	h.tally(s, p, -1)
	delete(s.peers, p)
	if len(s.peers) == 0 {
		delete(h.racks, p.Offers().Rack)
		for _, other := range h.racks { // which may be the only one by now
			other.again()
		}
	}
	p.Offers().Rack = ""
}

func (h *Handout[P]) share(p P) *share[P] { return h.racks[p.Offers().Rack] }

// tally adds d for each piece that a peer has or is offered, and has the lots drawn
// anew.
func (h *Handout[P]) tally(s *share[P], p P, d int) {
	for n := range s.live {
		s.count(n, d*btoi(p.Has(n)))
	}
	for _, o := range h.offers {
		if o.to == p && !o.late {
			s.count(o.piece, d)
		}
	}
	s.first = nil
	s.again()
	h.Idle = false
}

func (s *share[P]) count(n, d int) {
	if s != nil {
		s.live[n] += int32(d)
	}
}

// again lets the peers of a rack be offered what was kept from them.
func (s *share[P]) again() {
	if s != nil {
		for p := range s.peers {
			p.Offers().All = false
		}
	}
}

// Racked says whether there are several racks, and a peer stands in one of them.
func (h *Handout[P]) racked(p P) bool { return len(h.racks) > 1 && h.share(p) != nil }

// mayBring says whether a peer may bring a piece into its rack: nobody there has it
// or is offered it, and this one has drawn the lowest lot, or who has was offered it
// in vain.
func (h *Handout[P]) mayBring(p P, n int) bool {
	s := h.share(p)
	if s.live[n] > 0 {
		return false
	}
	if s.first == nil {
		s.first = make([]P, len(s.live))
		drawn := make([]bool, len(s.live))
		for p := range s.peers {
			c := p.Offers()
			for n := range s.first {
				if (c.Use == nil || c.Use[n]) && (!drawn[n] || lot(c.ID, n) < lot(s.first[n].Offers().ID, n)) {
					s.first[n], drawn[n] = p, true
				}
			}
		}
	}
	return s.first[n] == p || s.first[n].Offers().told.Has(n) // p itself has a use for it
}
