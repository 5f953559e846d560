package sim

import (
	"iter"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"rookery/transport"
	"rookery/transport/swarm/rules"
	"rookery/transport/tracker"
)

// says is what a message says.
type says uint8

const (
	haves   says = iota // pieces a to b of those that the sender has, in the order in which it got them
	offers              // a server has piece a
	request             // of piece a
	reject              // of piece a
	unchoke
	block    // piece a
	cancel   // of piece a
	interest // or none
	sated    // the sender fetches nothing any more
	hello
)

// Bytes of messages of the protocol.
const (
	haveSize    = 9
	requestSize = 17
	blockHead   = 13
	shortSize   = 5
	helloSize   = 110 // the handshake of BEP 10
	greetSize   = 68
	ownBlock    = 64 << 10
)

// A node is a machine in the swarm; the server is one, too.
type node struct {
	id       int32
	addr     netip.AddrPort
	rack     int
	up, down link
	server   bool
	began    int64 // when it was switched on
	finished int64 // when it had everything, or 0
	dead     bool
	died     int64
	gone     bool // it has left the swarm
	came     bool // the server has met it
	slow     bool
	late     bool

	ends    []*end
	peers   iter.Seq[*end] // these
	have    rules.Set
	claimed rules.Set
	copies  []int32
	rank    []int32
	order   []int32 // pieces, as they came
	done    bool
	open    int              // pieces being fetched
	usual   [2]time.Duration // from near and from far
	gained  time.Time        // its latest piece
	nearby  rules.Nearby     // where there are racks
	abroad  bool             // it has met nodes of other racks
	key     [20]byte         // its peer id
	round   int              // of telling
	downs   int64            // bytes a second, lately
	ups     int64
	got     int64 // bytes since it was measured
	sent    int64
	telling bool
	counted int64 // when a server was last told of all
	denied  []*end
	fed     []*end         // those who may be, in the order of ends
	places  iter.Seq[*end] // these
	turns   int
	queue   []*end // for a turn
	looks   bool   // again whether one was held for too long
	known   []*candidate
	dialing int
	handout *rules.Handout[*end]

	member  tracker.Member
	waits   bool  // its announce is held by the tracker
	due     bool  // it is answered soon
	pending int64 // number of its announce
	chance  *rand.Rand
	lot     func(n int) int // of chance
}

// A candidate is a peer that the tracker named.
type candidate struct {
	n       *node
	dialing bool
	fails   int
	next    int64
}

// An end is what a node keeps of a connection.
type end struct {
	id   int32
	n    *node
	peer *end
	cand *candidate // that was dialed; nil: it was the other's
	rules.Feed
	rules.Place
	client *rules.Client

	closed     bool
	has        rules.Set
	hasN       int
	sated      bool // the peer fetches nothing any more
	interested bool
	downloads  []download
	told       int // of order

	requests []int32
	queued   int64
	taken    int64
	writing  time.Time
	left     time.Time
	turn     bool
	since    int64 // of the turn
	expired  bool  // the turn was taken away
	written  bool

	out stream
}

type download struct {
	piece int32
	taken int32
	since time.Time
}

// For package rules.
func (e *end) Gives() *rules.Feed     { return &e.Feed }
func (e *end) Takes() *rules.Place    { return &e.Place }
func (e *end) Offers() *rules.Client  { return e.client }
func (e *end) Has(n int) bool         { return e.has.Has(n) }
func (e *end) Fed(now time.Time) bool { return rules.Fed(e.queued, e.writing, e.left, now) }

// say sends a message, and the news that waited for one.
func (s *sim) say(e *end, what says, bytes int32, a, b int32) {
	if e.closed || e.n.dead {
		return
	}
	s.flush(e)
	s.put(e, item{what, bytes, a, b})
	s.push(e)
}

// flush puts what the peer was not told of into the stream.
func (s *sim) flush(e *end) {
	n := e.n
	if n.server || e.told == len(n.order) {
		return
	}
	count := 0
	for _, p := range n.order[e.told:] {
		if e.Server || !e.has.Has(int(p)) {
			count++
		}
	}
	if count > 0 {
		s.put(e, item{haves, int32(count * haveSize), int32(e.told), int32(len(n.order))})
	}
	e.told = len(n.order)
}

