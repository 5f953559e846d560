package rules

import (
	"iter"
	"net/netip"
	"slices"
	"time"
)

// A server tells nobody that it has everything: all would ask it for the same
// pieces, and its uplink is what everybody waits for. It tells one peer of one
// piece at a time (BEP 16), the one that fewest have, so that each piece is given
// out once before any twice, and again when nobody else has it.
const (
	minOffers   = 8                      // pieces on offer at a time, or
	offerLeast  = 512 << 10              // bytes of pieces, or
	offerAhead  = 600 * time.Millisecond // what leaves in that time, when that is more
	maxOffering = 16 << 20               // bytes on offer at a time
	offerFor    = time.Second            // an offer is not late before that
	offerIdle   = 2 * time.Second        // without a block that leaves: all that are as old are late
	greetFor    = time.Second            // for a peer to say what it has a use for
	maxShares   = 3                      // times the even share that one peer may fill of all that is on offer, or
	minShare    = 2                      // pieces
	maxStrange  = 2                      // pieces on offer to an address by connections that took none yet
	maxHelped   = 16                     // peers that a server helps
	lineAhead   = 2 * time.Second        // in place of offerAhead where there are racks
	maxLines    = 8                      // racks for each of which there may be minOffers
)

// A Handout is what a server offers of one torrent.
type Handout[P Offered] struct {
	first   []bool // pieces that are given out before others: the index
	offers  []offer[P]
	offered []int32       // how many of offers a piece is in that are not late
	usually time.Duration // from an offer to the piece being there
	turn    int
	racks   map[string]*share[P]
	Sent    time.Time // when a block left
	Idle    bool      // nobody is to be offered anything, as far as we know
}

// An offer is a piece that one peer was told of and does not have yet.
type offer[P any] struct {
	to    P
	piece int
	at    time.Time
	late  bool // it is not waited for: others may be offered the piece
}

// A Client is what a server knows of a peer.
type Client struct {
	Host   netip.Addr // the machine
	ID     [20]byte   // of the peer
	Rack   string     // see Handout.Stand
	Use    []bool     // pieces that it has a use for; nil: all
	Met    bool       // it has said so, or has nothing to say
	All    bool       // it was told of all that it has a use for
	told   Set        // pieces that it was told of
	rests  bool       // others give it what it has a use for
	gained time.Time  // when it last told of a piece
	took   bool       // something that it was offered
	since  time.Time
	count  int // on offer to it
	waits  int // of these, those that are not late
	turn   int // when it was last offered something
}

// An Offered is a peer that pieces are offered to.
type Offered interface {
	comparable
	Offers() *Client
	Has(n int) bool // it has told of piece n
}

// NewHandout is for so many pieces as first has, which says of each whether it goes
// before others.
func NewHandout[P Offered](first []bool) Handout[P] {
	return Handout[P]{first: first, offered: make([]int32, len(first))}
}

// NewClient is a peer on a machine that came at now.
func NewClient(pieces int, host netip.Addr, now time.Time) Client {
	return Client{Host: host, told: NewSet(pieces), since: now, gained: now}
}

// Expire no longer waits for offers that are late.
func (h *Handout[P]) Expire(now time.Time) {
	patience := max(offerFor, 4*h.usually)
	if now.Sub(h.Sent) > offerIdle { // for those who do not come
		patience = offerFor
	}
	if len(h.racks) > 1 { // there is a line before each uplink
		patience = max(patience, StallAfter)
	}
	for i := range h.offers {
		if o := &h.offers[i]; !o.late && now.Sub(o.at) > patience {
			o.late = true
			h.offered[o.piece]--
			o.to.Offers().waits--
			s := h.share(o.to)
			s.count(o.piece, -1)
			s.again()
		}
	}
}

