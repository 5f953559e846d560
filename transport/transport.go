// Package transport moves the pieces of a layer: what is wanted (a torrent),
// what has arrived (Pieces) and who can bring more (a Source). It opens no
// socket; the packages below it do.
package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// A Source can fill in the pieces of a layer.
type Source interface {
	// Fetch returns nil only when all is there that p wants. It may be called again after
	// an error and goes on from what is there. When ctx ends it returns
	// without holding a claim.
	Fetch(ctx context.Context, p *Pieces) error
	fmt.Stringer
}

// Storage is where the bytes of a layer are kept. Writes at different places,
// and reads of what has been written, happen at the same time.
type Storage interface {
	io.ReaderAt
	io.WriterAt
}

// An Origin says who sent a piece.
type Origin int

// The origins.
const (
	FromServer Origin = iota // its seeder
	FromPeer
	FromHTTP
	FromMulticast
	origins
)

var (
	// ErrBadPiece says that the bytes are not those the torrent promises.
	ErrBadPiece = errors.New("piece hash differs")
	// ErrStorage says that the node cannot keep what it gets: no other source helps.
	ErrStorage = errors.New("storage")
	// ErrStalled says that a source brought no new bytes for too long.
	ErrStalled = errors.New("no new bytes")
)

// pause waits for d, or returns the error of ctx.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
