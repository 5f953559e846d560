// Package sim plays a swarm of thousands of nodes on paper: the links are a model,
// and what the nodes, the server and the tracker decide is decided by the code that
// decides it in them, packages rules and tracker.
package sim

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"rookery/transport/swarm/rules"
	"rookery/transport/tracker"
)

// A Scenario is a site and what happens there.
type Scenario struct {
	Name   string
	N      int           // nodes
	Bytes  int64         // of the layer
	Piece  int           // bytes
	Rate   float64       // bytes a second of each node's link and of the server's, in each direction
	Packet int           // bytes of payload that travel together; 0: as many as the segment of MTU
	MTU    int           // bytes
	Window int           // bytes of a connection under way
	Queue  time.Duration // that a link keeps packets; 0: for ever
	Fair   bool          // machines send what begins a flow before what waits of others

	Rack   int     // nodes in a rack; 0: all have one switch
	Uplink float64 // bytes a second of a rack's cable to the others

	Die  float64 // part of the nodes that lose power while they fetch
	Late float64 // part that begins during the ideal time
	Slow float64 // part whose links have half the rate

	Seed uint64
}

// A Row is what came of a scenario. Times are over the ideal time.
type Row struct {
	Scenario     string  `json:"scenario"`
	N            int     `json:"n"`
	TOverIdeal   float64 `json:"t_over_ideal"` // the last node that was there from the start, with a link of the full rate
	First        float64 `json:"first"`
	Median       float64 `json:"median"`
	Egress       float64 `json:"egress"`                    // bytes that left the server / bytes of the layer
	UplinkCopies float64 `json:"uplink_copies,omitempty"`   // bytes that came by a rack's cable / bytes of the layer, of the rack with most
	UplinkMean   float64 `json:"uplink_mean,omitempty"`     // of all racks
	Late         float64 `json:"late_over_ideal,omitempty"` // the longest that a late one took
	Slow         float64 `json:"slow_over_ideal,omitempty"` // the last of those with half the rate, over twice the ideal time
	Died         int     `json:"died,omitempty"`
	Unfinished   int     `json:"unfinished,omitempty"`
	Wasted       float64 `json:"wasted"` // bytes that came twice / bytes of all copies
	Ideal        float64 `json:"ideal_s"`
	Events       uint64  `json:"events"`
}

// kind is what happens.
type kind uint8

const (
	left    kind = iota // the sender's cable
	between             // the cable of the sender's rack
	entered             // the cable of the receiver's rack
	arrived
	came // at once
	tells
	measures
	invites
	timeouts
	gathered
	does
)

type sim struct {
	Scenario
	events     queue
	now        int64
	clock      time.Time // the same
	chance     *rand.Rand
	wire       wire
	racks      []rack
	nodes      []*node // the server is the first
	ends       []*end
	todo       []func()
	unused     []int32 // places in todo
	coarse     bool    // what says that packets have come costs one event
	asks       func(e *end) bool
	server     *node
	tracker    *tracker.Swarm
	held       int // answers
	files      torrents
	pieces     int
	pieceSize  int
	blocks     int32
	first      []bool // pieces of the index
	unfinished int
	received   int64
	wasted     int64
	count      uint64
	watch      func(from, to *node, piece int) // every piece that comes; nil: nobody looks
}

const limit = 20 // times the ideal time, after which nothing is waited for

// Run plays a scenario.
func Run(c Scenario) Row {
	s := newSim(c)
	s.play()
	return s.row()
}

func newSim(c Scenario) *sim {
	const ethernet, headers = 14, 52 // IPv4 and TCP with a timestamp
	mss := c.MTU - headers
	s := &sim{
		Scenario: c, chance: rand.New(rand.NewPCG(c.Seed, 1)), tracker: tracker.NewSwarm(),
		pieces: int((c.Bytes + int64(c.Piece) - 1) / int64(c.Piece)), pieceSize: c.Piece,
		blocks: int32((c.Piece + ownBlock - 1) / ownBlock),
		wire:   wire{mss: mss, headers: headers + ethernet, window: c.Window, queue: int64(c.Queue), unsent: 32 << 10},
	}
	s.asks = s.ask
	if s.wire.packet = mss; c.Packet > mss {
		s.coarse, s.wire.packet = true, c.Packet+blockHead*int(s.blocks)
	}
	s.first = make([]bool, s.pieces)
	s.first[s.pieces-1] = true // the index is at the end of a layer
	if c.Rack > 0 {
		s.racks = make([]rack, (c.N+c.Rack-1)/c.Rack+1) // the server has one for itself
		for i := range s.racks {
			s.racks[i] = rack{newLink(c.Uplink), newLink(c.Uplink)}
		}
	}
	for i := range c.N + 1 {
		s.nodes = append(s.nodes, s.newNode(i))
	}
	s.server = s.nodes[0]
	return s
}

func (s *sim) newNode(i int) *node {
	n := &node{
		id: int32(i), addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 6881),
		up: newLink(s.Rate), down: newLink(s.Rate), server: i == 0,
		have: rules.NewSet(s.pieces), claimed: rules.NewSet(s.pieces), copies: make([]int32, s.pieces),
		chance: rand.New(rand.NewPCG(s.Seed, uint64(i)+2)),
	}
	n.lot = n.chance.IntN
	n.peers = func(yield func(*end) bool) {
		for _, e := range n.ends {
			if !yield(e) {
				return
			}
		}
	}
	n.places = func(yield func(*end) bool) {
		for _, e := range s.eats(n) {
			if !yield(e) {
				return
			}
		}
	}
	n.up.fair = s.Fair
	if n.server {
		if s.Rack > 0 {
			n.rack = len(s.racks) - 1
			s.racks[n.rack] = rack{newLink(1e15), newLink(1e15)}
		}
		h := rules.NewHandout[*end](s.first)
		n.handout, n.done = &h, true
		for p := range s.pieces {
			n.have.Add(p)
		}
		return n
	}
	if s.Rack > 0 {
		n.rack = (i - 1) / s.Rack
		n.nearby = rules.NewNearby(s.pieces, s.clock)
	}
	binary.BigEndian.PutUint64(n.key[:], n.chance.Uint64())
	binary.BigEndian.PutUint64(n.key[12:], n.chance.Uint64())
	n.rank = make([]int32, s.pieces)
	for p, r := range n.chance.Perm(s.pieces) {
		n.rank[p] = int32(r)
	}
	return n
}