// Offer offers pieces of length bytes as long as the uplink, which carries up bytes
// a second, has too little to do. copies is how many of the peers have each piece,
// tell says to one that there is a piece.
func (h *Handout[P]) Offer(peers iter.Seq[P], copies []int32, length, up int64, now time.Time, tell func(P, int)) {
	if h.Idle {
		return
	}
	most := max(1, int(maxOffering/length))
	ahead, lines := offerAhead, min(len(h.racks), maxLines)
	if lines > 1 {
		ahead, most = lineAhead, max(most, lines*minOffers)
	}
	least := max(minOffers, int(offerLeast/length))
	limit := min(Ahead(least, ahead, up, length), max(most, least))
	many, takers := 0, 0
	for p := range peers {
		many++
		takers += btoi(!p.Offers().All)
	}
	// The first one to come is offered all there is, and needs long for it where its
	// link carries what it passes on, too: it does not keep the server from the others.
	share := max(minShare, maxShares*limit/max(1, takers))
	waiting := 0
	for p := range peers {
		waiting += min(p.Offers().waits, share)
	}
	strange := map[netip.Addr]int{}
	for _, o := range h.offers {
		c := o.to.Offers()
		strange[c.Host] += btoi(!o.late && !c.took)
	}
	h.Idle = true
	for waiting < limit {
		p, ok := next(peers, limit, strange)
		if !ok {
			return
		}
		c := p.Offers()
		n := rarest(copies, h.offered, h.first, func(n int) bool {
			return (c.Use == nil || c.Use[n]) && !p.Has(n) && !c.told.Has(n) && (!h.racked(p) || h.mayBring(p, n))
		})
		if n < 0 {
			c.All = true
			continue
		}
		if copies[n]+h.offered[n] > 0 && !h.racked(p) && !helps(c, many, now) {
			c.rests = true
			continue
		}
		h.offers = append(h.offers, offer[P]{to: p, piece: n, at: now})
		h.offered[n]++
		h.share(p).count(n, 1)
		c.told.Add(n)
		c.count++
		h.turn++
		c.turn = h.turn
		tell(p, n)
		waiting++
		c.waits++
		strange[c.Host] += btoi(!c.took)
	}
}

// helps says whether a peer is to get from the server what others have: it is one
// of few, or others give it nothing. Among many the server is one more who has it.
func helps(c *Client, peers int, now time.Time) bool {
	return peers <= maxHelped || now.Sub(c.gained) > offerIdle
}

// next is who gets the next piece: who has the fewest on offer, and of these who
// has waited longest. So a quick one gets more than a slow one. A machine that
// has yet to show that it takes anything gets little, however often it comes.
func next[P Offered](peers iter.Seq[P], limit int, strange map[netip.Addr]int) (best P, ok bool) {
	for p := range peers {
		c := p.Offers()
		if c.All || c.rests || !c.Met || c.count >= limit || !c.took && strange[c.Host] >= maxStrange {
			continue
		}
		if !ok || c.before(best.Offers()) {
			best, ok = p, true
		}
	}
	return best, ok
}

func (c *Client) before(d *Client) bool {
	return c.count < d.count || c.count == d.count && c.turn < d.turn
}

// rarest is the piece that fewest have or are offered, of these one that is to
// go first, of these the first; -1 is none.
func rarest(copies, offered []int32, first []bool, may func(n int) bool) int {
	best, least := -1, int32(0)
	for n := range copies {
		many := 2*(copies[n]+offered[n]) + int32(btoi(!first[n]))
		if (best < 0 || many < least) && may(n) {
			best, least = n, many
		}
	}
	return best
}

// GreetLate no longer waits for what a peer may have to say.
func (c *Client) GreetLate(now time.Time) {
	c.rests = false
	c.Met = c.Met || now.Sub(c.since) > greetFor
}

// Taken ends the offer of a piece that a peer has now.
func (h *Handout[P]) Taken(p P, n int, now time.Time) {
	c := p.Offers()
	c.gained = now
	h.share(p).count(n, 1)
	if !c.told.Has(n) {
		return
	}
	h.withdraw(func(o offer[P]) bool {
		mine := o.to == p && o.piece == n
		if mine {
			c.took = true
			h.usually = Usually(h.usually, now.Sub(o.at))
		}
		return mine
	})
}

// Forget ends the offers to a peer that is gone. What only it had is to be
// given out again.
func (h *Handout[P]) Forget(p P) {
	h.leave(p)
	h.withdraw(func(o offer[P]) bool { return o.to == p })
}

func (h *Handout[P]) withdraw(which func(offer[P]) bool) {
	h.offers = slices.DeleteFunc(h.offers, func(o offer[P]) bool {
		if !which(o) {
			return false
		}
		h.offered[o.piece] -= int32(btoi(!o.late))
		h.share(o.to).count(o.piece, -btoi(!o.late))
		h.Idle = false
		o.to.Offers().count--
		o.to.Offers().waits -= btoi(!o.late)
		return true
	})
}