// tell tells all connections what is new.
func (s *sim) tell(n *node) {
	n.telling = false
	if n.dead {
		return
	}
	var news []packet
	n.round++
	later := false
	for _, e := range n.ends {
		if e.Waits(n.round, e.peer.interested, e.Fed(s.clock)) {
			later = later || e.told < len(n.order)
			continue
		}
		if e.Server && !s.expected(e) {
			continue
		}
		near := s.coarse && e.peer.n.rack == n.rack && e.out.packets == 0 && e.out.unsent == 0
		if s.flush(e); near && e.out.unsent > 0 && e.out.unsent < s.wire.mss {
			news = append(news, packet{e.peer, s.sends(e)})
		} else {
			s.push(e)
		}
	}
	if later {
		s.tells(n)
	}
	if len(news) > 0 {
		// Together, to save events, as if no downlink had a queue.
		s.later(time.Duration(max(0, n.up.free-s.now)), func() {
			for _, p := range news {
				s.arrives(p.to, p.x, true)
			}
		})
	}
}

// expected says whether there is news for a server of something that it offered.
func (s *sim) expected(e *end) bool {
	return slices.ContainsFunc(e.n.order[e.told:], func(p int32) bool { return e.has.Has(int(p)) })
}

// hears does what a message says.
func (s *sim) hears(e *end, m item) {
	n := e.n
	if e.Stalled > 0 && m.says != block && m.says != request {
		e.Paused = time.Time{} // it is back
	}
	switch m.says {
	case haves:
		could := e.Can(s.clock)
		for _, p := range e.peer.n.order[m.a:m.b] {
			s.gains(e, int(p))
		}
		if could { // there is nothing new to ask for
			s.judge(e)
			return
		}
	case offers:
		s.gains(e, int(m.a))
	case request:
		s.asked(e, m.a)
		return
	case reject:
		if i := e.find(m.a); i >= 0 {
			s.strike(e, i)
			s.drop(n, int(m.a))
			e.Refused(s.clock)
			s.fill(n)
		}
	case unchoke:
		e.Unchoked()
	case block:
		s.takes(e, m.a)
		return
	case cancel:
		if i := slices.Index(e.requests, m.a); i >= 0 {
			e.requests = slices.Delete(e.requests, i, i+1)
			e.queued -= int64(s.pieceSize)
			s.say(e, reject, requestSize*s.blocks, m.a, 0)
		}
		return
	case hello:
		s.stands(e)
		if n.server {
			if !e.peer.n.came {
				e.peer.n.came = true
				s.comes(e.peer.n)
			}
			e.client.Met, e.client.All, e.client.Use = true, false, nil
			n.handout.Idle = false
			n.handout.Uses(e)
		}
	case sated:
		e.sated = true
	}
	s.judge(e)
	s.fill(n)
	s.offer(n)
}

func (s *sim) gains(e *end, p int) {
	if e.has.Has(p) {
		return
	}
	n := e.n
	e.has.Add(p)
	e.Dry = false
	e.hasN++
	e.Gained = s.clock
	s.counts(e, p, 1)
	if n.server {
		n.handout.Taken(e, p, s.clock)
	} else if !n.have.Has(p) {
		e.Useful++
	}
}

// judge says whether we are interested, and ends a connection of two that fetch
// nothing any more.
func (s *sim) judge(e *end) {
	if e.closed {
		return
	}
	if e.n.done && !e.n.server && !e.Server && (e.sated || e.hasN == s.pieces) {
		s.close(e)
		return
	}
	if interested := e.Useful > 0; interested != e.interested {
		e.interested = interested
		s.say(e, interest, shortSize, 0, 0)
	}
}

// offer hands pieces out.
func (s *sim) offer(n *node) {
	if !n.server || n.dead {
		return
	}
	n.handout.Offer(n.peers, n.copies, int64(s.pieceSize), n.ups, s.clock, func(e *end, p int) {
		s.say(e, offers, haveSize, int32(p), 0)
	})
}

// fill asks for as many pieces as keep the link busy.
func (s *sim) fill(n *node) {
	if n.server || n.done || n.dead {
		return
	}
	if n.open > 0 {
		n.nearby.Busy(s.clock)
	}
	feeds, ahead := rules.Asking(n.downs, int64(s.pieceSize), false)
	if !rules.Fill(n.peers, feeds, ahead, s.clock, n.lot, s.asks) {
		s.takeOver(n)
	}
}

