package sim

import "time"

// A link carries packets one after the other, in the order in which they come.
type link struct {
	free    int64   // until then it is busy
	fair    bool    // what begins a flow goes before others, as with Linux's fq_codel
	first   int64   // until then it is busy with such
	perByte float64 // nanoseconds
	carried int64   // bytes
}

func newLink(rate float64) link { return link{perByte: 1e9 / rate} }

// carry is when n bytes that come now have passed.
func (l *link) carry(now int64, n int) int64 {
	l.free = max(now, l.free) + int64(float64(n)*l.perByte)
	l.carried += int64(n)
	return l.free
}

const (
	few  = 4 << 10                 // bytes that go before others
	card = int64(time.Millisecond) // what they wait for at the most, since the machine's card has it
)

// starts is carry for bytes of a flow that has none in the line.
func (l *link) starts(now int64, n int) int64 {
	if !l.fair || n > few {
		return l.carry(now, n)
	}
	begins := max(now, l.first, min(l.free, now+card))
	l.carry(now, n)
	l.first = begins + int64(float64(n)*l.perByte)
	return l.first
}

// A rack is a switch whose nodes share one cable to all others.
type rack struct{ up, down link }

// A wire says how bytes become packets.
type wire struct {
	packet  int   // bytes of payload that travel together: of one packet, or of many to save events
	mss     int   // bytes of payload of a packet
	headers int   // bytes of each
	window  int   // bytes of a connection that are sent and not acknowledged
	queue   int64 // nanoseconds that a packet waits for a link at the most, or its sender slows down; 0: for ever
	unsent  int   // bytes of a connection that wait in the kernel
}

// on is how many bytes a payload is on the cable.
func (w *wire) on(n int) int { return n + max(1, (n+w.mss-1)/w.mss)*w.headers }

// An item is a message in a stream.
type item struct {
	says  says
	bytes int32 // that are not sent
	a, b  int32
}

// A stream is one direction of a connection: messages in order.
type stream struct {
	items   []item
	here    int   // of items, the first that has not arrived
	next    int   // the first that is not all sent
	unsent  int   // bytes of all items
	packets int   // on their way
	flying  int   // bytes sent and not acknowledged
	window  int   // at the most
	slowed  int64 // it is not slowed down again before that
	owed    int   // bytes arrived and not acknowledged
}

// put adds a message to what an end sends.
func (s *sim) put(e *end, m item) {
	e.out.items = append(e.out.items, m)
	e.out.unsent += int(m.bytes)
}

// push sends what may fly.
func (s *sim) push(e *end) {
	const most = 255 // messages in a packet
	o := &e.out
	for o.unsent > 0 && o.flying < o.window && !e.n.dead {
		n, done := 0, 0
		for o.next < len(o.items) && n < s.wire.packet && done < most {
			it := &o.items[o.next]
			part := min(int(it.bytes), s.wire.packet-n)
			n += part
			if it.bytes -= int32(part); it.bytes > 0 {
				break
			}
			o.next++
			done++
		}
		o.unsent -= n
		ev := event{kind: left, x: int32(n)<<8 | int32(done), who: e.peer.id}
		if s.coarse && n < s.wire.mss && o.packets == 0 {
			ev.at, ev.kind = s.direct(e.n, e.peer.n, s.wire.on(n)), came
		} else {
			o.flying += n
			s.waits(e, &e.n.up)
			ev.at = e.n.up.carry(s.now, s.wire.on(n))
		}
		o.packets++
		s.events.push(ev)
	}
}

// direct is when a few bytes come that find the queues of all links as they are
// now. It saves events, and what follows does not come before them.
func (s *sim) direct(from, to *node, n int) int64 {
	at := max(from.up.starts(s.now, n), to.down.carry(s.now, n))
	if from.rack != to.rack {
		at = max(at, s.racks[from.rack].up.carry(s.now, n), s.racks[to.rack].down.carry(s.now, n))
	}
	return at
}

