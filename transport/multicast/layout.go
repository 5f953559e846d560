package multicast

import (
	"fmt"
	"iter"
	"math"
	"sync"

	"github.com/klauspost/reedsolomon"

	"rookery/transport"
)

// How a layer is cut. A block is some whole pieces; it is cut into data rows of
// one size, the last one filled up with zeros, which take turns in the block's codes,
// and any rows of a code, data or parity, replace any others of it. The more rows a
// code has, the closer to the mean is the share of them that gets lost, and the less
// parity is enough; with more than 256, parity rounded up to a power of two, it is
// one over a larger field that takes three times as long.
const (
	dataRows   = 128     // of a code, at the most
	parityRows = 128     // of each
	shardUnit  = 64      // the code's
	maxShard   = 8960    // in an Ethernet packet of 9000 bytes
	maxRows    = 1 << 16 // of a block, in a header
)

// overhead is what a datagram has before its header on the wire: Ethernet, IPv6
// or as much of IPv4, UDP.
const (
	ethernet   = 14
	ipv4Header = 20
	ipv6Header = 40
	udpHeader  = 8
)

// shardFor is the size of a shard with which a layer takes the fewest bytes in packets of
// mtu bytes at the most: smaller ones have more headers, and of larger ones more
// of the last row of each block may be empty.
func shardFor(mtu int, info transport.Info) int {
	const headers = ethernet + ipv6Header + udpHeader + headerSize
	most := min(maxShard, mtu+ethernet-headers) / shardUnit * shardUnit
	best, least := most, int64(math.MaxInt64)
	for size := most; size >= most/2; size -= shardUnit {
		l, err := newLayout(info, size)
		if err != nil {
			break
		}
		last := l.blocks() - 1
		if sum := int64(last*l.rows(0)+l.rows(last)) * int64(headers+size); sum < least {
			best, least = size, sum
		}
	}
	return best
}

func checkShard(size int) error {
	if size < shardUnit || size > maxShard || size%shardUnit != 0 {
		return fmt.Errorf("shard of %d bytes, want a multiple of %d up to %d", size, shardUnit, maxShard)
	}
	return nil
}

// A layout is how a layer is cut into shards of one size. Sender and receivers
// come to the same one.
type layout struct {
	info  transport.Info
	shard int // bytes
	per   int // pieces of a block

	mu   sync.Mutex
	made map[int]reedsolomon.Encoder // codes, by data rows
}

func newLayout(info transport.Info, shard int) (*layout, error) {
	if err := checkShard(shard); err != nil {
		return nil, err
	}
	l := &layout{info: info, shard: shard, made: map[int]reedsolomon.Encoder{}}
	l.per = min(len(info.Hashes), max(1, int(int64(dataRows*shard)/info.PieceLength)))
	if all := l.all(0); all > maxRows {
		return nil, fmt.Errorf("pieces of %d bytes have %d rows of %d: a block has %d", info.PieceLength, all, shard, maxRows)
	}
	return l, nil
}

// blocks is their number.
func (l *layout) blocks() int { return (len(l.info.Hashes) + l.per - 1) / l.per }

// pieces are [first, end) of block b.
func (l *layout) pieces(b int) (first, end int) {
	return b * l.per, min((b+1)*l.per, len(l.info.Hashes))
}

// of is the block that piece n is in.
func (l *layout) of(n int) int { return n / l.per }

// start is where block b begins in the layer.
func (l *layout) start(b int) int64 { return int64(b*l.per) * l.info.PieceLength }

// size is how many bytes of the layer block b has.
func (l *layout) size(b int) int {
	return int(min(int64(l.per)*l.info.PieceLength, l.info.Length-l.start(b)))
}

// rows is how many data rows block b has.
func (l *layout) rows(b int) int { return (l.size(b) + l.shard - 1) / l.shard }

// all is how many rows block b has.
func (l *layout) all(b int) int { return l.rows(b) + l.codes(b)*parityRows }

// codes is how many codes block b has.
func (l *layout) codes(b int) int { return (l.rows(b) + dataRows - 1) / dataRows }

// codeOf is the code of block b that has a row.
func (l *layout) codeOf(b, row int) int {
	if rows := l.rows(b); row >= rows {
		row -= rows
	}
	return row % l.codes(b)
}

// data is how many data rows code k of block b has.
func (l *layout) data(b, k int) int { return (l.rows(b) - k + l.codes(b) - 1) / l.codes(b) }

// rowsOf are the rows of code k of block b, in its order.
func (l *layout) rowsOf(b, k int) iter.Seq[int] {
	return func(yield func(row int) bool) {
		rows, codes := l.rows(b), l.codes(b)
		for row := k; row < rows; row += codes {
			if !yield(row) {
				return
			}
		}
		for row := rows + k; row < l.all(b); row += codes {
			if !yield(row) {
				return
			}
		}
	}
}

// span is the data rows [first, end) of block b that piece n touches.
func (l *layout) span(b, n int) (first, end int) {
	from := int64(n)*l.info.PieceLength - l.start(b)
	to := from + int64(l.info.PieceSize(n))
	return int(from / int64(l.shard)), int((to + int64(l.shard) - 1) / int64(l.shard))
}

// code is code k of block b, and of the block's rows those that it has.
func (l *layout) code(b, k int, rows [][]byte) (c reedsolomon.Encoder, own [][]byte, err error) {
	for row := range l.rowsOf(b, k) {
		own = append(own, rows[row])
	}
	data := l.data(b, k)
	l.mu.Lock()
	defer l.mu.Unlock()
	if c = l.made[data]; c == nil {
		if c, err = reedsolomon.New(data, parityRows, reedsolomon.WithLeopardGF(true), reedsolomon.WithMaxGoroutines(1)); err == nil {
			l.made[data] = c
		}
	}
	return c, own, err
}

// encode fills the parity rows of a block whose data rows are there.
func (l *layout) encode(b int, rows [][]byte) error {
	for k := range l.codes(b) {
		code, own, err := l.code(b, k, rows)
		if err == nil {
			err = code.Encode(own)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// restore fills the data rows of code k of a block that are empty, in place, from
// others of the code, as many as it has of data.
func (l *layout) restore(b, k int, rows [][]byte) error {
	code, own, err := l.code(b, k, rows)
	if err != nil {
		return err
	}
	return code.ReconstructData(own)
}
