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
	FromServer Origin = iota
	FromPeer
)

var (
	// ErrBadPiece says that the bytes are not those the torrent promises.
	ErrBadPiece = errors.New("piece hash differs")
	// ErrStorage says that the node cannot keep what it gets: no other source helps.
	ErrStorage = errors.New("storage")
	// ErrStalled says that a source brought no new bytes for too long.
	ErrStalled = errors.New("no new bytes")
)

// First is a Source that uses one of several at a time. It moves to the next
// one on an error or when no new bytes arrive, and after the last it begins
// again with the first. The zero durations are good defaults.
type First struct {
	Sources  []Source
	Stall    time.Duration       // without a new byte: the next source (0: 20 s)
	Patience time.Duration       // without a new byte from any of them: give up (0: 10 min)
	Moved    func(Source, error) // told of each source that is left, and why; may be nil
}

// FirstOf is a First with the default patience.
func FirstOf(sources ...Source) *First { return &First{Sources: sources} }

func (f *First) String() string { return fmt.Sprintf("first of %v", f.Sources) }

// Fetch ends with nil, with ctx, with ErrStorage, or with what every source
// said in the last round once Patience is over.
func (f *First) Fetch(ctx context.Context, p *Pieces) error {
	patience := orDefault(f.Patience, 10*time.Minute)
	arrived, last := p.Arrived(), time.Now()
	for {
		var errs []error
		for _, src := range f.Sources {
			err := f.try(ctx, src, p)
			if err == nil {
				return nil
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			err = fmt.Errorf("%s: %w", src, err)
			if errors.Is(err, ErrStorage) {
				return err
			}
			if f.Moved != nil {
				f.Moved(src, err)
			}
			errs = append(errs, err)
		}
		if now := p.Arrived(); now != arrived {
			arrived, last = now, time.Now()
		}
		if len(errs) == 0 || time.Since(last) >= patience {
			return fmt.Errorf("%d of %d pieces missing: %w", p.Missing(), p.wantedN(), errors.Join(errs...))
		}
		// Sources that fail at once (a server being restarted) would spin.
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
	}
}

// try runs one source until it ends or stalls.
func (f *First) try(ctx context.Context, src Source, p *Pieces) error {
	stall := orDefault(f.Stall, 20*time.Second)
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		arrived, last := p.Arrived(), time.Now()
		for pause(ctx, stall/20) == nil {
			if now := p.Arrived(); now != arrived || p.Idle() {
				arrived, last = now, time.Now()
			} else if time.Since(last) >= stall {
				cancel(fmt.Errorf("%w for %s", ErrStalled, stall))
			}
		}
	}()
	err := src.Fetch(ctx, p)
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, ErrStalled) {
		err = cause
	}
	cancel(nil)
	<-watched
	return err
}

func orDefault(d, otherwise time.Duration) time.Duration {
	if d == 0 {
		return otherwise
	}
	return d
}

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
