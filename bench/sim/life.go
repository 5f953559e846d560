package sim

import (
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"rookery/transport/swarm/rules"
	"rookery/transport/tracker"
)

func trailing(b uint64) int { return bits.TrailingZeros64(b) }

// Bytes of what is said by HTTP, and times of the engine's announces.
const (
	askSize      = 500             // a request, with its headers
	manifestSize = 2200            // a manifest and what is said around it
	torrentSize  = 300             // what is said around a torrent
	hashSize     = 20              // of a piece, in a torrent
	answerSize   = 300             // of a tracker, and for each peer
	peerSize     = 6               //
	breath       = time.Second / 2 // between an answer and the next announce
	lingers      = time.Minute     // a node that has everything
	goneAfter    = 45 * time.Second
	forgets      = 45 * time.Second
)

// call is an HTTP request to the server, or a node, over a new connection.
func (s *sim) call(n, to *node, ask, answer int, then func()) {
	s.carry(n, to, 0, func() {
		s.carry(to, n, 0, func() {
			s.carry(n, to, ask, func() { s.download(to, n, answer, then) })
		})
	})
}

// download sends bytes in parts that others come between.
func (s *sim) download(from, to *node, size int, then func()) {
	part := min(size, max(s.wire.packet, s.wire.mss))
	s.carry(from, to, part, func() {
		if size == part {
			then()
		}
	})
	if size > part {
		s.download(from, to, size-part, then)
	}
}

// torrents is how the torrent file goes from hand to hand.
type torrents struct {
	giving  int     // who got it from the server and have not come with it
	givers  []*node // who came, as often as they are to be named
	waiting []func(from *node)
}

// torrent gets a node the torrent file, which those who have it give as the server
// says. A giver that is switched off is not asked: that is noticed at once.
func (s *sim) torrent(n *node, then func()) {
	size := torrentSize + hashSize*s.pieces
	s.carry(n, s.server, askSize, func() {
		s.files.waiting = append(s.files.waiting, func(from *node) {
			if from == s.server {
				s.download(from, n, size, then)
				return
			}
			s.carry(s.server, n, answerSize, func() { s.call(n, from, askSize, size, then) })
		})
		s.gives()
	})
}

// gives sends who waits for the torrent file to somebody.
func (s *sim) gives() {
	f := &s.files
	for len(f.waiting) > 0 {
		from := s.server
		switch {
		case len(f.givers) > 0:
			from, f.givers = f.givers[0], f.givers[1:]
			if from.dead || from.gone {
				continue
			}
			s.later(rules.GivingFor, func() {
				f.givers = append(f.givers, from)
				s.gives()
			})
		case f.giving < rules.MaxGiving:
			f.giving++
			s.later(rules.GivingFor, s.given)
		default:
			return
		}
		next := f.waiting[0]
		f.waiting = f.waiting[1:]
		next(from)
	}
}

// given lets the server give the file once more.
func (s *sim) given() {
	s.files.giving = max(0, s.files.giving-1)
	s.gives()
}

// comes is a node with the file that the server meets.
func (s *sim) comes(n *node) {
	for range rules.NamedTo {
		s.files.givers = append(s.files.givers, n)
	}
	s.gives()
}

// start is a node that is switched on: it fetches what is not in the swarm.
func (s *sim) start(n *node) {
	n.began = s.now
	s.call(n, s.server, askSize, manifestSize, func() {
		s.torrent(n, func() {
			s.events.push(event{at: s.now + int64(n.chance.Int64N(int64(rules.Measured))), kind: measures, who: n.id})
			s.call(n, s.server, askSize, 0, func() { s.announced(n, true, false) })
		})
	})
}

// announced is an announce that has reached the tracker.
func (s *sim) announced(n *node, started, mayWait bool) {
	if n.gone || n.dead {
		return
	}
	s.announces(n, started)
	n.pending++
	if !mayWait || !s.tracker.Held(n.member, s.held) {
		s.answer(n, false)
		return
	}
	n.waits = true
	s.held++
	s.events.push(event{at: s.now + int64(s.tracker.Interval()), kind: timeouts, who: n.id, x: int32(n.pending)})
	if s.tracker.News(n.member) {
		s.soon(n)
	}
}

// announces notes a node at the tracker, and tells those who wait when it is new.
func (s *sim) announces(n *node, started bool) {
	m, err := s.tracker.Announce(n.addr, s.rackName(n), n.server, n.done, started)
	if err != nil {
		panic(err)
	}
	n.member = m
	if !started {
		return
	}
	for _, other := range s.nodes {
		if other.waits {
			s.soon(other)
		}
	}
}

