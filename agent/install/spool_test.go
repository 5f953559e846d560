package install

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	"rookery/transport/transporttest"
)

// The index is waited for before there is a disk: other pieces that came first
// must not keep it out for ever.
func TestTheIndexHasRoomInAFullMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var memory budget
		memory.give(8)
		s := newSpool(4, &memory, 18, 3) // the index is in the pieces at 16 and 20
		for off := int64(0); off < 8; off += 4 {
			if _, err := s.WriteAt([]byte("full"), off); err != nil {
				t.Fatal(err)
			}
		}
		waits := make(chan error, 1)
		go func() {
			_, err := s.WriteAt([]byte("next"), 8)
			waits <- err
		}()
		for i, b := range []string{"..in", "dex."} {
			if _, err := s.WriteAt([]byte(b), int64(16+4*i)); err != nil { // a deadlock, where it waits
				t.Fatal(err)
			}
		}
		got := make([]byte, 5)
		if _, err := s.ReadAt(got, 18); err != nil || !bytes.Equal(got, []byte("index")) {
			t.Errorf("read %q, %v", got, err)
		}
		synctest.Wait()
		select {
		case err := <-waits:
			t.Errorf("a piece beyond the budget did not wait: %v", err)
		default:
		}
		other := newSpool(4, &memory, 0, 4)
		if !other.remember([]byte("too."), 0) || other.remember([]byte("more"), 4) {
			t.Error("the memory of two layers has room for their indexes, and for nothing else")
		}
		other.close()
		s.close()
		if left := memory.left.Load(); left != 8 {
			t.Errorf("%d bytes of memory given back, want 8", left)
		}
		if err := <-waits; err != errClosed {
			t.Errorf("the one who waited was told %v", err)
		}
	})
}

func TestKept(t *testing.T) {
	const piece = 64 << 10
	content, info := transporttest.Layer(t, 1, 9*piece+100)
	f, err := os.Create(filepath.Join(t.TempDir(), "layer"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := kept(f, info); len(got) != 0 {
		t.Errorf("an empty file has %v", got)
	}
	for n, change := range map[int]func([]byte) []byte{
		1: bytes.Clone,
		3: func(b []byte) []byte { return append([]byte{b[0] + 1}, b[1:]...) },
		4: func(b []byte) []byte { return b[:piece-1] },
		7: bytes.Clone,
		9: bytes.Clone,
	} {
		end := min((n+1)*piece, len(content))
		if _, err := f.WriteAt(change(content[n*piece:end]), int64(n*piece)); err != nil {
			t.Fatal(err)
		}
	}
	if got := kept(f, info); !slices.Equal(got, []int{1, 7, 9}) {
		t.Errorf("kept %v, want 1, 7 and 9", got)
	}
	if err := f.Truncate(int64(len(content)) - 1); err != nil {
		t.Fatal(err)
	}
	if got := kept(f, info); !slices.Equal(got, []int{1, 7}) {
		t.Errorf("kept %v of a file that is cut, want 1 and 7", got)
	}
}
