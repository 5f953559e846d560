package multicast

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"rookery/transport"
	"rookery/transport/transporttest"
)

// inFour is the size of a shard with which 40 pieces are 4 blocks, of one code each.
const inFour = 6208

// rowsOf is a collector of a layer of 40 pieces, and all rows of its blocks.
func rowsOf(t *testing.T, shard int, room int64, alone bool) (*collector, [][][]byte) {
	t.Helper()
	content, info := transporttest.Layer(t, 1, 40*64<<10)
	l, err := newLayout(info, shard)
	if err != nil {
		t.Fatal(err)
	}
	r := &round{Sender: &Sender{Layer: bytes.NewReader(content)}, layout: l}
	rows := make([][][]byte, l.blocks())
	for b := range rows {
		if rows[b], err = r.read(b); err != nil {
			t.Fatal(err)
		}
	}
	return newCollector(l, room, alone), rows
}

// A code is complete with any rows of it, as many as it has of data, and restores
// the others, whatever becomes of the block's other codes.
func TestAnyRows(t *testing.T) {
	for _, shard := range []int{inFour, 128} { // 1 code, 4 of them
		c, rows := rowsOf(t, shard, 64<<20, true)
		now := time.Unix(100, 0)
		order := rand.New(rand.NewPCG(1, 1)).Perm(c.all(1))
		heard := make([]int, c.codes(1))
		seq := uint32(0)
		var b *block
		for _, row := range order {
			k := c.codeOf(1, row)
			for range 2 { // twice is once
				seq++
				b, _, _ = c.add(header{block: 1, row: uint16(row), seq: seq, last: uint32(c.blocks() - 1)}, rows[1][row], now)
			}
			heard[k]++
			if heard[k] != c.data(1, k) {
				continue
			}
			if got := c.restorable(b); !slices.Equal(got, []int{k}) || !c.ready(b) {
				t.Fatalf("after %d rows of code %d: %v can be restored", heard[k], k, got)
			}
			if err := c.restore(1, k, c.table(b)); err != nil {
				t.Fatal(err)
			}
			c.restored(b, k)
			left := 0
			for i, n := range heard {
				left += max(0, c.data(1, i)-n)
			}
			if got := c.missing(b); got != left {
				t.Fatalf("%d rows missing, want %d", got, left)
			}
			for row := range c.rowsOf(1, k) {
				if row < c.rows(1) && (!b.have[row] || !bytes.Equal(b.data[row*c.shard:(row+1)*c.shard], rows[1][row])) {
					t.Fatalf("row %d is another one", row)
				}
			}
		}
		if c.missing(b) != 0 || len(b.parity) > 0 || c.used != int64(len(b.data)) {
			t.Errorf("%d rows missing, %d of parity kept, %d bytes used", c.missing(b), len(b.parity), c.used)
		}
		if w := c.wants(now); w[0] != 255 || w[1] != 0 {
			t.Errorf("wants %v, want all of the others", w)
		}
	}
}

// The sender gives each code of a block as many rows: one that lacks some has it send
// as many to all.
func TestWantsOfCodes(t *testing.T) {
	c, rows := rowsOf(t, 128, 64<<20, true)
	now := time.Unix(100, 0)
	lost := 0
	for row := range c.rows(0) {
		if c.codeOf(0, row) == 1 && lost < 20 {
			lost++
			continue
		}
		c.add(header{row: uint16(row), seq: uint32(row), last: 39}, rows[0][row], now)
	}
	if got, want := c.wants(now)[0], byte(40); got != want { // 80 of 512 rows, in 255ths
		t.Errorf("wants %d, want %d", got, want)
	}
	if holes := c.part(0, make([]byte, 64<<10)); len(holes) != 20 {
		t.Errorf("%d holes, want 20", len(holes))
	}
}

