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

// named are sources called swarm and http, of which one brings what comes from
// peers and the other what comes by HTTP.
func named(swarm, http transport.Source) []transport.Step {
	return []transport.Step{
		{Name: "swarm", Source: swarm, From: []transport.Origin{transport.FromPeer}},
		{Name: "http", Source: http, From: []transport.Origin{transport.FromHTTP}},
	}
}

type call = func(ctx context.Context, p *transport.Pieces) error

func hang(ctx context.Context, p *transport.Pieces) error {
	select {
	case <-p.Done():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func TestPolicy(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 40*64<<10)
	refused := errors.New("connection refused")
	fail := func(context.Context, *transport.Pieces) error { return refused }
	// bring brings a piece every while, up to some number, and then nothing more.
	bring := func(from transport.Origin, pieces int, every time.Duration) call {
		return func(ctx context.Context, p *transport.Pieces) error {
			for range pieces {
				n, ok := p.Claim(func(n int) (int64, bool) { return int64(n), true })
				if !ok {
					break
				}
				select {
				case <-ctx.Done():
					p.Release(n)
					return ctx.Err()
				case <-time.After(every):
				}
				if err := p.Put(n, piece(content, info, n), from); err != nil {
					p.Release(n)
					return err
				}
			}
			return hang(ctx, p)
		}
	}
	peers := func(pieces int, every time.Duration) call { return bring(transport.FromPeer, pieces, every) }
	server := func(pieces int, every time.Duration) call { return bring(transport.FromHTTP, pieces, every) }
	trickle := func(ctx context.Context, p *transport.Pieces) error {
		for range 160 { // a piece takes longer than the patience, its bytes do not
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(15 * time.Second):
				p.Received(100)
			}
		}
		return peers(40, 0)(ctx, p)
	}
	breaks := func(ctx context.Context, p *transport.Pieces) error {
		ctx, cancel := context.WithTimeout(ctx, 11*time.Second)
		defer cancel()
		if err := server(10, time.Second)(ctx, p); !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		return refused
	}
	for _, tt := range []struct {
		name        string
		swarm, http []call
		full        bool
		want        error
		told        string
		took        time.Duration
		byHTTP      int // pieces
	}{
		{name: "the first one does it", swarm: []call{peers(40, time.Second)}, http: []call{fail}, took: 40 * time.Second},
		{name: "on an error, at once", swarm: []call{fail}, http: []call{server(40, time.Second)},
			told: "http joins swarm: connection refused", took: 40 * time.Second, byHTTP: 40},
		{name: "on silence, and what is there is kept", swarm: []call{peers(10, time.Second)}, http: []call{server(40, time.Second)},
			told: "http joins swarm: no new bytes for 20s", took: 60 * time.Second, byHTTP: 30},
		{name: "both go on", swarm: []call{func(ctx context.Context, p *transport.Pieces) error {
			time.Sleep(25 * time.Second)
			return peers(40, 2*time.Second)(ctx, p)
		}}, http: []call{server(40, time.Second)},
			told: "http joins swarm: no new bytes for 20s|http leaves swarm: new pieces come without it", took: 62 * time.Second, byHTTP: 21},
		{name: "an error is told once, and tried again", swarm: []call{hang}, http: []call{fail, fail, fail, server(40, time.Second)},
			told: "http joins swarm: no new bytes for 20s|http: connection refused", took: 67 * time.Second, byHTTP: 40},
		{name: "again, when it had worked", swarm: []call{fail, hang}, http: []call{breaks},
			told: "http joins swarm: connection refused|http: connection refused|http: connection refused|http: connection refused", took: 43 * time.Second, byHTTP: 40},
		{name: "slow is not silent", swarm: []call{trickle}, http: []call{fail}, took: 40 * time.Minute},
		{name: "nobody has it", swarm: []call{fail}, http: []call{fail}, want: refused, took: 10 * time.Minute},
		{name: "no room", swarm: []call{peers(1, 0)}, http: []call{fail}, full: true, want: transport.ErrStorage},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store transport.Storage = transporttest.NewMemory(nil)
				if tt.full {
					store = &transporttest.Full{}
				}
				var told []string
				y := &transport.Policy{
					Steps:    named(&script{name: "swarm", calls: tt.swarm}, &script{name: "http", calls: tt.http}),
					Switched: func(text string) { told = append(told, text) },
				}
				p, start := transport.NewPieces(info, store), time.Now()
				err := y.Fetch(t.Context(), p)
				if !errors.Is(err, tt.want) || err == nil && p.Missing() > 0 {
					t.Fatalf("Fetch: %v with %d missing, want %v", err, p.Missing(), tt.want)
				}
				if got := strings.Join(told, "|"); tt.want == nil && got != tt.told {
					t.Errorf("told %q, want %q", got, tt.told)
				}
				if took := time.Since(start); (took - tt.took).Abs() > 3*time.Second {
					t.Errorf("took %s, want about %s", took, tt.took)
				}
				if by := int(p.Brought(transport.FromHTTP) / (64 << 10)); by < tt.byHTTP-1 || by > tt.byHTTP+1 {
					t.Errorf("%d pieces came by HTTP, want about %d", by, tt.byHTTP)
				}
			})
		})
	}
}

// Silence is nobody's fault as long as it is not known what is wanted.
func TestPolicyWaitsForAWant(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	synctest.Test(t, func(t *testing.T) {
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		p.Hold()
		swarm := &script{name: "swarm", calls: []call{hang}}
		f := &transport.Policy{Steps: named(swarm, swarm), Switched: func(text string) { t.Error(text) }}
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
func TestPolicyWaitsForStorage(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	synctest.Test(t, func(t *testing.T) {
		p := transport.NewPieces(info, slow{transporttest.NewMemory(nil)})
		swarm := &script{name: "swarm", calls: []call{func(ctx context.Context, p *transport.Pieces) error {
			for n := range info.Hashes {
				put(t, p, content, n, transport.FromPeer)
			}
			return ctx.Err()
		}}}
		f := &transport.Policy{Steps: named(swarm, swarm), Switched: func(text string) { t.Error(text) }}
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

func TestPolicyEndsWithItsContext(t *testing.T) {
	_, info := transporttest.Layer(t, 1, size)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		swarm := &script{name: "none", calls: []call{hang}}
		f := &transport.Policy{Steps: named(swarm, swarm)}
		if err := f.Fetch(ctx, transport.NewPieces(info, transporttest.NewMemory(nil))); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Fetch: %v, want %v", err, context.DeadlineExceeded)
		}
	})
}
