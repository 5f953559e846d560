package swarm

import (
	"slices"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
)

// What is asked of whom. A piece comes whole from one peer, so that a bad one
// has one culprit, and is passed on when it is complete. A node stays with the few
// nodes that give it something: when as many streams leave each uplink as come in
// by each downlink, all links are full. Who asks here and there finds some that are
// busy and leaves others idle, and a no takes as long to come as a piece.
const (
	stockBlock  = 16 << 10 // bytes of one request to a stock client
	ownBlock    = 64 << 10 // to one of ours
	maxFetching = 64 << 20 // bytes of pieces that are not complete, of all torrents together
	maxFree     = 8        // buffers that a torrent keeps for its next pieces

	maxFeeds  = 4                      // nodes that are asked at a time
	minAsking = 2                      // pieces asked of each, or
	askAhead  = 100 * time.Millisecond // what it sends in that time, when that is more
	quietFor  = 2 * time.Second        // without a byte: another is asked beside it
	breather  = time.Second            // before who refused is asked again, unless it unchokes us

	stallAfter = 5 * time.Second // without a byte: the piece is asked elsewhere
	maxStalls  = 6               // one after the other: the connection is given up
	maxTaken   = 2               // times that a piece is taken from one peer for another
	slowAfter  = time.Second     // a piece is not taken from anybody before that
)

// A download is a piece on its way from one peer.
type download struct {
	piece   int
	taken   int // times
	since   time.Time
	buf     []byte
	size    int     // of a block, in bytes
	blocks  []state // of each
	missing int     // blocks
	reading bool    // a block is being read into buf
	dropped bool    // whoever reads it gives buf back
}

// state is how far a block is.
type state byte

const (
	asked state = iota
	got
	forgone
)

func newDownload(piece int, buf []byte, size int, now time.Time) *download {
	count := (len(buf) + size - 1) / size
	return &download{piece: piece, since: now, buf: buf, size: size, blocks: make([]state, count), missing: count}
}

// block is the place of block b in its piece.
func (d *download) block(b int) (begin, length int) {
	begin = b * d.size
	return begin, min(d.size, len(d.buf)-begin)
}

func (d *download) message(kind pp.MessageType, b int) pp.Message {
	begin, length := d.block(b)
	return pp.Message{Type: kind, Index: pp.Integer(d.piece), Begin: pp.Integer(begin), Length: pp.Integer(length)}
}

// find is the block that was asked for with these numbers.
func (c *conn) find(piece, begin, size int64) (*download, int) {
	for _, d := range c.open {
		b := int(begin / int64(d.size))
		if int64(d.piece) == piece && b < len(d.blocks) && d.blocks[b] == asked {
			if at, length := d.block(b); int64(at) == begin && int64(length) == size {
				return d, b
			}
		}
	}
	return nil, 0
}

// fill asks for as many pieces as keep our link busy. What a server offers is
// taken whatever else is asked: it offers no more than it can send.
func (t *Torrent) fill(now time.Time) {
	if t.failure != nil || t.gone || t.done {
		return
	}
	feeds, ahead := 0, t.ahead(minAsking, askAhead, t.down/maxFeeds)
	for c := range t.conns {
		switch {
		case c.origin == transport.FromServer:
			for t.can(c, now) && t.order(c, now) {
			}
		case len(c.open) > 0:
			t.feed(c, ahead, now)
			feeds += btoi(now.Sub(c.heard) < quietFor)
		}
	}
	for feeds < maxFeeds {
		c := t.another(now)
		if c == nil {
			t.takeOver(now)
			break
		}
		t.feed(c, ahead, now)
		feeds += btoi(len(c.open) > 0)
	}
}

// feed asks a node for as many pieces as are to be on their way.
func (t *Torrent) feed(c *conn, ahead int, now time.Time) {
	for len(c.open) < ahead && t.can(c, now) && t.order(c, now) {
	}
}

// can says whether there may be something to ask of a connection. Who stalled is
// trusted with one piece until it sends something.
func (t *Torrent) can(c *conn, now time.Time) bool {
	return !c.choked && c.useful > 0 && !c.dry && !now.Before(c.paused) && (c.stalled == 0 || len(c.open) == 0)
}

// another is a node that nothing is asked of, one that has said that it has room
// if there is one. Which of these is a matter of chance.
func (t *Torrent) another(now time.Time) (best *conn) {
	var count int
	for c := range t.conns {
		if c.origin == transport.FromServer || len(c.open) > 0 || !t.can(c, now) {
			continue
		}
		switch {
		case best == nil || c.invited && !best.invited:
			best, count = c, 1
		case c.invited == best.invited:
			if count++; t.chance.IntN(count) == 0 {
				best = c
			}
		}
	}
	return best
}

// ahead is how many pieces fit into a time at a rate, at least least.
func (t *Torrent) ahead(least int, d time.Duration, rate int64) int {
	return max(least, int(rate*int64(d)/int64(time.Second)/t.info.PieceLength))
}