// ask asks for one more piece.
func (s *sim) ask(e *end) bool {
	n := e.n
	may := func(yield func(int) bool) {
		for w, bits := range e.has {
			bits &^= n.have[w] | n.claimed[w]
			for ; bits != 0; bits &= bits - 1 {
				if !yield(w*64 + trailing(bits)) {
					return
				}
			}
		}
	}
	p := transport.Choose(may, s.first, func(p int) (int64, bool) {
		return rules.Rank(n.copies[p], n.rank[p]), !e.Far || n.nearby.MayBring(p, n.open, n.key, n.mates, s.clock)
	})
	if p < 0 {
		e.Dry = true
		return false
	}
	n.claimed.Add(p)
	n.open++
	s.order(e, download{piece: int32(p), since: s.clock})
	return true
}

func (s *sim) order(e *end, d download) {
	if e.Open == 0 {
		e.Heard = d.since
	}
	e.downloads = append(e.downloads, d)
	e.Open = len(e.downloads)
	s.say(e, request, requestSize*s.blocks, d.piece, 0)
}

func (e *end) find(p int32) int {
	return slices.IndexFunc(e.downloads, func(d download) bool { return d.piece == p })
}

func (s *sim) strike(e *end, i int) {
	e.downloads = slices.Delete(e.downloads, i, i+1)
	e.Open = len(e.downloads)
}

// drop ends the fetching of a piece.
func (s *sim) drop(n *node, p int) {
	n.claimed[p/64] &^= 1 << (p % 64)
	n.open--
	for _, e := range n.ends {
		e.Dry = false
	}
}

// takeOver asks an idle peer for a piece that another one is slow with.
func (s *sim) takeOver(n *node) {
	var from *end
	at := 0
	for _, e := range n.ends {
		for i, d := range e.downloads {
			if (from == nil || d.since.Before(from.downloads[at].since)) && d.taken < rules.MaxTaken && e.Slow(d.since, n.usual[btoi(e.Far)], e.Far && n.nearby.Here(int(d.piece)), s.clock) {
				from, at = e, i
			}
		}
	}
	if from == nil {
		return
	}
	slow := from.downloads[at]
	var to *end
	for _, e := range n.ends {
		if e != from && e.Open == 0 && !e.Choked && e.has.Has(int(slow.piece)) && !s.clock.Before(e.Paused) && !(e.Far && n.nearby.Here(int(slow.piece))) && (to == nil || e.Gained.After(to.Gained)) {
			to = e
		}
	}
	if to == nil {
		return
	}
	s.strike(from, at)
	s.say(from, cancel, requestSize*s.blocks, slow.piece, 0)
	s.order(to, download{piece: slow.piece, taken: slow.taken + 1, since: s.clock})
}

// abandon gives back what a connection was fetching.
func (s *sim) abandon(e *end) {
	for len(e.downloads) > 0 {
		p := e.downloads[0].piece
		s.strike(e, 0)
		s.say(e, cancel, requestSize*s.blocks, p, 0)
		s.drop(e.n, int(p))
	}
}

// progress notes that a part of a piece has come.
func (e *end) progress(s *sim, p int) {
	if e.find(int32(p)) >= 0 {
		e.heard(s)
	}
}

// heard notes that a part of something asked for has come.
func (e *end) heard(s *sim) {
	e.Heard = s.clock
	s.recount(e, func() { e.Stalled = 0 })
}

// takes keeps a piece.
func (s *sim) takes(e *end, p int32) {
	n := e.n
	i := e.find(p)
	if s.watch != nil {
		s.watch(e.peer.n, n, int(p))
	}
	s.received += int64(s.pieceSize)
	if i < 0 || n.have.Has(int(p)) {
		s.wasted += int64(s.pieceSize)
		return
	}
	usual := &n.usual[btoi(e.Far)]
	*usual = rules.Usually(*usual, s.clock.Sub(e.downloads[i].since))
	s.strike(e, i)
	e.heard(s)
	n.gained = s.clock
	n.have.Add(int(p))
	s.drop(n, int(p))
	n.order = append(n.order, p)
	n.got += int64(s.pieceSize)
	for _, other := range n.ends {
		if other.has.Has(int(p)) {
			other.Useful--
		}
	}
	if len(n.order) == s.pieces {
		s.finish(n)
	}
	s.fill(n)
	for i := 0; i < len(n.ends); i++ {
		other := n.ends[i]
		if s.judge(other); other.closed {
			i--
		}
	}
	s.tells(n)
}

// tells has what is new told soon.
func (s *sim) tells(n *node) {
	if !n.telling {
		n.telling = true
		s.after(rules.Batch(n.downs, int64(s.pieceSize)), tells, n, nil)
	}
}

