package multicast

import (
	"cmp"
	"math"
	"slices"
	"time"

	"rookery/transport"
)

const (
	quietAfter = 700 * time.Millisecond // without a row of it: the pass is beyond a block
	breakAfter = 300 * time.Millisecond // without a datagram: the pass is over
	endAfter   = 100 * time.Millisecond // the same, when the last one said that it ends
	aloneAfter = time.Second            // without a datagram: nothing comes any more
	dueAfter   = 6 * time.Second        // a piece asked of others is to be there
	dueBeside  = 60 * time.Second       // the same, while the sender fills the link
	hopeFor    = 20 * time.Second       // without a right piece: the others are not to wait
	againAfter = 5 * time.Second        // without a datagram: what others did not bring is asked of the sender
	givenUp    = 2 * dueBeside          // the same, of a block, however much else it sends
)

// A collector puts blocks together from rows in any order, in bounded memory. It
// has no lock, no clock and no socket of its own.
type collector struct {
	*layout
	room  int64 // bytes of blocks that may be open
	alone bool  // nobody else repairs
	open  map[int]*block
	used  int64
	state []blockState
	asked []bool // pieces that others may be asked for; nil: all

	heard          time.Time // a datagram
	sender         uint32
	pass, at, last uint32 // where the sender is
	ends           uint16 // 1: it is at the end of the pass, 2: before that, ...
	first, max     uint32 // of its datagrams since lost was asked
	came           int
	share          float64   // of datagrams that are lost, lately
	measured       bool      // share is
	heavy          int       // times in a row that this was too much
	spoilt         int       // blocks that had a piece with a wrong hash, since the last right one
	put            time.Time // the last right one, or the first datagram
}

// A blockState is what is known of a block, open or not.
type blockState struct {
	closed bool      // nothing of it is wanted any more
	touch  time.Time // a row of it was heard
}

// A block is one of which some rows are here.
type block struct {
	n      int
	data   []byte // rows, one after the other
	parity map[int][]byte
	have   []bool
	codes  []tally // what is here of each
	lacks  []int   // rows, by piece
	told   []bool  // by piece: put already, or found elsewhere
	busy   bool    // rows of it are being restored
	fed    bool    // what was there before it is among its rows
}

// A tally is how many rows of a code are here.
type tally struct{ all, data int }

func newCollector(l *layout, room int64, alone bool) *collector {
	return &collector{layout: l, room: room, alone: alone, open: map[int]*block{}, state: make([]blockState, l.blocks())}
}

// add takes a row. It says whether that helps, and whether there is something to
// do about its block.
func (c *collector) add(h header, shard []byte, now time.Time) (b *block, helps, news bool) {
	n, row := int(h.block), int(h.row)
	if n >= len(c.state) || row >= c.all(n) || int(h.last) >= len(c.state) {
		return nil, false, false
	}
	c.follow(h, now)
	s := &c.state[n]
	s.touch = now
	if s.closed {
		return nil, false, false
	}
	if b = c.open[n]; b == nil {
		if b = c.begin(n, now); b == nil {
			return nil, false, false
		}
		news = true
	}
	if b.have[row] || c.complete(b, c.codeOf(n, row)) {
		return b, false, news
	}
	helps = row >= c.rows(n)
	if !helps {
		c.eachPiece(b, row, func(i int) { helps = helps || !b.told[i] })
	}
	c.take(b, row, shard)
	return b, helps, news || c.ready(b)
}

// follow keeps account of where the sender is, and of what was lost on the way.
func (c *collector) follow(h header, now time.Time) {
	if c.put.IsZero() {
		c.put = now
	}
	if h.sender != c.sender || now.Sub(c.heard) > aloneAfter {
		if h.sender != c.sender && now.Sub(c.heard) < aloneAfter {
			return // of two, the account is of one
		}
		c.sender, c.first, c.max, c.came = h.sender, h.seq, h.seq, 0
	}
	c.heard, c.pass, c.at, c.last, c.ends = now, h.pass, h.block, h.last, h.ends
	if int32(h.seq-c.max) > 0 {
		c.max = h.seq
	}
	c.came++
}