// Beside others, what the sender has passed is theirs to bring while it goes on: it is asked
// for when it has ended, or when they have had much time.
func TestWantsBesideOthers(t *testing.T) {
	c, rows := rowsOf(t, inFour, 64<<20, false)
	began := time.Unix(100, 0)
	now := began
	hear := func(block, row int) {
		c.add(header{block: uint32(block), row: uint16(row), last: 3}, rows[block][row], now)
	}
	hear(0, 0)
	for ; now.Sub(began) < givenUp; now = now.Add(time.Second) {
		hear(1, 0)
		if w := c.wants(now); now.Sub(began) > quietAfter && (w[0] != 0 || w[1] == 0) {
			t.Fatalf("wants %v after %v, want all but the first", w, now.Sub(began))
		}
	}
	hear(1, 0)
	if w := c.wants(now); w[0] == 0 {
		t.Errorf("wants %v after %v, want all", w, now.Sub(began))
	}
	for _, tt := range []struct {
		after time.Duration
		want  bool
	}{{breakAfter + 1, false}, {againAfter, true}} {
		if w := c.wants(now.Add(tt.after)); (w[1] > 0) != tt.want {
			t.Errorf("wants %v %v after the sender's end", w, tt.after)
		}
	}
}

// Numbers that the layer does not have are nobody's rows.
func TestForeignNumbers(t *testing.T) {
	c, rows := rowsOf(t, inFour, 64<<20, true)
	for _, h := range []header{{block: 4, last: 3}, {block: 1 << 31, last: 3}, {block: 3, last: 4}, {block: 0, row: 60000, last: 3}} {
		if b, helps, news := c.add(h, rows[0][0], time.Unix(100, 0)); b != nil || helps || news || len(c.open) > 0 {
			t.Errorf("%+v was taken", h)
		}
	}
}

// With memory for two blocks, and every block lacking some, they are kept until they
// are complete; where little is lost, one that lacks much makes room.
func TestLittleMemory(t *testing.T) {
	c, rows := rowsOf(t, inFour, 1<<20, true)
	now := time.Unix(100, 0)
	seq := uint32(0)
	give := func(n int, part float64) {
		for row := range int(float64(c.rows(n)) * part) {
			seq++
			c.add(header{block: uint32(n), row: uint16(row), seq: seq, last: 3}, rows[n][row], now)
		}
		now = now.Add(time.Second)
	}
	c.share = 0.3
	give(0, 0.7)
	c.share = 0.3
	give(1, 0.7)
	c.share = 0.3
	give(2, 0.7)
	if c.open[0] == nil || c.open[1] == nil || c.open[2] != nil {
		t.Fatal("a block that had most of its rows was given up for one that will lack as many")
	}
	c.share = 0
	give(2, 1)
	if len(c.open) > 2 || c.open[2] == nil {
		t.Fatal("a block that lacks much was kept, where nothing is lost any more")
	}
}

// What is ahead of the sender comes by itself; of what it has passed others bring
// as little as completes the rest, and twice as much each time that it is due.
func TestExpected(t *testing.T) {
	c, rows := rowsOf(t, inFour, 64<<20, false)
	now := time.Unix(100, 0)
	count := func() (n [4]int) {
		for piece, is := range c.expected(now) {
			if is {
				n[c.of(piece)]++
			}
		}
		return n
	}
	if c.expected(now) != nil {
		t.Error("something is expected of nobody")
	}
	per := c.per
	hear := func(block, row int) {
		c.add(header{block: uint32(block), row: uint16(row), last: 3}, rows[block][row], now)
	}
	for row := range c.rows(1) + 3 { // it begins with block 1: it was not there before
		if !slices.Contains([]int{5, 30, 55, 80, 100}, row) { // in 5 pieces
			hear(1, row)
		}
	}
	last := len(c.info.Hashes) - 3*per
	if got := count(); got != [4]int{0, per, per, last} {
		t.Errorf("expected by block: %v, want none of the first", got)
	}
	now = now.Add(quietAfter + 1)
	first, _ := c.pieces(1)
	some := c.holes(c.open[1], 2)
	c.asked = slices.Repeat([]bool{true}, len(c.info.Hashes))
	c.asked[first+some[0]] = false
	if others := c.holes(c.open[1], 2); len(others) != 2 || slices.Contains(others, some[0]) {
		t.Errorf("asked for pieces %v of a block, want 2 and not %d, which nobody claims", others, some[0])
	}
	c.asked = nil
	for _, less := range []int{2, 4, 5, 5} {
		hear(2, 0)
		if got := count(); got[1] != per-less || got[2] != per {
			t.Errorf("expected by block: %v, want all of the second but %d", got, less)
		}
		now = now.Add(dueBeside)
		c.put = now
	}
	now = now.Add(aloneAfter)
	if got := count(); got != [4]int{0, per - 5, 0, 0} {
		t.Errorf("expected by block: %v, want of who is silent no more than what can be restored", got)
	}
	hear(2, 0)
	c.spoilt = 2
	if c.expected(now) != nil {
		t.Error("something is expected of who sends wrong pieces")
	}
	c.spoilt = 0
	now = c.put.Add(hopeFor)
	hear(3, 0)
	if c.expected(now) == nil || !c.trusted(now) {
		t.Error("nothing is expected of who sends again")
	}
	now = now.Add(1)
	hear(3, 1)
	if c.expected(now) != nil || c.trusted(now) {
		t.Error("something is expected of who sends rows and never a piece")
	}
}

