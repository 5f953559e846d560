// Package transporttest has what tests of sources need: layers, memory to keep
// them in, and the suite that every Source passes.
package transporttest

import (
	"bytes"
	"context"
	"crypto/sha1"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"

	"rookery/transport"
	"rookery/wire"
)

// Memory is storage in memory. Its length is what has been written.
type Memory struct {
	mu sync.RWMutex
	b  []byte
}

// NewMemory holds a copy of b.
func NewMemory(b []byte) *Memory { return &Memory{b: bytes.Clone(b)} }

// ReadAt is io.ReaderAt.
func (m *Memory) ReadAt(b []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(b, m.b[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt is io.WriterAt.
func (m *Memory) WriteAt(b []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if end := int(off) + len(b); end > len(m.b) {
		m.b = append(m.b, make([]byte, end-len(m.b))...)
	}
	return copy(m.b[off:], b), nil
}

// Bytes is a copy of what is there.
func (m *Memory) Bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.Clone(m.b)
}

// Full is storage in which no write succeeds.
type Full struct{ Memory }

// ErrFull is what every write to Full answers.
var ErrFull = errors.New("no space left on device")

// WriteAt is io.WriterAt.
func (*Full) WriteAt([]byte, int64) (int, error) { return 0, ErrFull }

const pieceLength = 64 << 10

// Layer makes size bytes that look like a compressed layer, different for each
// seed, and their torrent, which has pieces of 64 KiB.
func Layer(t testing.TB, seed uint64, size int) ([]byte, transport.Info) {
	t.Helper()
	content := make([]byte, size)
	var key [32]byte
	key[0] = byte(seed)
	rand.NewChaCha8(key).Read(content) // never fails
	private := true
	torrent := metainfo.Info{Name: wire.DigestOf(content).Hex(), Length: int64(size), PieceLength: pieceLength, Private: &private}
	for piece := range slices.Chunk(content, pieceLength) {
		sum := sha1.Sum(piece)
		torrent.Pieces = append(torrent.Pieces, sum[:]...)
	}
	dict, err := bencode.Marshal(torrent)
	if err != nil {
		t.Fatal(err)
	}
	file, err := bencode.Marshal(metainfo.MetaInfo{InfoBytes: dict})
	if err != nil {
		t.Fatal(err)
	}
	info, err := transport.ParseTorrent(file)
	if err != nil {
		t.Fatal(err)
	}
	return content, info
}

// Seed is a complete layer, for who serves it.
func Seed(info transport.Info, content []byte) *transport.Pieces {
	p := transport.NewPieces(info, NewMemory(content))
	p.AllDone()
	return p
}

// A World makes a Source that gets the layer of info from somebody who holds
// content, which may be wrong. Everything it starts ends with the test.
type World func(t *testing.T, info transport.Info, content []byte) transport.Source

// Run checks that the sources of a world do what transport.Source promises.
func Run(t *testing.T, world World) {
	const size = 9*64<<10 + 12345 // the last piece is short

	t.Run("fetches", func(t *testing.T) {
		content, info := Layer(t, 1, size)
		src, store := world(t, info, content), NewMemory(nil)
		p := transport.NewPieces(info, store)
		if err := src.Fetch(within(t), p); err != nil {
			t.Fatalf("%s: %v", src, err)
		}
		if !bytes.Equal(store.Bytes(), content) {
			t.Fatal("other bytes arrived than were sent")
		}
		if done, server, peers, _ := p.Transfer(); done != size || server+peers != size {
			t.Fatalf("counted %d done, %d and %d received, want %d", done, server, peers, size)
		}
		if err := src.Fetch(within(t), p); err != nil {
			t.Fatalf("again, when complete: %v", err)
		}
	})

	t.Run("goes on", func(t *testing.T) {
		content, info := Layer(t, 2, size)
		src, store := world(t, info, content), NewMemory(nil)
		p := transport.NewPieces(info, store)
		for n := 1; n < len(info.Hashes); n += 2 {
			off := int64(n) * info.PieceLength
			if err := p.Put(n, content[off:off+int64(info.PieceSize(n))], transport.FromPeer); err != nil {
				t.Fatal(err)
			}
		}
		before, _, _, _ := p.Transfer()
		if err := src.Fetch(within(t), p); err != nil {
			t.Fatalf("%s: %v", src, err)
		}
		if !bytes.Equal(store.Bytes(), content) {
			t.Fatal("other bytes arrived than were sent")
		}
		if arrived := p.Arrived(); arrived > 2*size {
			t.Fatalf("%d bytes arrived for %d missing ones", arrived, size-before)
		}
	})

	t.Run("fetches what is wanted", func(t *testing.T) {
		content, info := Layer(t, 8, size)
		src, store := world(t, info, content), NewMemory(nil)
		p := transport.NewPieces(info, store)
		p.Prefer(7*info.PieceLength, 1)
		p.Hold()
		ended := make(chan error, 1)
		go func() { ended <- src.Fetch(within(t), p) }()
		if err := p.Wait(within(t), 7*info.PieceLength, 1); err != nil {
			t.Fatal(err)
		}
		p.Want(transport.Range{Offset: 2*info.PieceLength - 1, Size: 2}, transport.Range{Offset: 7 * info.PieceLength, Size: 1})
		if err := <-ended; err != nil {
			t.Fatalf("%s: %v", src, err)
		}
		for n := range info.Hashes {
			if want := n == 1 || n == 2 || n == 7; p.Has(n) != want {
				t.Errorf("piece %d is there: %v, want %v", n, !want, want)
			}
		}
		if done, server, peers, _ := p.Transfer(); done != 3*info.PieceLength || server+peers != done {
			t.Errorf("counted %d done, %d and %d received, want three pieces", done, server, peers)
		}
	})

	t.Run("ends with its context", func(t *testing.T) {
		content, info := Layer(t, 3, size)
		src := world(t, info, content)
		p := transport.NewPieces(info, NewMemory(nil))
		ctx, cancel := context.WithCancel(within(t))
		cancel()
		if err := src.Fetch(ctx, p); !errors.Is(err, context.Canceled) {
			t.Fatalf("%s: %v, want %v", src, err, context.Canceled)
		}
		if err := src.Fetch(within(t), p); err != nil {
			t.Fatalf("after that: %v", err)
		}
	})

	t.Run("takes no wrong bytes", func(t *testing.T) {
		content, info := Layer(t, 4, size)
		other, _ := Layer(t, 5, size)
		src, store := world(t, info, append(content[:info.PieceLength:info.PieceLength], other[info.PieceLength:]...)), NewMemory(nil)
		p := transport.NewPieces(info, store)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // a swarm waits for somebody better
		defer cancel()
		if err := src.Fetch(ctx, p); err == nil {
			t.Fatal("nil, want an error")
		}
		if missing, want := p.Missing(), len(info.Hashes)-1; missing < want {
			t.Fatalf("%d pieces missing, want %d", missing, want)
		}
	})

	t.Run("full storage", func(t *testing.T) {
		content, info := Layer(t, 6, size)
		src := world(t, info, content)
		if err := src.Fetch(within(t), transport.NewPieces(info, &Full{})); !errors.Is(err, transport.ErrStorage) || !errors.Is(err, ErrFull) {
			t.Fatalf("%s: %v, want %v and its cause", src, err, transport.ErrStorage)
		}
	})

	t.Run("has a name", func(t *testing.T) {
		content, info := Layer(t, 7, size)
		if world(t, info, content).String() == "" {
			t.Fatal("no name")
		}
	})
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// Until polls what has no event of its own, and fails the test after half a minute.
func Until(t testing.TB, what func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !what() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("waited for too long")
		}
	}
}
