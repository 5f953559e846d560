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

// A queue is a heap of events, four below each.
type queue struct {
	heap []event
	n    uint32
}

func before(a, b *event) bool { return a.at < b.at || a.at == b.at && a.n < b.n }

func (q *queue) push(e event) {
	q.n++
	e.n = q.n
	q.heap = append(q.heap, e)
	i := len(q.heap) - 1
	for i > 0 {
		up := (i - 1) / 4
		if !before(&e, &q.heap[up]) {
			break
		}
		q.heap[i] = q.heap[up]
		i = up
	}
	q.heap[i] = e
}

func (q *queue) pop() event {
	first, last := q.heap[0], q.heap[len(q.heap)-1]
	q.heap = q.heap[:len(q.heap)-1]
	n := len(q.heap)
	if n == 0 {
		return first
	}
	i := 0
	for {
		c := 4*i + 1
		if c >= n {
			break
		}
		least := c
		for j := c + 1; j < min(c+4, n); j++ {
			if before(&q.heap[j], &q.heap[least]) {
				least = j
			}
		}
		if !before(&q.heap[least], &last) {
			break
		}
		q.heap[i] = q.heap[least]
		i = least
	}
	q.heap[i] = last
	return first
}
