package rules

import "testing"

// Beside a stream, hardly anything is asked for, however quick the link is.
func TestAsking(t *testing.T) {
	const piece = 64 << 10
	for _, tt := range []struct {
		down          int64 // bytes a second
		streams       bool
		feeds, pieces int
	}{
		{0, false, 4, 2},
		{10 << 20, false, 4, 4},
		{0, true, 2, 1},
		{10 << 20, true, 2, 1},
	} {
		if feeds, pieces := Asking(tt.down, piece, tt.streams); feeds != tt.feeds || pieces != tt.pieces {
			t.Errorf("%d bytes a second, streams %v: %d nodes for %d pieces each, want %d and %d", tt.down, tt.streams, feeds, pieces, tt.feeds, tt.pieces)
		}
	}
}
