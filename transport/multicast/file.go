package multicast

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"rookery/transport"
	"rookery/wire"
)

// ErrNotSent says that too few want a file at the moment for it to be sent.
var ErrNotSent = errors.New("not sent to a group")

// A file can be had otherwise, too, so there is little patience: in so long, so large a
// part of it has to come.
const (
	lookAfter = 2 * time.Second
	leastPart = 32
)

// File fetches a file of at most limit bytes that the server sends to all who want
// it at this moment: the error is ErrNotSent when it does not. Nothing is tried twice.
func (s *Source) File(ctx context.Context, d wire.Digest, limit int64) ([]byte, error) {
	r, err := s.join(transport.InfoOf(d, 1).InfoHash) // before it is sent
	if err != nil {
		return nil, err
	}
	size, err := r.ask(ctx, d, limit)
	if err != nil {
		r.conn.Close()
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	content := make(memory, size)
	p := transport.NewPieces(transport.InfoOf(d, size), content)
	ctx, stop := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop(nil)
	watching.Go(func() {
		tick := time.NewTicker(lookAfter)
		defer tick.Stop()
		for seen := int64(0); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			now := p.Arrived()
			if came := now - seen; came <= size/leastPart {
				stop(fmt.Errorf("%s: %d of %d bytes in %s", d, came, size, lookAfter))
				return
			}
			seen = now
		}
	})
	if err := r.run(ctx, p); p.Missing() > 0 {
		return nil, err
	}
	return content, nil
}

// ask says that a file is wanted, and returns its size when it is sent.
func (r *reception) ask(ctx context.Context, d wire.Digest, limit int64) (size int64, err error) {
	sent, size, err := r.tell(ctx, wire.Want{Client: r.id, Layer: d, Rate: r.Config.Rate})
	switch {
	case err != nil:
		return 0, err // of one who does not answer no answer is awaited again
	case !sent || size == 0:
		err = ErrNotSent
	case size > limit:
		err = fmt.Errorf("%d bytes, limit %d", size, limit)
	default:
		return size, nil
	}
	r.leave(ctx, d)
	return 0, err
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