func TestLost(t *testing.T) {
	c, rows := rowsOf(t, inFour, 64<<20, false)
	now := time.Unix(100, 0)
	for round := range 3 {
		for i := range 200 {
			if seq := 200*round + i; i%4 != 1 || round == 2 {
				c.add(header{seq: uint32(seq), last: 3}, rows[0][0], now)
			}
		}
		want := 0.25
		if round == 2 {
			want = 0
		}
		if got, known := c.lost(now); !known || got < want-0.01 || got > want+0.01 {
			t.Errorf("round %d: %.3f lost, want %.2f", round, got, want)
		}
	}
	c.add(header{seq: 599, last: 3}, rows[0][0], now) // twice, and after it was asked
	if got, _ := c.lost(now); got != 0 || c.heavy != 0 {
		t.Errorf("%.3f lost after a late datagram, want 0", got)
	}
}

// What is here of a piece need not come again.
func TestPart(t *testing.T) {
	c, rows := rowsOf(t, inFour, 64<<20, false)
	now := time.Unix(100, 0)
	n := c.per + 1 // its first row is its neighbour's, too
	content := make([]byte, c.info.PieceSize(n))
	if c.part(n, content) != nil {
		t.Error("there is something of a block that has not begun")
	}
	from, to := c.span(1, n)
	lost := map[int]bool{from: true, from + 4: true, from + 5: true}
	for row := from; row < to; row++ {
		if !lost[row] {
			c.add(header{block: 1, row: uint16(row), last: 3}, rows[1][row], now)
		}
	}
	whole := bytes.Join(rows[1], nil)[c.info.PieceLength:][:len(content)]
	holes := c.part(n, content)
	edge := int64(from+1)*int64(c.shard) - c.info.PieceLength
	want := []transport.Range{{Size: edge}, {Offset: edge + 3*int64(c.shard), Size: 2 * int64(c.shard)}}
	if !slices.Equal(holes, want) {
		t.Fatalf("holes %v, want %v", holes, want)
	}
	for _, h := range holes {
		copy(content[h.Offset:h.Offset+h.Size], whole[h.Offset:])
	}
	if !bytes.Equal(content, whole) {
		t.Error("other bytes are around the holes")
	}
}

// A pass is over at once when its last datagram came, and soon when that is lost.
func TestBroken(t *testing.T) {
	for _, tt := range []struct {
		ends   uint16
		silent time.Duration
		want   bool
	}{
		{0, breakAfter, false},
		{0, breakAfter + 1, true},
		{1, 0, true},
		{2, endAfter, false},
		{2, endAfter + 1, true},
	} {
		c, rows := rowsOf(t, inFour, 64<<20, true)
		now := time.Unix(100, 0)
		c.add(header{last: 3, ends: tt.ends}, rows[0][0], now)
		if got := c.broken(now.Add(tt.silent)); got != tt.want {
			t.Errorf("%d datagrams to come, silent for %s: over %v, want %v", tt.ends, tt.silent, got, tt.want)
		}
		c.add(header{seq: 1, pass: 1, last: 3}, rows[0][1], now) // of the next one
		if c.broken(now.Add(breakAfter)) {
			t.Errorf("the next pass is over when it begins")
		}
	}
}

// What takes turns comes by itself, wherever among it the sender is.
func TestExpectedByTurns(t *testing.T) {
	c, rows := rowsOf(t, inFour, 64<<20, false)
	now := time.Unix(100, 0)
	for row := range 3 {
		for block := range 3 {
			c.add(header{seq: uint32(3*row + block), block: uint32(block), row: uint16(row), last: 3}, rows[block][row], now)
			for n, is := range c.expected(now) {
				if !is {
					t.Fatalf("after row %d of block %d nobody sends piece %d of block %d", row, block, n, c.of(n))
				}
			}
		}
	}
}
