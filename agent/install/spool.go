package install

import (
	"errors"
	"io"
	"os"
	"sync"
)

// A spool keeps pieces: in memory as long as there is no filesystem to hold
// them, then in a file. When memory is full, writers wait for the file, but
// not with what is wanted before there is one.
type spool struct {
	length        int64 // of a piece
	budget        int64
	wanted, until int64 // a range of which every piece is kept, whatever the budget

	mu     sync.RWMutex
	memory map[int64][]byte // by offset of the piece
	used   int64
	file   *os.File
	closed bool
	turn   chan struct{} // closed by attach and close
}

var errClosed = errors.New("the installation has ended")

func newSpool(pieceLength, budget, wanted, size int64) *spool {
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
	if isWanted := off < s.until && off+int64(len(b)) > s.wanted; !isWanted && s.used+int64(len(b)) > s.budget {
		return false
	}
	if old, ok := s.memory[off]; ok {
		s.used -= int64(len(old))
	}
	s.memory[off] = append([]byte(nil), b...)
	s.used += int64(len(b))
	return true
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

// attach moves everything into f, which the spool then owns.
func (s *spool) attach(f *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for off, piece := range s.memory {
		if _, err := f.WriteAt(piece, off); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	s.memory, s.used, s.file = nil, 0, f
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
	s.closed, s.memory = true, nil
	if s.file == nil {
		close(s.turn)
		return
	}
	_ = s.file.Close() // about to be removed
}