func index(a netip.AddrPort) int {
	b := a.Addr().As4()
	return int(b[1])<<16 | int(b[2])<<8 | int(b[3])
}

func (s *sim) rackName(n *node) string { return fmt.Sprint(n.rack) }

func (s *sim) ideal() time.Duration {
	return time.Duration(float64(s.Bytes) / s.Rate * float64(time.Second))
}

// after plans an event.
func (s *sim) after(d time.Duration, k kind, who *node, e *end) {
	ev := event{at: s.now + int64(d), kind: k, who: who.id}
	if e != nil {
		ev.who = e.id
	}
	s.events.push(ev)
}

// later plans anything.
func (s *sim) later(d time.Duration, do func()) {
	if len(s.unused) == 0 {
		s.unused = append(s.unused, int32(len(s.todo)))
		s.todo = append(s.todo, nil)
	}
	last := len(s.unused) - 1
	at := s.unused[last]
	s.unused = s.unused[:last]
	s.todo[at] = do
	s.events.push(event{at: s.now + int64(d), kind: does, who: at})
}

// prepare decides by lot what happens to whom.
func (s *sim) prepare() {
	ideal := int64(s.ideal())
	s.announces(s.server, true)
	s.after(0, measures, s.server, nil)
	some := func(part float64) []*node {
		count := int(part * float64(s.N))
		order := s.chance.Perm(s.N)
		var out []*node
		for _, i := range order[:count] {
			out = append(out, s.nodes[i+1])
		}
		return out
	}
	for _, n := range some(s.Slow) {
		n.slow = true
		n.up.perByte *= 2
		n.down.perByte *= 2
	}
	for _, n := range some(s.Late) {
		n.late = true
	}
	for _, n := range some(s.Die) {
		s.later(time.Duration(s.chance.Int64N(ideal)), func() { s.die(n) })
	}
	s.unfinished = s.N
	for _, n := range s.nodes[1:] {
		delay := time.Duration(s.chance.Int64N(int64(10 * time.Millisecond))) // programs are not started at the very same moment
		if n.late {
			delay = time.Duration(s.chance.Int64N(ideal))
		}
		s.later(delay, func() {
			if !n.dead {
				s.start(n)
			}
		})
	}
}

func (s *sim) play() {
	s.prepare()
	end := limit * int64(s.ideal())
	for s.unfinished > 0 && s.events.len() > 0 {
		ev := s.events.pop()
		if ev.at > end {
			break
		}
		s.now, s.clock = ev.at, time.Unix(0, ev.at)
		s.count++
		switch ev.kind {
		case left, between, entered:
			s.hop(ev)
		case arrived:
			if ev.ack {
				s.acked(s.ends[ev.who], int(ev.x))
			} else {
				s.arrives(s.ends[ev.who], ev.x, false)
			}
		case came:
			s.arrives(s.ends[ev.who], ev.x, true)
		case tells:
			s.tell(s.nodes[ev.who])
		case measures:
			s.measure(s.nodes[ev.who])
		case invites:
			if e := s.ends[ev.who]; !e.closed && s.clock.Sub(e.left) >= rules.FedFor {
				s.invite(e.n)
			}
		case timeouts:
			if n := s.nodes[ev.who]; n.waits && int32(n.pending) == ev.x {
				s.answer(n, false)
			}
		case gathered:
			s.gathers(s.nodes[ev.who])
		case does:
			do := s.todo[ev.who]
			s.todo[ev.who] = nil
			s.unused = append(s.unused, ev.who)
			do()
		}
	}
}

func (s *sim) row() Row {
	ideal := float64(s.ideal())
	over := func(ns int64) float64 { return float64(ns) / ideal }
	r := Row{Scenario: s.Name, N: s.N, Ideal: ideal / 1e9, Events: s.count, Unfinished: s.unfinished,
		Egress: float64(s.server.up.carried) / float64(s.Bytes),
		Wasted: float64(s.wasted) / float64(max(1, s.received))}
	var took []int64
	for _, n := range s.nodes[1:] {
		switch {
		case n.dead:
			r.Died++
		case n.finished == 0:
		case n.slow:
			r.Slow = max(r.Slow, over(n.finished-n.began)/2)
		case n.late:
			r.Late = max(r.Late, over(n.finished-n.began))
		default:
			took = append(took, n.finished)
		}
	}
	slices.Sort(took)
	if len(took) > 0 {
		r.First, r.Median, r.TOverIdeal = over(took[0]), over(took[len(took)/2]), over(took[len(took)-1])
	}
	if s.Rack > 0 {
		for _, rack := range s.racks[:len(s.racks)-1] {
			copies := float64(rack.down.carried) / float64(s.Bytes)
			r.UplinkCopies = max(r.UplinkCopies, copies)
			r.UplinkMean += copies / float64(len(s.racks)-1)
		}
	}
	return r
}
