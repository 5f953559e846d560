package swarm

import (
	"maps"
	"slices"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
	"rookery/transport/swarm/rules"
)

// What is asked of whom is decided in package rules. A piece comes whole from one
// peer, so that a bad one has one culprit, and is passed on when it is complete.
// Only of what multicast left open ours are asked for the holes alone; when that
// turns out wrong the piece is asked for whole.
const (
	stockBlock  = 16 << 10 // bytes of one request to a stock client
	ownBlock    = 64 << 10 // to one of ours
	maxFetching = 64 << 20 // bytes of pieces that are not complete, of all torrents together
	maxFree     = 8        // buffers that a torrent keeps for its next pieces
	maxHoles    = 32       // of a piece: with more, or more than half of it, it is asked for whole
	maxDoubts   = 2        // of who filled holes in vain: then it shows whether it lies
)

// A download is a piece on its way from one peer.
type download struct {
	piece   int
	taken   int // times
	since   time.Time
	buf     []byte
	holes   []transport.Range // of the piece, to fill; nil: all of it
	blocks  []block
	missing int  // blocks
	reading bool // a block is being read into buf
	dropped bool // whoever reads it gives buf back
}

// A block is what one request is about.
type block struct {
	begin, length int // in the piece
	state         state
}

// state is how far a block is.
type state byte

const (
	asked state = iota
	got
	forgone
)

// newDownload is of blocks of size bytes at the most.
func newDownload(piece int, buf []byte, holes []transport.Range, size int, now time.Time) *download {
	d := &download{piece: piece, since: now, buf: buf, holes: holes}
	if holes == nil {
		holes = []transport.Range{{Size: int64(len(buf))}}
	}
	for _, h := range holes {
		for begin, end := int(h.Offset), int(h.Offset+h.Size); begin < end; begin += size {
			d.blocks = append(d.blocks, block{begin: begin, length: min(size, end-begin)})
		}
	}
	d.missing = len(d.blocks)
	return d
}

func (d *download) message(kind pp.MessageType, b int) pp.Message {
	begin, length := d.blocks[b].begin, d.blocks[b].length
	return pp.Message{Type: kind, Index: pp.Integer(d.piece), Begin: pp.Integer(begin), Length: pp.Integer(length)}
}

// find is the block that was asked for with these numbers.
func (c *conn) find(piece, begin, size int64) (*download, int) {
	for _, d := range c.open {
		if int64(d.piece) != piece {
			continue
		}
		for i, b := range d.blocks {
			if b.state == asked && int64(b.begin) == begin && int64(b.length) == size {
				return d, i
			}
		}
	}
	return nil, 0
}

// fill asks for as many pieces as keep our link busy.
func (t *Torrent) fill(now time.Time) {
	if t.failure != nil || t.gone || t.done {
		return
	}
	if t.open > 0 {
		t.nearby.Busy(now)
	}
	ask := func(c *conn) bool { return t.order(c, now) }
	feeds, ahead := rules.Asking(t.down, t.info.PieceLength, t.pieces.Streams())
	if !rules.Fill(maps.Keys(t.conns), feeds, ahead, now, t.chance.IntN, ask) {
		t.takeOver(now)
	}
}

// Gives is for rules.Fill.
func (c *conn) Gives() *rules.Feed { return &c.Feed }

// order asks a connection for one more piece, unless it has none for us.
func (t *Torrent) order(c *conn, now time.Time) bool {
	buf := t.buffer()
	if buf == nil {
		c.Dry = true // until a buffer is free
		return false
	}
	n, ok := t.pieces.Claim(func(n int) (int64, bool) {
		return rules.Rank(t.copies[n], t.rank[n]), c.has.Has(n) && (!c.Far || t.nearby.MayBring(n, t.open, t.id, t.mates, now))
	})
	if !ok {
		t.free = append(t.free, buf)
		c.Dry = true
		return false
	}
	t.open++
	buf = buf[:t.info.PieceSize(n)]
	var holes []transport.Range
	if c.ours && c.origin == transport.FromPeer && !t.whole[n] && c.doubts < maxDoubts && c.Open < maxRequests/maxHoles/2 {
		holes = few(t.pieces.Part(n, buf), len(buf))
	}
	t.askFor(c, newDownload(n, buf, holes, c.block, now))
	return true
}

// few are the holes of a piece of size bytes, or nil when it is better asked for whole.
// The first block of a whole piece is one of these in any case: see ask.
func few(holes []transport.Range, size int) []transport.Range {
	sum := int64(0)
	for _, h := range holes {
		sum += h.Size
	}
	if len(holes) == 0 || len(holes) > maxHoles || sum > int64(size)/2 || holes[0].Offset == 0 && holes[0].Size >= ownBlock {
		return nil
	}
	return holes
}

func (t *Torrent) askFor(c *conn, d *download) {
	if len(c.open) == 0 {
		c.Heard = d.since // the patience begins now
	}
	c.open = append(c.open, d)
	c.Open = len(c.open)
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
			if (slow == nil || d.since.Before(slow.since)) && d.taken < rules.MaxTaken && !d.reading && c.Slow(d.since, t.usual[btoi(c.Far)], t.nearby.Here(d.piece), now) {
				from, slow = c, d
			}
		}
	}
	if slow == nil {
		return
	}
	var to *conn
	for c := range t.conns {
		if c != from && len(c.open) == 0 && !c.Choked && (slow.holes == nil || c.ours && c.origin == transport.FromPeer && c.doubts < maxDoubts) && c.has.Has(slow.piece) && !now.Before(c.Paused) && !(c.Far && t.nearby.Here(slow.piece)) && (to == nil || c.Gained.After(to.Gained)) {
			to = c // who is dead has told of nothing lately
		}
	}
	if to == nil {
		return
	}
	from.forgo(slow, true)
	next := newDownload(slow.piece, slow.buf, slow.holes, to.block, now)
	next.taken = slow.taken + 1
	t.askFor(to, next)
}

// forgo strikes a piece off the list of a connection. Blocks of it may still come.
func (c *conn) forgo(d *download, cancel bool) {
	for b := range d.blocks {
		if d.blocks[b].state == asked {
			d.blocks[b].state = forgone
			c.late++
			if cancel {
				c.send(d.message(pp.Cancel, b))
			}
		}
	}
	c.strike(d)
}

// strike takes a piece that is not asked for any more off the list.
func (c *conn) strike(d *download) {
	c.open = slices.DeleteFunc(c.open, func(other *download) bool { return other == d })
	c.Open = len(c.open)
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
		c.Dry = false
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

// stalls takes the pieces back from connections that bring nothing.
func (t *Torrent) stalls(now time.Time) {
	for c := range t.conns {
		if c.held || !c.Silent(now) {
			continue
		}
		t.abandon(c)
		c.recount(func() {
			if c.Stalls(now) {
				c.close()
			}
		})
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
	d.blocks[b].state = forgone
	c.forgo(d, !c.ours)
	t.drop(d)
	c.Refused(now)
	t.fill(now)
	return nil
}