// asked queues what a peer wants, or says no.
func (s *sim) asked(e *end, p int32) {
	n := e.n
	if !n.server && !n.have.Has(int(p)) {
		s.say(e, reject, requestSize*s.blocks, p, 0)
		return
	}
	if !n.server && !rules.TakesOn(e, n.places, s.clock) {
		s.say(e, reject, requestSize*s.blocks, p, 0)
		if !slices.Contains(n.denied, e) {
			n.denied = append(n.denied, e)
		}
		s.invite(n)
		return
	}
	e.requests = append(e.requests, p)
	e.queued += int64(s.pieceSize)
	n.feeds(e)
	s.serve(e)
}

// feeds notes that an end may have a place from now on.
func (n *node) feeds(e *end) {
	i, ok := slices.BinarySearchFunc(n.fed, e.id, func(e *end, id int32) int { return int(e.id - id) })
	if !ok {
		n.fed = slices.Insert(n.fed, i, e)
	}
}

// eats are the ends that may have a place, which are few.
func (s *sim) eats(n *node) []*end {
	n.fed = slices.DeleteFunc(n.fed, func(e *end) bool {
		return e.closed || e.queued == 0 && s.clock.Sub(e.left) >= rules.FedFor
	})
	return n.fed
}

// invite lets those ask again who were turned away.
func (s *sim) invite(n *node) {
	if len(n.denied) == 0 || rules.Places(n.places, s.clock) <= 0 {
		return
	}
	denied := n.denied
	n.denied = nil
	for _, e := range denied {
		s.say(e, unchoke, shortSize, 0, 0)
	}
}

// serve sends the next piece when it is its turn.
func (s *sim) serve(e *end) {
	n := e.n
	for !e.turn && len(e.requests) > 0 && !e.closed && !n.dead {
		if n.turns >= rules.MaxTurns && !s.reclaim(n) {
			if !slices.Contains(n.queue, e) {
				n.queue = append(n.queue, e)
			}
			s.reclaimsSoon(n)
			return
		}
		n.turns++
		e.turn, e.expired, e.since, e.written = true, false, s.now, false
		p := e.requests[0]
		e.requests = slices.Delete(e.requests, 0, 1)
		e.taken = int64(s.pieceSize)
		e.writing = s.clock
		s.flush(e)
		s.put(e, item{block, int32(s.pieceSize + blockHead*int(s.blocks)), p, 0})
		s.push(e)
		s.written(e)
	}
}

// reclaim takes turns from who is too slow.
func (s *sim) reclaim(n *node) bool {
	for _, e := range n.ends {
		if e.turn && !e.expired && s.now-e.since >= int64(rules.StuckAfter) {
			e.expired = true
			n.turns--
		}
	}
	return n.turns < rules.MaxTurns
}

// reclaimsSoon serves those who wait when the first turn has been held for too long.
func (s *sim) reclaimsSoon(n *node) {
	if n.looks {
		return
	}
	at := s.now + int64(rules.StuckAfter)
	for _, e := range n.ends {
		if e.turn && !e.expired {
			at = min(at, e.since+int64(rules.StuckAfter))
		}
	}
	n.looks = true
	s.later(time.Duration(at-s.now), func() {
		n.looks = false
		for len(n.queue) > 0 && s.reclaim(n) {
			e := n.queue[0]
			n.queue = n.queue[1:]
			s.serve(e)
		}
		if len(n.queue) > 0 {
			s.reclaimsSoon(n)
		}
	})
}

// written looks whether a piece is written, and has left.
func (s *sim) written(e *end) {
	if !e.turn || e.out.unsent > s.wire.unsent {
		return
	}
	if !e.written {
		e.written = true
		e.n.sent += int64(s.pieceSize)
	}
	if rules.Rest(e.out.flying+e.out.unsent, e.n.ups) > 0 {
		return
	}
	e.writing = time.Time{}
	e.queued -= e.taken
	e.taken, e.left = 0, s.clock
	s.endTurn(e)
	s.after(rules.FedFor, invites, e.n, e)
	s.serve(e)
}

func (s *sim) endTurn(e *end) {
	n := e.n
	if !e.turn {
		return
	}
	e.turn = false
	if !e.expired {
		n.turns--
	}
	for len(n.queue) > 0 && n.turns < rules.MaxTurns {
		next := n.queue[0]
		n.queue = n.queue[1:]
		s.serve(next)
	}
}
