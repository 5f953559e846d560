package transport_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"rookery/transport"
	"rookery/transport/transporttest"
)

const size = 5*64<<10 + 100 // six pieces, the last one short

func piece(content []byte, info transport.Info, n int) []byte {
	off := n * int(info.PieceLength)
	return content[off : off+info.PieceSize(n)]
}

func put(t *testing.T, p *transport.Pieces, content []byte, n int, from transport.Origin) {
	t.Helper()
	if err := p.Put(n, piece(content, p.Info(), n), from); err != nil {
		t.Fatal(err)
	}
}

func TestPut(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	store := transporttest.NewMemory(nil)
	p := transport.NewPieces(info, store)
	wrong := bytes.Clone(piece(content, info, 0))
	wrong[17] ^= 1
	for name, err := range map[string]error{
		"wrong":           p.Put(0, wrong, transport.FromPeer),
		"short":           p.Put(0, wrong[1:], transport.FromPeer),
		"of another":      p.Put(0, piece(content, info, 1), transport.FromPeer),
		"below the first": p.Put(-1, wrong, transport.FromPeer),
		"past the last":   p.Put(6, wrong, transport.FromPeer),
	} {
		if !errors.Is(err, transport.ErrBadPiece) {
			t.Errorf("%s: %v, want %v", name, err, transport.ErrBadPiece)
		}
	}
	if p.Missing() != 6 || len(store.Bytes()) != 0 {
		t.Fatalf("%d missing and %d bytes written after wrong pieces only", p.Missing(), len(store.Bytes()))
	}
	put(t, p, content, 5, transport.FromServer)
	put(t, p, content, 5, transport.FromPeer) // counted once
	put(t, p, content, 0, transport.FromPeer)
	p.Sent(7)
	done, server, peers, sent := p.Transfer()
	if done != 64<<10+100 || server != 100 || peers != 64<<10 || sent != 7 {
		t.Fatalf("transfer %d %d %d %d", done, server, peers, sent)
	}
	for n := 1; n < 5; n++ {
		put(t, p, content, n, transport.FromPeer)
	}
	<-p.Done()
	if p.Missing() != 0 || !bytes.Equal(store.Bytes(), content) {
		t.Fatal("not the layer")
	}
}

func TestFullStorageIsNotABadPiece(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	p := transport.NewPieces(info, &transporttest.Full{})
	err := p.Put(0, piece(content, info, 0), transport.FromPeer)
	if !errors.Is(err, transport.ErrStorage) || !errors.Is(err, transporttest.ErrFull) || errors.Is(err, transport.ErrBadPiece) {
		t.Fatalf("%v", err)
	}
	if p.Has(0) {
		t.Fatal("has what was not kept")
	}
}

func TestReadAtGivesOnlyWhatIsVerified(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	p := transport.NewPieces(info, transporttest.NewMemory(content)) // there, but unverified
	put(t, p, content, 4, transport.FromPeer)
	put(t, p, content, 5, transport.FromPeer)
	b := make([]byte, 200)
	if n, err := p.ReadAt(b, size-200); n != 200 || err != nil || !bytes.Equal(b, content[size-200:]) {
		t.Fatalf("%d, %v", n, err)
	}
	for _, off := range []int64{-1, 0, 4*64<<10 - 1, size - 199, size, 1 << 62} {
		if n, err := p.ReadAt(b, off); err == nil {
			t.Errorf("at %d: %d bytes, want an error", off, n)
		}
	}
}

func TestEveryWatcherSeesEveryPiece(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	synctest.Test(t, func(t *testing.T) {
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		put(t, p, content, 3, transport.FromPeer)
		put(t, p, content, 1, transport.FromPeer)
		for range p.Completed(t.Context()) {
			break // a watcher that goes away holds nothing up
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				got := slices.Collect(p.Completed(t.Context()))
				if want := []int{3, 1, 0, 2, 4, 5}; !slices.Equal(got, want) {
					t.Errorf("saw %v, want %v", got, want)
				}
			})
		}
		for _, n := range []int{0, 2, 4, 5} {
			synctest.Wait()
			put(t, p, content, n, transport.FromPeer)
		}
		wg.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got := slices.Collect(p.Completed(ctx)); len(got) != 0 {
			t.Errorf("saw %v after the end", got)
		}
	})
}

// The last piece may come while a watcher looks how many are missing.
func TestNoWatcherMissesTheLastPiece(t *testing.T) {
	_, info := transporttest.Layer(t, 1, 1)
	for range 20_000 {
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		var watchers sync.WaitGroup
		for range 100 {
			watchers.Go(func() {
				for range p.Completed(t.Context()) {
				}
			})
		}
		runtime.Gosched()
		p.Found(0)
		watchers.Wait()
	}
}

