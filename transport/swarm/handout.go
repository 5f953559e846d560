package swarm

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
)

// A server tells nobody that it has everything: all would ask it for the same
// pieces, and its uplink is what everybody waits for. It tells one peer of one
// piece at a time (BEP 16), the one that fewest have, so that each piece is given
// out once before any twice, and again when nobody else has it.
const (
	minOffers   = 8                      // pieces on offer at a time, or
	offerAhead  = 600 * time.Millisecond // what leaves in that time, when that is more
	maxOffering = 16 << 20               // bytes on offer at a time
	offerFor    = time.Second            // an offer is not late before that
	offerIdle   = 2 * time.Second        // without a block that leaves: all that are as old are late
	greetFor    = time.Second            // for a peer to say what it has a use for
	maxStrange  = 2                      // pieces on offer to an address by connections that took none yet
)

// A handout is what a server offers of one torrent.
type handout struct {
	first   []bool // pieces that are given out before others: the index
	offers  []offer
	offered []int32       // how many of offers a piece is in that are not late
	usually time.Duration // from an offer to the piece being there
	sent    time.Time     // when a block left
	waiting int           // offers that are not late
	idle    bool          // nobody is to be offered anything, as far as we know
	turn    int
}

// An offer is a piece that one peer was told of and does not have yet.
type offer struct {
	to    *conn
	piece int
	at    time.Time
	late  bool // it is not waited for: others may be offered the piece
}

// A client is what a server knows of a peer.
type client struct {
	told   bitset // pieces that it was told of
	use    []bool // pieces that it has a use for; nil: all
	met    bool   // it has said so, or has nothing to say
	took   bool   // something that it was offered
	since  time.Time
	all    bool // it was told of all that it has a use for
	offers int  // on offer to it
	turn   int  // when it was last offered something
}

func newHandout(pieces *transport.Pieces) handout {
	return handout{first: pieces.Preferred(), offered: make([]int32, len(pieces.Info().Hashes))}
}

func newClient(pieces int) client {
	return client{told: newBitset(pieces), since: time.Now()}
}

// expire no longer waits for offers that are late.
func (t *Torrent) expire(now time.Time) {
	patience := max(offerFor, 4*t.usually)
	if now.Sub(t.sent) > offerIdle { // for those who do not come
		patience = offerFor
	}
	for i := range t.offers {
		if o := &t.offers[i]; !o.late && now.Sub(o.at) > patience {
			o.late = true
			t.offered[o.piece]--
			t.waiting--
		}
	}
}

// handOut offers pieces as long as the uplink has too little to do. It is called
// for every message.
func (t *Torrent) handOut(now time.Time) {
	if !t.seeder || t.gone || t.idle || t.quiet {
		return
	}
	most := max(1, int(maxOffering/t.info.PieceLength))
	limit := min(t.ahead(minOffers, offerAhead, t.up), max(most, minOffers))
	if t.waiting >= limit {
		return
	}
	strange := map[netip.Addr]int{}
	for _, o := range t.offers {
		strange[o.to.host] += btoi(!o.late && !o.to.took)
	}
	for t.waiting < limit {
		c := t.next(limit, strange)
		if c == nil {
			t.idle = true
			return
		}
		n := rarest(t.copies, t.offered, t.first, func(n int) bool {
			return (c.use == nil || c.use[n]) && !c.has.get(n) && !c.told.get(n)
		})
		if n < 0 {
			c.all = true
			continue
		}
		t.offers = append(t.offers, offer{to: c, piece: n, at: now})
		t.offered[n]++
		c.told.set(n)
		c.offers++
		t.turn++
		c.turn = t.turn
		c.send(pp.Message{Type: pp.Have, Index: pp.Integer(n)})
		t.waiting++
		strange[c.host] += btoi(!c.took)
	}
}

// next is who gets the next piece: who has the fewest on offer, and of these who
// has waited longest. So a quick one gets more than a slow one. A machine that
// has yet to show that it takes anything gets little, however often it comes.
func (t *Torrent) next(limit int, strange map[netip.Addr]int) (best *conn) {
	for c := range t.conns {
		if c.all || !c.met || c.offers >= limit || !c.took && strange[c.host] >= maxStrange {
			continue
		}
		if best == nil || c.offers < best.offers || c.offers == best.offers && c.turn < best.turn {
			best = c
		}
	}
	return best
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

// greetLate no longer waits for what peers may have to say.
func (t *Torrent) greetLate(now time.Time) {
	if !t.seeder {
		return
	}
	t.idle = false
	for c := range t.conns {
		c.met = c.met || now.Sub(c.since) > greetFor
	}
}

// uses notes what a peer has a use for: a bitfield, or nothing for everything.
func (c *conn) uses(field string) error {
	count := len(c.t.copies)
	c.met, c.all, c.use = true, false, nil
	c.t.idle = false
	if field == "" {
		return nil
	}
	if len(field) != (count+7)/8 {
		return fmt.Errorf("%s: %d bytes for %d pieces", usesKey, len(field), count)
	}
	c.use = make([]bool, count)
	for n := range c.use {
		c.use[n] = field[n/8]>>(7-n%8)&1 == 1
	}
	return nil
}

// taken ends the offer of a piece that a peer has now.
func (t *Torrent) taken(c *conn, n int) {
	if !t.seeder || !c.told.get(n) {
		return
	}
	t.withdraw(func(o offer) bool {
		mine := o.to == c && o.piece == n
		if mine {
			c.took = true
			t.usually = (7*t.usually + time.Since(o.at)) / 8
		}
		return mine
	})
}

// forget ends the offers to a peer that is gone. What only it had is to be
// given out again.
func (t *Torrent) forget(c *conn) {
	t.withdraw(func(o offer) bool { return o.to == c })
}

func (t *Torrent) withdraw(which func(offer) bool) {
	t.offers = slices.DeleteFunc(t.offers, func(o offer) bool {
		if !which(o) {
			return false
		}
		t.offered[o.piece] -= int32(btoi(!o.late))
		t.waiting -= btoi(!o.late)
		t.idle = false
		o.to.offers--
		return true
	})
}

// Quiet keeps a seeder from offering anything, while all get it in another way and
// what some of them lack others have.
func (t *Torrent) Quiet(quiet bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.quiet = quiet
	t.handOut(time.Now())
}
