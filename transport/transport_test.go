package transport_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"rookery/transport"
	"rookery/transport/transporttest"
)

// script is a source that does as told, one call after the other.
type script struct {
	name  string
	calls []func(ctx context.Context, p *transport.Pieces) error
	count int
}

func (s *script) String() string { return s.name }

func (s *script) Fetch(ctx context.Context, p *transport.Pieces) error {
	call := s.calls[min(s.count, len(s.calls)-1)]
	s.count++
	return call(ctx, p)
}

func TestFirstOf(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	refused := errors.New("connection refused")
	fail := func(context.Context, *transport.Pieces) error { return refused }
	hang := func(ctx context.Context, p *transport.Pieces) error { <-ctx.Done(); return ctx.Err() }
	bring := func(pieces ...int) func(context.Context, *transport.Pieces) error {
		return func(ctx context.Context, p *transport.Pieces) error {
			for _, n := range pieces {
				if err := p.Put(n, piece(content, info, n), transport.FromPeer); err != nil {
					return err
				}
			}
			if p.Missing() > 0 {
				return hang(ctx, p)
			}
			return nil
		}
	}
	trickle := func(ctx context.Context, p *transport.Pieces) error {
		for n := range 6 {
			for range 4 { // a piece takes longer than the patience, its bytes do not
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(15 * time.Second):
					p.Received(100)
				}
			}
			if err := p.Put(n, piece(content, info, n), transport.FromPeer); err != nil {
				return err
			}
		}
		return nil
	}
	type calls = []func(context.Context, *transport.Pieces) error
	for _, tt := range []struct {
		name          string
		first, second calls
		full          bool
		want          error
		moved         string
		took          time.Duration
	}{
		{name: "the first one does it", first: calls{bring(0, 1, 2, 3, 4, 5)}, second: calls{fail}},
		{name: "on an error", first: calls{fail}, second: calls{bring(0, 1, 2, 3, 4, 5)}, moved: "swarm: connection refused"},
		{name: "on silence, and what is there is kept", first: calls{bring(1, 2)}, second: calls{bring(0, 3, 4, 5)},
			moved: "swarm: no new bytes for 20s", took: 20 * time.Second},
		{name: "round again", first: calls{bring(0, 1), bring(2, 3)}, second: calls{fail, bring(4, 5)},
			moved: "swarm: no new bytes for 20s|http: connection refused|swarm: no new bytes for 20s", took: 41 * time.Second},
		{name: "slow is not silent", first: calls{trickle}, second: calls{fail}, took: 6 * time.Minute},
		{name: "nobody has it", first: calls{fail}, second: calls{fail}, want: refused, took: 10 * time.Minute},
		{name: "no room", first: calls{bring(0)}, second: calls{fail}, full: true, want: transport.ErrStorage},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store transport.Storage = transporttest.NewMemory(nil)
				if tt.full {
					store = &transporttest.Full{}
				}
				var moved []string
				f := transport.FirstOf(&script{name: "swarm", calls: tt.first}, &script{name: "http", calls: tt.second})
				f.Moved = func(_ transport.Source, err error) { moved = append(moved, err.Error()) }
				p, start := transport.NewPieces(info, store), time.Now()
				err := f.Fetch(t.Context(), p)
				if !errors.Is(err, tt.want) || err == nil && p.Missing() > 0 {
					t.Fatalf("Fetch: %v with %d missing, want %v", err, p.Missing(), tt.want)
				}
				if got := strings.Join(moved, "|"); tt.want == nil && got != tt.moved {
					t.Errorf("moved %q, want %q", got, tt.moved)
				}
				if took := time.Since(start); (took - tt.took).Abs() > 3*time.Second {
					t.Errorf("took %s, want about %s", took, tt.took)
				}
			})
		})
	}
}

// Silence is nobody's fault as long as it is not known what is wanted.
func TestFirstOfWaitsForAWant(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	synctest.Test(t, func(t *testing.T) {
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		p.Hold()
		f := transport.FirstOf(&script{name: "swarm", calls: []func(context.Context, *transport.Pieces) error{
			func(ctx context.Context, p *transport.Pieces) error {
				select {
				case <-p.Done():
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			},
		}})
		f.Moved = func(_ transport.Source, err error) { t.Errorf("moved: %v", err) }
		go func() {
			time.Sleep(time.Hour) // of the bubble
			p.Want(transport.Range{Offset: 0, Size: 1})
			time.Sleep(10 * time.Second)
			put(t, p, content, 0, transport.FromPeer)
		}()
		if err := f.Fetch(t.Context(), p); err != nil {
			t.Errorf("Fetch: %v", err)
		}
	})
}

// Nor is it when the storage has no room until the disk is ready.
func TestFirstOfWaitsForStorage(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	synctest.Test(t, func(t *testing.T) {
		p := transport.NewPieces(info, slow{transporttest.NewMemory(nil)})
		f := transport.FirstOf(&script{name: "swarm", calls: []func(context.Context, *transport.Pieces) error{
			func(ctx context.Context, p *transport.Pieces) error {
				for n := range info.Hashes {
					put(t, p, content, n, transport.FromPeer)
				}
				return ctx.Err()
			},
		}})
		f.Moved = func(_ transport.Source, err error) { t.Errorf("moved: %v", err) }
		if err := f.Fetch(t.Context(), p); err != nil {
			t.Errorf("Fetch: %v", err)
		}
		if p.Idle() {
			t.Error("idle, with nothing on its way")
		}
	})
}

// slow is a storage that takes its time.
type slow struct{ transport.Storage }

func (s slow) WriteAt(b []byte, off int64) (int, error) {
	time.Sleep(5 * time.Minute) // of the bubble
	return s.Storage.WriteAt(b, off)
}

func TestFirstOfEndsWithItsContext(t *testing.T) {
	_, info := transporttest.Layer(t, 1, size)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		f := transport.FirstOf(&script{name: "none", calls: []func(context.Context, *transport.Pieces) error{
			func(ctx context.Context, _ *transport.Pieces) error { <-ctx.Done(); return ctx.Err() },
		}})
		if err := f.Fetch(ctx, transport.NewPieces(info, transporttest.NewMemory(nil))); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Fetch: %v, want %v", err, context.DeadlineExceeded)
		}
	})
}