// order asks a connection for one more piece, unless it has none for us.
func (t *Torrent) order(c *conn, now time.Time) bool {
	buf := t.buffer()
	if buf == nil {
		c.dry = true // until a buffer is free
		return false
	}
	n, ok := t.pieces.Claim(func(n int) (int64, bool) {
		return int64(t.copies[n])<<32 | int64(t.rank[n]), c.has.get(n)
	})
	if !ok {
		t.free = append(t.free, buf)
		c.dry = true
		return false
	}
	t.open++
	t.askFor(c, newDownload(n, buf[:t.info.PieceSize(n)], c.block, now))
	return true
}

func (t *Torrent) askFor(c *conn, d *download) {
	if len(c.open) == 0 {
		c.heard = d.since // the patience begins now
	}
	c.open = append(c.open, d)
	for b := range d.blocks {
		c.enqueue(d.message(pp.Request, b).MustMarshalBinary())
	}
	c.wake()
}

// takeOver asks an idle peer for a piece that another one is slow with. There
// is nothing else left to ask for: the slow ones are not to be waited for.
func (t *Torrent) takeOver(now time.Time) {
	var from *conn
	var slow *download
	for c := range t.conns {
		for _, d := range c.open {
			if (slow == nil || d.since.Before(slow.since)) && d.taken < maxTaken && !d.reading && now.Sub(d.since) > max(slowAfter, 3*t.usual) {
				from, slow = c, d
			}
		}
	}
	if slow == nil {
		return
	}
	for c := range t.conns {
		if c != from && len(c.open) == 0 && !c.choked && c.has.get(slow.piece) && !now.Before(c.paused) {
			from.forgo(slow, true)
			next := newDownload(slow.piece, slow.buf, c.block, now)
			next.taken = slow.taken + 1
			t.askFor(c, next)
			return
		}
	}
}

// forgo strikes a piece off the list of a connection. Blocks of it may still come.
func (c *conn) forgo(d *download, cancel bool) {
	for b, state := range d.blocks {
		if state == asked {
			d.blocks[b] = forgone
			c.late++
			if cancel {
				c.send(d.message(pp.Cancel, b))
			}
		}
	}
	c.open = slices.DeleteFunc(c.open, func(other *download) bool { return other == d })
}

// abandon gives the pieces a connection was fetching back to all.
func (t *Torrent) abandon(c *conn) {
	for len(c.open) > 0 {
		d := c.open[0]
		c.forgo(d, true)
		t.drop(d)
	}
}

// drop ends the fetching of a piece that others may fetch now.
func (t *Torrent) drop(d *download) {
	t.pieces.Release(d.piece)
	t.end(d)
}

// end gives back what a download used.
func (t *Torrent) end(d *download) {
	for c := range t.conns {
		c.dry = false
	}
	t.open--
	if d.reading {
		d.dropped = true
		return
	}
	t.recycle(d.buf)
}

func (t *Torrent) recycle(buf []byte) {
	t.free = append(t.free, buf[:cap(buf)])
	if t.done || t.gone {
		t.release(len(t.free))
	} else if len(t.free) > maxFree {
		t.release(1)
	}
}

// buffer is one for a piece, or nil when there are enough in use. A torrent
// that has none gets one whatever the others have.
func (t *Torrent) buffer() []byte {
	if last := len(t.free) - 1; last >= 0 {
		b := t.free[last]
		t.free = t.free[:last]
		return b
	}
	if t.peer.buffers.Add(t.info.PieceLength) > maxFetching && t.open > 0 {
		t.peer.buffers.Add(-t.info.PieceLength)
		return nil
	}
	return make([]byte, t.info.PieceLength)
}

// release gives up the last n buffers that are free.
func (t *Torrent) release(n int) {
	t.peer.buffers.Add(-int64(n) * t.info.PieceLength)
	keep := len(t.free) - n
	clear(t.free[keep:])
	t.free = t.free[:keep]
}

// stalls takes the pieces back from connections that bring nothing. Each time it
// takes longer until they are asked again, unless they say something.
func (t *Torrent) stalls(now time.Time) {
	for c := range t.conns {
		if len(c.open) == 0 || c.held || now.Sub(c.heard) <= stallAfter {
			continue
		}
		t.abandon(c)
		if c.stalled++; c.stalled >= maxStalls {
			c.close()
		}
		c.paused = now.Add(stallAfter << c.stalled)
	}
}

// refused takes note that a peer does not give a block: one of ours has enough
// to send already, and says when it has not.
func (t *Torrent) refused(c *conn, m *pp.Message, now time.Time) error {
	d, b := c.find(int64(m.Index), int64(m.Begin), int64(m.Length))
	if d == nil {
		if c.late--; c.late < 0 {
			return errUnasked
		}
		return nil
	}
	d.blocks[b] = forgone
	c.forgo(d, !c.ours)
	t.drop(d)
	c.paused, c.invited = now.Add(breather), false
	t.fill(now)
	return nil
}