// soon has a node that waits answered when others have gathered.
func (s *sim) soon(n *node) {
	if !n.due {
		n.due = true
		s.events.push(event{at: s.now + int64(tracker.Gathers(s.held)), kind: gathered, who: n.id, x: int32(n.pending)})
	}
}

// gathers answers who waits if there is somebody to name.
func (s *sim) gathers(n *node) {
	n.due = false
	if n.waits && !n.dead {
		s.answer(n, true)
	}
}

// answer names peers to a node.
func (s *sim) answer(n *node, onlyNews bool) {
	peers, news := s.tracker.Answer(n.member, s.chance)
	if onlyNews && news == 0 {
		if s.tracker.News(n.member) {
			s.soon(n)
		}
		return
	}
	if n.waits {
		n.waits = false
		s.held--
	}
	mayWait, pause := true, breath
	if !s.tracker.Held(n.member, s.held) {
		mayWait, pause = false, s.tracker.Interval()
	}
	pause += time.Duration(n.chance.Int64N(int64(pause / 10)))
	s.carry(s.server, n, answerSize+peerSize*len(peers), func() {
		s.learn(n, peers)
		s.later(pause, func() {
			if !n.dead && !n.gone {
				s.carry(n, s.server, askSize, func() { s.announced(n, false, mayWait) })
			}
		})
	})
}

// learn adds who was named, before those who are known.
func (s *sim) learn(n *node, addrs []netip.AddrPort) {
	const most = 256
	var known []*candidate
	taken := map[*node]bool{}
	for _, a := range addrs {
		to := s.nodes[index(a)]
		i := slices.IndexFunc(n.known, func(c *candidate) bool { return c.n == to })
		c := &candidate{n: to}
		if i >= 0 {
			c = n.known[i]
		}
		known = append(known, c)
		taken[to] = true
	}
	for _, c := range n.known {
		if !taken[c.n] {
			known = append(known, c)
		}
	}
	n.known = known[:min(most, len(known))]
	s.lookAround(n)
}

// lookAround connects to who is known.
func (s *sim) lookAround(n *node) {
	if n.done || n.dead || n.server {
		return
	}
	count, far := n.dialing, 0
	for _, e := range n.ends {
		count += btoi(!e.Server)
		far += btoi(e.Far)
	}
	for _, c := range n.known {
		if rules.Enough(count, far, n.abroad) {
			break
		}
		if c.dialing || count >= rules.Wanted && c.fails > 0 || s.now < c.next || connected(n, c.n) {
			continue
		}
		c.dialing = true
		n.dialing++
		count++
		s.dial(n, c)
	}
}

func connected(n, to *node) bool {
	return slices.ContainsFunc(n.ends, func(e *end) bool { return e.peer.n == to })
}

// dial connects to a candidate: TCP's greetings, then those of BitTorrent.
func (s *sim) dial(n *node, c *candidate) {
	failed := func() {
		if c.dialing {
			n.dialing--
			s.redial(n, c)
		}
	}
	s.later(dialFor, func() {
		if c.dialing && !connected(n, c.n) {
			failed()
		}
	})
	s.carry(n, c.n, 0, func() {
		if c.n.gone {
			s.carry(c.n, n, 0, failed)
			return
		}
		s.carry(c.n, n, 0, func() {
			s.carry(n, c.n, greetSize, func() {
				s.carry(c.n, n, greetSize, func() {
					if !c.dialing {
						return
					}
					n.dialing--
					if connected(n, c.n) || c.n.dead || n.done || !s.room(n, c.n) || !s.room(c.n, n) {
						s.redial(n, c)
						return
					}
					s.attach(n, c)
				})
			})
		})
	})
}

const dialFor = 15 * time.Second

func (s *sim) redial(n *node, c *candidate) {
	c.dialing = false
	c.next = s.now + int64(rules.Redial(c.fails))
	c.fails++
	s.lookAround(n)
}

// room says whether a node admits one more connection.
func (s *sim) room(n, peer *node) bool {
	most := rules.MaxNode
	if n.server {
		most = rules.MaxServed
	}
	switch {
	case peer.server:
		most += rules.MaxServers
	case s.Rack > 0 && !n.server: // it may be of the same rack
		most += rules.MaxGuests
	}
	return len(n.ends) < most
}

// attach makes a connection of which both ends introduce themselves.
func (s *sim) attach(n *node, c *candidate) {
	a, b := s.newEnd(n, c.n), s.newEnd(c.n, n)
	a.peer, b.peer = b, a
	a.cand = c
	for _, e := range []*end{a, b} {
		e.n.ends = append(e.n.ends, e)
		e.told = 0
		bytes := int32(helloSize + shortSize + s.pieces/8)
		s.say(e, hello, bytes, 0, 0)
		s.say(e, unchoke, shortSize, 0, 0)
		if e.n.done && !e.n.server {
			s.say(e, sated, helloSize, 0, 0)
		}
		if e.n.server {
			e.n.handout.Idle = false
		}
	}
}