// lost is the share that was lost since it was asked the last time. Of few datagrams
// nothing is said, unless there are no more; until then it is not known.
func (c *collector) lost(now time.Time) (share float64, known bool) {
	const enough = 50
	sent := int(int32(c.max-c.first)) + 1 // 0 when none came but late ones
	if c.came > 0 && (sent >= enough || !c.measured && c.broken(now)) {
		c.measured = true
		c.share = max(0, 1-float64(c.came)/float64(sent))
		c.first, c.came = c.max+1, 0
		if c.heavy++; c.share < tooMuch {
			c.heavy = 0
		}
	}
	return c.share, c.measured
}

// begin opens a block, or returns nil when others need the memory more.
func (c *collector) begin(n int, now time.Time) *block {
	size := int64(c.rows(n)) * int64(c.shard)
	for c.used+size > c.room && len(c.open) > 1 {
		victim := c.victim(now)
		if victim == nil {
			return nil
		}
		c.drop(victim)
	}
	b := &block{n: n, data: make([]byte, size), parity: map[int][]byte{}, have: make([]bool, c.all(n)), codes: make([]tally, c.codes(n))}
	first, end := c.pieces(n)
	for i := first; i < end; i++ {
		from, to := c.span(n, i)
		b.lacks = append(b.lacks, to-from)
		b.told = append(b.told, false)
	}
	c.open[n] = b
	c.used += size
	return b
}

// victim is a block that lacks much more than a new one will when it has passed:
// to drop any other one, when all lack something, would have none ever complete.
func (c *collector) victim(now time.Time) (worst *block) {
	for _, b := range c.open {
		if !b.busy && now.Sub(c.state[b.n].touch) > quietAfter && (worst == nil || c.missing(b) > c.missing(worst)) {
			worst = b
		}
	}
	if worst == nil {
		return nil
	}
	rows := float64(c.rows(worst.n))
	if float64(c.missing(worst)) < 2*c.share*rows+3*math.Sqrt(rows) {
		return nil
	}
	return worst
}

func (c *collector) drop(b *block) {
	delete(c.open, b.n)
	c.used -= int64(len(b.data))
	for range b.parity {
		c.used -= int64(c.shard)
	}
}

// complete says whether enough of a code is here.
func (c *collector) complete(b *block, k int) bool { return b.codes[k].all >= c.data(b.n, k) }

// missing is how many more rows make all codes of a block complete.
func (c *collector) missing(b *block) (sum int) {
	for k, here := range b.codes {
		sum += max(0, c.data(b.n, k)-here.all)
	}
	return sum
}

// lacking is how many more rows the sender has to send, of each code as many.
func (c *collector) lacking(b *block) int {
	most := 0
	for k, here := range b.codes {
		most = max(most, c.data(b.n, k)-here.all)
	}
	return most * len(b.codes)
}

// restorable are the codes that are complete and have data rows that are not here.
func (c *collector) restorable(b *block) (codes []int) {
	for k, here := range b.codes {
		if data := c.data(b.n, k); here.all >= data && here.data < data {
			codes = append(codes, k)
		}
	}
	return codes
}

// here notes that a row is here, which it was not.
func (c *collector) here(b *block, row int) {
	b.have[row] = true
	k := c.codeOf(b.n, row)
	b.codes[k].all++
	if row < c.rows(b.n) {
		b.codes[k].data++
		c.eachPiece(b, row, func(i int) { b.lacks[i]-- })
	}
}

func (c *collector) take(b *block, row int, shard []byte) {
	c.here(b, row)
	if row >= c.rows(b.n) {
		b.parity[row] = slices.Clone(shard)
		c.used += int64(c.shard)
		return
	}
	copy(b.data[row*c.shard:], shard)
}

// forget takes back that a data row is here.
func (c *collector) forget(b *block, row int) {
	if !b.have[row] {
		return
	}
	b.have[row] = false
	k := c.codeOf(b.n, row)
	b.codes[k].all--
	b.codes[k].data--
	c.eachPiece(b, row, func(i int) { b.lacks[i]++ })
}

// waste takes back that a parity row is here.
func (c *collector) waste(b *block, row int) {
	b.have[row] = false
	b.codes[c.codeOf(b.n, row)].all--
	delete(b.parity, row)
	c.used -= int64(c.shard)
}