// A packet is on its way to an end, and x what the event of its coming would say.
type packet struct {
	to *end
	x  int32
}

// sends sends all that waits in a stream as one packet, and says what the event of
// its coming would.
func (s *sim) sends(e *end) int32 {
	o := &e.out
	n, done := o.unsent, len(o.items)-o.next
	o.next, o.unsent = len(o.items), 0
	o.packets++
	s.direct(e.n, e.peer.n, s.wire.on(n))
	return int32(n)<<8 | int32(done)
}

// hop takes a packet, or what says that one has come, one link further on its
// way to an end.
func (s *sim) hop(ev event) {
	e := s.ends[ev.who]
	from, to := e.peer.n, e.n
	n := s.wire.headers
	if !ev.ack {
		n = s.wire.on(int(ev.x >> 8))
	}
	switch {
	case ev.kind == left && from.rack != to.rack:
		ev.at, ev.kind = s.racks[from.rack].up.carry(s.now, n), between
	case ev.kind == between:
		ev.at, ev.kind = s.racks[to.rack].down.carry(s.now, n), entered
	default:
		if !ev.ack {
			s.waits(e.peer, &to.down)
		}
		ev.at, ev.kind = to.down.carry(s.now, n), arrived
	}
	s.events.push(ev)
}

// waits slows an end down when the queue of a link is full: as TCP does when a packet
// is lost, which here it is not.
func (s *sim) waits(e *end, l *link) {
	o := &e.out
	if s.wire.queue > 0 && l.free-s.now > s.wire.queue && s.now >= o.slowed {
		o.window = max(o.window/2, 2*s.wire.packet)
		o.slowed = s.now + s.wire.queue
	}
}

// carry takes bytes that belong to no connection of the swarm from one node to
// another.
func (s *sim) carry(from, to *node, n int, then func()) {
	if from.dead {
		return
	}
	n = s.wire.on(n)
	at := func(at int64, do func()) { s.later(time.Duration(at-s.now), do) }
	last := func() {
		at(to.down.carry(s.now, n), func() {
			if !to.dead {
				then()
			}
		})
	}
	at(from.up.starts(s.now, n), func() {
		if from.rack == to.rack {
			last()
			return
		}
		at(s.racks[from.rack].up.carry(s.now, n), func() {
			at(s.racks[to.rack].down.carry(s.now, n), last)
		})
	})
}

// arrives handles a packet at its end, and says that it has come.
func (s *sim) arrives(e *end, x int32, direct bool) {
	if e.n.dead || e.closed {
		return
	}
	in := &e.peer.out
	n, done := int(x>>8), int(x&255)
	in.packets--
	switch in.owed += n; {
	case direct:
		s.direct(e.n, e.peer.n, s.wire.headers)
		in.owed -= n
	case s.coarse || in.owed >= 2*s.wire.packet || n < s.wire.packet:
		s.acks(e.peer, in.owed)
		in.owed = 0
	}
	for range done {
		m := in.items[in.here]
		if in.here++; in.here == len(in.items) {
			in.items, in.here, in.next = in.items[:0], 0, 0
		}
		if s.hears(e, m); e.closed {
			return
		}
	}
	if in.here < len(in.items) && in.items[in.here].says == block {
		e.progress(s, int(in.items[in.here].a))
	}
}

// acks says to an end that bytes have come.
func (s *sim) acks(e *end, n int) {
	ev := event{kind: left, ack: true, x: int32(n), who: e.id}
	if s.coarse {
		ev.at, ev.kind = s.direct(e.peer.n, e.n, s.wire.headers), arrived
	} else {
		ev.at = e.peer.n.up.carry(s.now, s.wire.headers)
	}
	s.events.push(ev)
}

// acked lets more fly.
func (s *sim) acked(e *end, n int) {
	if e.n.dead || e.closed {
		return
	}
	o := &e.out
	o.flying -= n
	o.window = min(s.wire.window, o.window+s.wire.packet*n/o.window)
	s.push(e)
	s.written(e)
}
