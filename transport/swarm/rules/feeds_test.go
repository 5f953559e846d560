package rules

import (
	"testing"
	"time"
)

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

// What was asked of another rack is waited for longer, unless it is near by now.
func TestSlow(t *testing.T) {
	const usually = 400 * time.Millisecond
	for _, tt := range []struct {
		far, here bool
		after     time.Duration
		want      bool
	}{
		{false, true, 3 * usually, false},
		{false, true, 3*usually + 1, true},
		{true, false, 3*usually + 1, false},
		{true, false, StallAfter + 1, true},
		{true, true, 3 * usually, false},
		{true, true, 3*usually + 1, true},
	} {
		f, now := Feed{Far: tt.far}, time.Unix(100, 0)
		if got := f.Slow(now.Add(-tt.after), usually, tt.here, now); got != tt.want {
			t.Errorf("far %v, near by now %v, after %v: slow %v, want %v", tt.far, tt.here, tt.after, got, tt.want)
		}
	}
}
