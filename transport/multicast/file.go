package multicast

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"rookery/transport"
	"rookery/wire"
)

// ErrNotSent says that too few want a file at the moment for it to be sent.
var ErrNotSent = errors.New("not sent to a group")

// silentFor is how long nothing of a file may come: who gives it to one node
// alone is at hand.
const silentFor = 2 * time.Second

// File fetches a file of at most limit bytes that the server sends to all who want
// it at this moment: the error is ErrNotSent when it does not. Nothing is tried twice.
func (s *Source) File(ctx context.Context, d wire.Digest, limit int64) ([]byte, error) {
	r, err := s.join(transport.InfoOf(d, 1).InfoHash) // before it is sent
	if err != nil {
		return nil, err
	}
	want := wire.Want{Client: r.id, Layer: d, Rate: s.Config.Rate}
	size := r.tell(ctx, want)
	switch {
	case size == 0:
		err = ErrNotSent
	case size > limit:
		err = fmt.Errorf("%d bytes, limit %d", size, limit)
	}
	if err != nil {
		r.conn.Close()
		want.Done = true
		r.tell(ctx, want)
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	content := make(memory, size)
	p := transport.NewPieces(transport.InfoOf(d, size), content)
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go func() {
		for seen := int64(0); ; {
			select {
			case <-ctx.Done():
				return
			case <-time.After(silentFor):
			}
			now := p.Arrived()
			if now == seen {
				stop(fmt.Errorf("%s: nothing of it for %s", d, silentFor))
				return
			}
			seen = now
		}
	}()
	if err := r.run(ctx, p); p.Missing() > 0 {
		return nil, err
	}
	return content, nil
}

// memory is storage for a file.
type memory []byte

func (m memory) ReadAt(b []byte, off int64) (int, error) {
	n := copy(b, m[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (m memory) WriteAt(b []byte, off int64) (int, error) { return copy(m[off:], b), nil }
