package install

import (
	"crypto/sha1"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"rookery/transport"
)

// A budget is memory that the spools of all layers share, in bytes.
type budget struct{ left atomic.Int64 }

// take says whether there are n bytes; forced takes them anyway.
func (b *budget) take(n int64, forced bool) bool {
	if b.left.Add(-n) < 0 && !forced {
		b.left.Add(n)
		return false
	}
	return true
}

func (b *budget) give(n int64) { b.left.Add(n) }

// A spool keeps pieces: in memory as long as there is no filesystem to hold
// them, then in a file. When memory is full, writers wait for the file, but
// not with what is wanted before there is one.
type spool struct {
	length        int64 // of a piece
	budget        *budget
	wanted, until int64 // a range of which every piece is kept, whatever the budget

	mu     sync.RWMutex
	memory map[int64][]byte // by offset of the piece
	used   int64
	file   *os.File
	closed bool
	turn   chan struct{} // closed by attach and close
}

var errClosed = errors.New("the installation has ended")

func newSpool(pieceLength int64, budget *budget, wanted, size int64) *spool {
	return &spool{
		length: pieceLength, budget: budget, wanted: wanted, until: wanted + size,
		memory: map[int64][]byte{}, turn: make(chan struct{}),
	}
}

// WriteAt keeps one piece.
func (s *spool) WriteAt(b []byte, off int64) (int, error) {
	if s.remember(b, off) {
		return len(b), nil
	}
	<-s.turn
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return 0, errClosed
	}
	return s.file.WriteAt(b, off)
}

// remember keeps b in memory, if that is the place and there is room.
func (s *spool) remember(b []byte, off int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file != nil || s.closed {
		return false
	}
	if _, ok := s.memory[off]; ok {
		return true // somebody else brought the same bytes
	}
	if isWanted := off < s.until && off+int64(len(b)) > s.wanted; !s.budget.take(int64(len(b)), isWanted) {
		return false
	}
	s.memory[off] = append([]byte(nil), b...)
	s.used += int64(len(b))
	return true
}

// forget gives back the memory.
func (s *spool) forget() {
	s.budget.give(s.used)
	s.memory, s.used = nil, 0
}

// ReadAt reads any range of what has been written.
func (s *spool) ReadAt(b []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch {
	case s.closed:
		return 0, errClosed
	case s.file != nil:
		return s.file.ReadAt(b, off)
	}
	done := 0
	for done < len(b) {
		at := off + int64(done)
		start := at / s.length * s.length
		piece := s.memory[start]
		if int64(len(piece)) <= at-start {
			return done, io.ErrUnexpectedEOF
		}
		done += copy(b[done:], piece[at-start:])
	}
	return done, nil
}

// kept lists the pieces that are right in a file which a spool left, whatever
// ended it: the torrent has the hashes, and what was never written is a hole.
func kept(f *os.File, info transport.Info) (pieces []int) {
	buf := make([]byte, info.PieceLength)
	for off := int64(0); off < info.Length; {
		at, err := f.Seek(off, unix.SEEK_DATA)
		if err != nil || at >= info.Length {
			break // the rest is a hole, or not to be had
		}
		n := int(at / info.PieceLength)
		b := buf[:info.PieceSize(n)]
		off = int64(n) * info.PieceLength
		if _, err := f.ReadAt(b, off); err == nil && sha1.Sum(b) == info.Hashes[n] {
			pieces = append(pieces, n)
		}
		off += info.PieceLength
	}
	return pieces
}

// attach moves everything into f, which the spool then owns.
func (s *spool) attach(f *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for off, piece := range s.memory {
		if _, err := f.WriteAt(piece, off); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	s.forget()
	s.file = f
	close(s.turn)
	return nil
}

// close ends all use. What still reads or writes is waited for, or gets an error.
func (s *spool) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.forget()
	if s.file == nil {
		close(s.turn)
		return
	}
	_ = s.file.Close() // about to be removed
}
