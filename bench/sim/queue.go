package sim

// An event is something that happens at a time. It has no pointers, since there are
// hundreds of millions.
type event struct {
	at   int64  // nanoseconds since the start
	n    uint32 // of two at a time, the one that was planned first is first
	x    int32  // bytes, or what the kind says
	who  int32  // the number of a node, an end or a function
	kind kind
	ack  bool // what says that a packet has come
}

// A queue has the events of one slot of time in a heap, those of the next slots as
// they were planned, and all later ones in another heap. A heap of all is larger than
// the caches of a processor.
type queue struct {
	now   heap
	soon  [slots][]event // those of slot i are at i%slots
	late  heap
	slot  int64 // of now, where those are, too, that come before
	count int   // in soon
	n     uint32
}

const (
	slotBits = 16 // of a number of nanoseconds
	slots    = 1 << 12
)

func (q *queue) len() int { return len(q.now) + q.count + len(q.late) }

func (q *queue) push(e event) {
	q.n++
	e.n = q.n
	q.put(e)
}

func (q *queue) put(e event) {
	switch slot := e.at >> slotBits; {
	case slot <= q.slot:
		q.now.push(e)
	case slot < q.slot+slots:
		list := &q.soon[slot%slots]
		*list = append(*list, e)
		q.count++
	default:
		q.late.push(e)
	}
}

func (q *queue) pop() event {
	for len(q.now) == 0 {
		q.turn()
	}
	return q.now.pop()
}

// turn goes on to the next slot, or to the first that has something.
func (q *queue) turn() {
	q.slot++
	if q.count == 0 {
		q.slot = max(q.slot, q.late[0].at>>slotBits)
	}
	list := &q.soon[q.slot%slots]
	q.count -= len(*list)
	q.now, *list = *list, q.now[:0]
	q.now.order()
	for len(q.late) > 0 && q.late[0].at>>slotBits < q.slot+slots {
		q.put(q.late.pop())
	}
}

// A heap is one of events, four below each.
type heap []event

func before(a, b *event) bool { return a.at < b.at || a.at == b.at && a.n < b.n }

func (h *heap) push(e event) {
	*h = append(*h, e)
	q := *h
	i := len(q) - 1
	for i > 0 {
		up := (i - 1) / 4
		if !before(&e, &q[up]) {
			break
		}
		q[i] = q[up]
		i = up
	}
	q[i] = e
}

func (h *heap) pop() event {
	q := *h
	first, last := q[0], q[len(q)-1]
	q = q[:len(q)-1]
	*h = q
	if len(q) > 0 {
		q.sink(0, last)
	}
	return first
}

// order makes a heap of events in any order.
func (h heap) order() {
	for i := (len(h)+2)/4 - 1; i >= 0; i-- {
		h.sink(i, h[i])
	}
}

// sink puts an event in place i, or further below.
func (h heap) sink(i int, e event) {
	for {
		c := 4*i + 1
		if c >= len(h) {
			break
		}
		least := c
		for j := c + 1; j < min(c+4, len(h)); j++ {
			if before(&h[j], &h[least]) {
				least = j
			}
		}
		if !before(&h[least], &e) {
			break
		}
		h[i] = h[least]
		i = least
	}
	h[i] = e
}