func (s *sim) newEnd(n, peer *node) *end {
	e := &end{id: int32(len(s.ends)), n: n, Feed: rules.Feed{Choked: true, Server: peer.server, Gained: s.clock}, has: rules.NewSet(s.pieces)}
	e.out.window = s.wire.window
	s.ends = append(s.ends, e)
	e.sated = peer.server
	if n.server {
		c := rules.NewClient(s.pieces, peer.addr.Addr(), s.clock)
		c.ID = peer.key
		e.client = &c
	}
	return e
}

// close ends a connection at both ends.
func (s *sim) close(e *end) {
	for _, e := range []*end{e, e.peer} {
		s.detach(e)
	}
}

func (s *sim) detach(e *end) {
	n := e.n
	if e.closed {
		return
	}
	e.closed = true
	n.ends = slices.DeleteFunc(n.ends, func(other *end) bool { return other == e })
	n.denied = slices.DeleteFunc(n.denied, func(other *end) bool { return other == e })
	n.queue = slices.DeleteFunc(n.queue, func(other *end) bool { return other == e })
	for p := range s.pieces {
		if e.has.Has(p) {
			s.counts(e, p, -1)
		}
	}
	n.nearby.Redraw()
	for len(e.downloads) > 0 {
		p := e.downloads[0].piece
		s.strike(e, 0)
		s.drop(n, int(p))
	}
	s.endTurn(e)
	e.requests = nil
	if n.dead {
		return
	}
	if n.server {
		n.handout.Forget(e)
	}
	if c := e.cand; c != nil {
		c.dialing = false
		c.next, c.fails = s.now+int64(rules.Redial(c.fails)), c.fails+1
	}
	s.fill(n)
	s.offer(n)
	s.lookAround(n)
}

// measure is what a node does four times a second.
func (s *sim) measure(n *node) {
	if n.dead || n.gone {
		return
	}
	s.after(rules.Measured, measures, n, nil)
	n.downs = rules.Lately(n.downs, n.got)
	n.ups = rules.Lately(n.ups, n.sent)
	if n.server && n.sent > 0 {
		n.handout.Sent = s.clock
	}
	n.got, n.sent = 0, 0
	counts := s.now-n.counted >= int64(rules.TellServers)
	if counts {
		n.counted = s.now
	}
	for i := 0; i < len(n.ends); i++ {
		e := n.ends[i]
		if e.Watch(n.gained) {
			n.nearby.Redraw()
		}
		if e.Silent(s.clock) {
			s.abandon(e)
			givenUp := false
			s.recount(e, func() { givenUp = e.Stalls(s.clock) })
			if givenUp {
				s.close(e)
				i--
				continue
			}
		}
		// What was sent to who is dead is never acknowledged.
		if e.out.packets > 0 && e.peer.n.dead && s.now-e.peer.n.died > int64(goneAfter) {
			s.close(e)
			i--
			continue
		}
		if counts && e.Server {
			s.flush(e)
			s.push(e)
		}
		e.Dry = false
	}
	s.fill(n)
	if n.server {
		n.handout.Idle = false
		for _, e := range n.ends {
			e.client.GreetLate(s.clock)
		}
		n.handout.Expire(s.clock)
		s.offer(n)
	}
	s.lookAround(n)
}

// finish is a node that has everything.
func (s *sim) finish(n *node) {
	n.done, n.finished = true, s.now
	s.unfinished--
	for _, e := range n.ends {
		s.say(e, sated, helloSize, 0, 0)
	}
	if s.unfinished > 0 {
		s.carry(n, s.server, askSize, func() {
			if !n.gone {
				s.announces(n, false)
			}
		})
		s.later(lingers, func() { s.leave(n) })
	}
}

// leave is a node that is switched off in order.
func (s *sim) leave(n *node) {
	if n.dead || n.gone {
		return
	}
	n.gone = true
	s.tracker.Leave(n.member)
	for len(n.ends) > 0 {
		s.close(n.ends[0])
	}
}

// die is a node that loses power: nobody is told.
func (s *sim) die(n *node) {
	if n.dead || n.done {
		return
	}
	n.dead, n.died = true, s.now
	s.unfinished--
	if n.waits {
		n.waits = false
		s.held--
	}
	s.later(forgets+s.tracker.Interval(), func() {
		if n.member != (tracker.Member{}) {
			s.tracker.Leave(n.member)
		}
	})
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
