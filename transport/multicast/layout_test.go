package multicast

import (
	"slices"
	"testing"

	"rookery/transport"
)

func TestShardFor(t *testing.T) {
	for _, tt := range []struct {
		mtu           int
		length, piece int64
		want          int
	}{
		{1280, 1 << 30, 256 << 10, 1152},
		{1500, 1 << 30, 256 << 10, 1408},
		{9000, 1 << 30, 4 << 20, 8832},
		{9000, 1 << 30, 256 << 10, 8192}, // 128 rows are 4 pieces
		{9000, 58 << 20, 32 << 10, 8704}, // 128 rows are 34 pieces
		{65536, 1 << 30, 4 << 20, 8832},
		{9000, 36_012, 36_012, 7232}, // five rows
		{1500, 100, 100, 704},
		{1500, 1 << 40, 1 << 40, 1408}, // no layout at all
	} {
		info := transport.Info{Length: tt.length, PieceLength: tt.piece, Hashes: make([][20]byte, (tt.length+tt.piece-1)/tt.piece)}
		if got := shardFor(tt.mtu, info); got != tt.want || got+headerSize+udpHeader+ipv6Header > tt.mtu {
			t.Errorf("%d bytes in pieces of %d, MTU %d: %d, want %d", tt.length, tt.piece, tt.mtu, got, tt.want)
		}
	}
}

// Every byte of a layer is in one block, and every piece in rows of one.
func TestLayout(t *testing.T) {
	for _, tt := range []struct {
		length, piece int64
		shard         int
		blocks        int
	}{
		{1, 64 << 10, 1408, 1},
		{3*64<<10 + 12345, 64 << 10, 1408, 2},
		{40*64<<10 + 1, 64 << 10, 1408, 21},
		{9 << 20, 64 << 10, 8896, 9},
		{9 << 20, 4 << 20, 1408, 3},
		{1 << 16, 16 << 10, 64, 4},
	} {
		info := transport.Info{Length: tt.length, PieceLength: tt.piece, Hashes: make([][20]byte, (tt.length+tt.piece-1)/tt.piece)}
		l, err := newLayout(info, tt.shard)
		if err != nil || l.blocks() != tt.blocks {
			t.Errorf("%+v: %d blocks, %v", tt, l.blocks(), err)
			continue
		}
		var sum int64
		for b := range l.blocks() {
			if l.start(b) != sum {
				t.Errorf("%+v: block %d begins at %d, want %d", tt, b, l.start(b), sum)
			}
			sum += int64(l.size(b))
			next := 0
			first, end := l.pieces(b)
			for n := first; n < end; n++ {
				from, to := l.span(b, n)
				if from > next || to <= from || to > l.rows(b) || l.of(n) != b {
					t.Errorf("%+v: piece %d is in rows %d to %d, the one before ended at %d", tt, n, from, to, next)
				}
				next = to
			}
			codes := make([]int, l.rows(b))
			for k := range l.codes(b) {
				data := 0
				for row := range l.rowsOf(b, k) {
					if data++; data <= l.data(b, k) {
						codes[row]++
					}
					if l.codeOf(b, row) != k {
						t.Errorf("%+v: row %d of block %d is in code %d, want %d", tt, row, b, l.codeOf(b, row), k)
					}
				}
				if l.data(b, k) > dataRows || data != l.data(b, k)+parityRows {
					t.Errorf("%+v: code %d of block %d has %d rows, of these %d of data", tt, k, b, data, l.data(b, k))
				}
			}
			if slices.Min(codes) < 1 || slices.Max(codes) > 1 {
				t.Errorf("%+v: block %d has rows in no code or in two", tt, b)
			}
			if next != l.rows(b) {
				t.Errorf("%+v: block %d ends at row %d of %d", tt, b, next, l.rows(b))
			}
		}
		if sum != tt.length {
			t.Errorf("%+v: blocks have %d bytes", tt, sum)
		}
	}
}

func TestLayoutRefuses(t *testing.T) {
	info := transport.Info{Length: 64 << 20, PieceLength: 16 << 20, Hashes: make([][20]byte, 4)}
	for _, shard := range []int{0, 63, 65, maxShard + 64, 64} { // the last one: too many rows
		if _, err := newLayout(info, shard); err == nil {
			t.Errorf("shards of %d bytes: nil, want an error", shard)
		}
	}
}