func TestWait(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	synctest.Test(t, func(t *testing.T) {
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		ended := make(chan error, 1)
		go func() { ended <- p.Wait(t.Context(), 2*64<<10-1, 2) }() // the seam of 1 and 2
		for _, n := range []int{0, 3, 1} {
			put(t, p, content, n, transport.FromPeer)
			synctest.Wait()
			if len(ended) > 0 {
				t.Fatalf("waited for less than asked, after piece %d", n)
			}
		}
		put(t, p, content, 2, transport.FromPeer)
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := p.Wait(ctx, 0, 1<<63-1); !errors.Is(err, context.Canceled) {
			t.Fatalf("Wait: %v, want %v", err, context.Canceled)
		}
		if err := p.Wait(ctx, size, 10); err != nil {
			t.Fatalf("nothing past the end to wait for: %v", err)
		}
	})
}

func TestClaims(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	p := transport.NewPieces(info, transporttest.NewMemory(nil))
	up := func(n int) (int64, bool) { return int64(n), n != 1 }
	put(t, p, content, 0, transport.FromPeer)
	p.Prefer(3*64<<10, 1)
	var got []int
	for {
		n, ok := p.Claim(up)
		if !ok {
			break
		}
		got = append(got, n)
	}
	if want := []int{3, 2, 4, 5}; !slices.Equal(got, want) {
		t.Fatalf("claimed %v, want %v", got, want)
	}
	put(t, p, content, 4, transport.FromPeer)
	p.Release(5)
	p.Release(4) // it is complete: nobody wants it again
	if n, ok := p.Claim(up); !ok || n != 5 {
		t.Fatalf("claimed %d %t, want 5", n, ok)
	}
	if n, ok := p.Claim(up); ok {
		t.Fatalf("claimed %d, want none", n)
	}
}

func TestWant(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	all := func(n int) (int64, bool) { return int64(n), true }
	synctest.Test(t, func(t *testing.T) {
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		p.Prefer(5*64<<10, 1)
		p.Hold()
		if n, ok := p.Claim(all); !ok || n != 5 || p.Idle() {
			t.Fatalf("claimed %d %t, idle %t; want the preferred one", n, ok, p.Idle())
		}
		if n, ok := p.Claim(all); ok {
			t.Fatalf("claimed %d before it was known what is wanted", n)
		}
		put(t, p, content, 5, transport.FromPeer)
		put(t, p, content, 0, transport.FromPeer) // from somebody who did not claim it
		if !p.Idle() || p.Missing() != 4 || p.Left() != 4*64<<10 {
			t.Errorf("idle %t, %d pieces and %d bytes missing", p.Idle(), p.Missing(), p.Left())
		}
		seen := make(chan []int)
		go func() { seen <- slices.Collect(p.Completed(t.Context())) }()
		synctest.Wait()

		p.Want(transport.Range{Offset: 3*64<<10 - 1, Size: 1}, transport.Range{Offset: 5 * 64 << 10, Size: 100})
		if p.Idle() || p.Missing() != 1 || p.Left() != 64<<10 {
			t.Errorf("idle %t, %d pieces and %d bytes missing", p.Idle(), p.Missing(), p.Left())
		}
		if n, ok := p.Claim(all); !ok || n != 2 {
			t.Errorf("claimed %d %t, want 2", n, ok)
		}
		if n, ok := p.Claim(all); ok {
			t.Errorf("claimed %d, which nobody wants", n)
		}
		put(t, p, content, 2, transport.FromPeer)
		<-p.Done()
		if got, want := <-seen, []int{5, 0, 2}; !slices.Equal(got, want) {
			t.Errorf("saw %v, want %v and the end", got, want)
		}
		put(t, p, content, 4, transport.FromPeer) // is kept, and changes nothing
		if p.Missing() != 0 || p.Left() != 0 || !p.Has(4) {
			t.Errorf("%d pieces missing", p.Missing())
		}
	})
}

func TestNothingIsWantedAnyMore(t *testing.T) {
	_, info := transporttest.Layer(t, 1, size)
	p := transport.NewPieces(info, transporttest.NewMemory(nil))
	p.Want()
	<-p.Done()
	if got := slices.Collect(p.Completed(t.Context())); len(got) != 0 {
		t.Errorf("saw %v", got)
	}
}

func TestSeedHasEverything(t *testing.T) {
	content, info := transporttest.Layer(t, 1, size)
	p := transporttest.Seed(info, content)
	p.AllDone()
	<-p.Done()
	got, err := io.ReadAll(io.NewSectionReader(p, 0, size))
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if done, server, peers, _ := p.Transfer(); done != size || server != 0 || peers != 0 {
		t.Fatalf("transfer %d %d %d", done, server, peers)
	}
}