// eachPiece calls f with each piece that a data row touches, counted in the block.
func (c *collector) eachPiece(b *block, row int, f func(i int)) {
	length := c.info.PieceLength
	from := int64(row) * int64(c.shard)
	to := min(from+int64(c.shard), int64(c.size(b.n)))
	for i := from / length; i*length < to; i++ {
		f(int(i))
	}
}

// ready says whether a block has a piece to give, or enough to restore some.
func (c *collector) ready(b *block) bool {
	for i, lacks := range b.lacks {
		if lacks == 0 && !b.told[i] {
			return true
		}
	}
	return len(c.restorable(b)) > 0
}

// table is the rows of a block as the code wants them: those that are not here
// are empty, and have their place.
func (c *collector) table(b *block) [][]byte {
	rows := make([][]byte, c.all(b.n))
	for row := range rows {
		if row >= c.rows(b.n) {
			rows[row] = b.parity[row]
			continue
		}
		at := row * c.shard
		if rows[row] = b.data[at : at+c.shard : at+c.shard]; !b.have[row] {
			rows[row] = rows[row][:0]
		}
	}
	return rows
}

// restored notes that all data rows of a code are here.
func (c *collector) restored(b *block, k int) {
	for row := range c.rowsOf(b.n, k) {
		switch {
		case row >= c.rows(b.n) && b.have[row]:
			c.waste(b, row)
		case row < c.rows(b.n) && !b.have[row]:
			c.here(b, row)
		}
	}
}

// piece is the bytes of piece i of a block.
func (c *collector) piece(b *block, i int) []byte {
	first, _ := c.pieces(b.n)
	at := int64(i) * c.info.PieceLength
	return b.data[at : at+int64(c.info.PieceSize(first+i))]
}

// known notes that a piece is there, whoever brought it, and that content, if
// not nil, is its bytes.
func (c *collector) known(b *block, i int, content []byte) {
	if b.told[i] {
		return
	}
	b.told[i] = true
	if content == nil || b.busy {
		return
	}
	copy(c.piece(b, i), content)
	first, _ := c.pieces(b.n)
	from, to := c.span(b.n, first+i)
	for row := from; row < to; row++ {
		whole := true
		c.eachPiece(b, row, func(j int) { whole = whole && b.told[j] })
		if whole && !b.have[row] {
			c.here(b, row)
		}
	}
}

// spoil forgets all rows of a block but those whose bytes are known to be right:
// one of them was not what it said.
func (c *collector) spoil(b *block) {
	for row := range c.rows(b.n) {
		whole := true
		c.eachPiece(b, row, func(i int) { whole = whole && b.told[i] })
		if !whole {
			c.forget(b, row)
		}
	}
	for row := range b.parity {
		c.waste(b, row)
	}
	c.spoilt++
}

// closeBlock notes that nothing of a block is wanted any more.
func (c *collector) closeBlock(n int) {
	c.state[n].closed = true
	if b := c.open[n]; b != nil && !b.busy {
		c.drop(b)
	}
}

// passed says whether the sender has been at a block and is no more.
func (c *collector) passed(n int, now time.Time) bool {
	touch := c.state[n].touch
	return !touch.IsZero() && (now.Sub(touch) > quietAfter || c.broken(now))
}

// broken says whether the sender pauses, or has ended.
func (c *collector) broken(now time.Time) bool {
	switch silent := now.Sub(c.heard); c.ends {
	case 0:
		return silent > breakAfter
	case 1:
		return true
	default:
		return silent > endAfter
	}
}

// flows says whether the sender sends.
func (c *collector) flows(now time.Time) bool {
	return !c.heard.IsZero() && now.Sub(c.heard) < aloneAfter
}

// trusted says whether what is sent turns out to be right, lately.
func (c *collector) trusted(now time.Time) bool {
	return c.spoilt < 2 && now.Sub(c.put) <= hopeFor
}

