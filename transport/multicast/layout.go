package multicast

import (
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"github.com/klauspost/reedsolomon"

	"rookery/transport"
)

// How a layer is cut. A block is some whole pieces; it is cut into data rows of
// one size, the last one filled up with zeros, and any of its rows, data or
// parity, replace any others. The more rows a block has, the closer to the mean
// is the share that gets lost, and the less parity is enough; the code's cost
// hardly grows with them (docs/transports.md).
const (
	aimRows   = 512
	shardUnit = 64   // the code's
	maxShard  = 8960 // in an Ethernet packet of 9000 bytes
	minParity = 16
	maxRows   = 1 << 16 // the code's
)

// overhead is what a datagram has before its header on the wire: Ethernet, IPv6
// or as much of IPv4, UDP.
const (
	ethernet   = 14
	ipv4Header = 20
	ipv6Header = 40
	udpHeader  = 8
)

// shardFor is the largest size of a shard for packets of mtu bytes.
func shardFor(mtu int) int {
	return min(maxShard, mtu-ipv6Header-udpHeader-headerSize) / shardUnit * shardUnit
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
	info   transport.Info
	shard  int // bytes
	per    int // pieces of a block
	parity int // rows of a block, besides data

	mu    sync.Mutex
	codes map[int]reedsolomon.Encoder // by data rows: the last block may have fewer
}

func newLayout(info transport.Info, shard int) (*layout, error) {
	if err := checkShard(shard); err != nil {
		return nil, err
	}
	l := &layout{info: info, shard: shard, codes: map[int]reedsolomon.Encoder{}}
	l.per = min(len(info.Hashes), max(1, int(int64(aimRows*shard)/info.PieceLength)))
	rows := l.rows(0)
	l.parity = max(minParity, 1<<bits.Len(uint(rows/3)))
	if rows+l.parity > maxRows {
		return nil, fmt.Errorf("pieces of %d bytes have %d rows of %d: the code has %d", info.PieceLength, rows+l.parity, shard, maxRows)
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
func (l *layout) all(b int) int { return l.rows(b) + l.parity }

// span is the data rows [first, end) of block b that piece n touches.
func (l *layout) span(b, n int) (first, end int) {
	from := int64(n)*l.info.PieceLength - l.start(b)
	to := from + int64(l.info.PieceSize(n))
	return int(from / int64(l.shard)), int((to + int64(l.shard) - 1) / int64(l.shard))
}

func (l *layout) code(rows int) (reedsolomon.Encoder, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.codes[rows]; c != nil {
		return c, nil
	}
	c, err := reedsolomon.New(rows, l.parity, reedsolomon.WithLeopardGF(true), reedsolomon.WithMaxGoroutines(1))
	if err == nil {
		l.codes[rows] = c
	}
	return c, err
}

// encode fills the parity rows of a block whose data rows are there.
func (l *layout) encode(b int, rows [][]byte) error {
	code, err := l.code(l.rows(b))
	if err != nil {
		return err
	}
	return code.Encode(rows)
}

// restore fills the data rows that are empty, in place, from as many others as
// there are data rows. The code's tables, which take longer to make than a hundred
// MiB to receive, are made when there are such rows.
func (l *layout) restore(b int, rows [][]byte) error {
	if !slices.ContainsFunc(rows[:l.rows(b)], func(row []byte) bool { return len(row) == 0 }) {
		return nil
	}
	code, err := l.code(l.rows(b))
	if err != nil {
		return err
	}
	return code.ReconstructData(rows)
}