// expected says of each piece whether it comes by itself: those ahead of the
// sender in this pass, those of blocks that it is at by turns, and of a block that it
// has passed all but as many as others have to bring to make it complete, and twice as
// many each time that these are due and it is not. nil when nothing comes.
func (c *collector) expected(now time.Time) []bool {
	if !c.trusted(now) {
		return nil
	}
	var all []bool
	flows, due := c.flows(now), dueAfter
	if flows && c.share < lossy {
		due = dueBeside
	}
	ahead := (int(c.last) - int(c.at) + len(c.state)) % len(c.state)
	for n := range c.state {
		first, end := c.pieces(n)
		from := (n - int(c.at) + len(c.state)) % len(c.state)
		passed := c.passed(n, now)
		comes := flows && (from <= ahead || !c.state[n].touch.IsZero())
		b := c.open[n]
		switch {
		case c.state[n].closed, passed && b == nil, !passed && !comes:
			continue
		case !flows && c.missing(b) > c.rows(n)/8: // it broke off
			continue
		}
		if all == nil {
			all = make([]bool, len(c.info.Hashes))
		}
		for i := first; i < end; i++ {
			all[i] = true
		}
		if passed {
			late := min(16, now.Sub(c.state[n].touch)/due)
			for _, i := range c.holes(b, c.missing(b)<<late) {
				all[first+i] = false
			}
		}
	}
	return all
}

// holes are the pieces of a block that bring it so many rows that it misses when
// others bring what is missing of them: those first of which most bytes make
// whole rows.
func (c *collector) holes(b *block, missing int) (list []int) {
	first, _ := c.pieces(b.n)
	whole := make([]int, len(b.lacks)) // rows
	for row := range c.rows(b.n) {
		in, last := 0, 0
		c.eachPiece(b, row, func(i int) {
			if !b.told[i] {
				in, last = in+1, i
			}
		})
		if in == 1 && !b.have[row] {
			whole[last]++
		}
	}
	order := make([]int, 0, len(b.lacks))
	for i := range b.lacks {
		if !b.told[i] && b.lacks[i] > 0 && (c.asked == nil || c.asked[first+i]) {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(i, j int) int {
		return cmp.Or(cmp.Compare(whole[j]*b.lacks[i], whole[i]*b.lacks[j]), cmp.Compare(whole[j], whole[i]))
	})
	for _, i := range order {
		if missing <= 0 {
			break
		}
		list = append(list, i)
		missing -= max(1, whole[i])
	}
	return list
}

// part copies what is here of piece n into its bytes, and says what is not; nil:
// nothing is here.
func (c *collector) part(n int, bytes []byte) (holes []transport.Range) {
	b := c.open[c.of(n)]
	if b == nil || b.busy {
		return nil
	}
	first, _ := c.pieces(b.n)
	begin := int64(n-first) * c.info.PieceLength // in the block
	end := begin + int64(len(bytes))
	some := false
	from, to := c.span(b.n, n)
	for row := from; row < to; row++ {
		at := max(begin, int64(row*c.shard))
		next := min(end, int64((row+1)*c.shard))
		if b.have[row] {
			copy(bytes[at-begin:], b.data[at:next])
			some = true
			continue
		}
		if last := len(holes) - 1; last >= 0 && holes[last].Offset+holes[last].Size == at-begin {
			holes[last].Size += next - at
		} else {
			holes = append(holes, transport.Range{Offset: at - begin, Size: next - at})
		}
	}
	if !some {
		return nil
	}
	return holes
}

// wants is what to say of each block: 255ths of its rows that are lacked. Beside
// others, what has passed is theirs to repair while the sender goes on, and for a
// while after: what it sends for one takes the link of all.
func (c *collector) wants(now time.Time) []byte {
	list := make([]byte, len(c.state))
	for n, s := range c.state {
		if s.closed || !c.alone && c.passed(n, now) && now.Sub(s.touch) < givenUp && now.Sub(c.heard) < againAfter {
			continue
		}
		missing, rows := c.rows(n), c.rows(n)
		if b := c.open[n]; b != nil {
			missing = min(rows, c.lacking(b))
		}
		if missing == 0 {
			continue // it is being put together
		}
		list[n] = byte(max(1, min(255, math.Ceil(255*float64(missing)/float64(rows)))))
	}
	return list
}

// wanted says which blocks have something that p wants, and closes the others.
func (c *collector) wanted(p *transport.Pieces, wanted []bool) {
	c.asked = p.Claimable()
	for n := range c.state {
		if c.state[n].closed {
			continue
		}
		first, end := c.pieces(n)
		lacking := false
		for i := first; i < end && !lacking; i++ {
			lacking = !p.Has(i) && (wanted == nil || wanted[i])
		}
		if !lacking {
			c.closeBlock(n)
		}
	}
}
