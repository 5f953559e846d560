package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"
	"syscall"
)

// Pieces are the pieces of one layer on their way in. A piece is hashed once,
// when it arrives, and is then good for every use. All methods may be called
// at any time by anybody; none waits for a watcher.
type Pieces struct {
	info  Info
	store Storage
	done  chan struct{} // closed with the last piece

	mu        sync.Mutex
	has       []bool
	claimed   []bool // some source is fetching it
	preferred []bool
	expected  []bool        // nil: nothing
	streams   bool          // some of it comes now
	held      bool          // only what is preferred may be claimed
	wanted    []bool        // nil: everything
	lacking   int           // pieces wanted and not complete
	left      int64         // bytes of these
	storing   int           // pieces on their way into store
	order     []int         // what is complete, in the order it came; only grows
	more      chan struct{} // closed and replaced when order grows or less is wanted
	bytes     int64         // verified
	arrived   int64         // received, verified or not
	brought   [origins]int64
	uploaded  int64
	copies    func() []int32
	parts     func(n int, b []byte) []Range
}

// NewPieces is a layer of which nothing is there yet. Piece n is kept in store
// at n times the piece length.
func NewPieces(info Info, store Storage) *Pieces {
	return &Pieces{
		info:      info,
		store:     store,
		done:      make(chan struct{}),
		has:       make([]bool, len(info.Hashes)),
		claimed:   make([]bool, len(info.Hashes)),
		preferred: make([]bool, len(info.Hashes)),
		lacking:   len(info.Hashes),
		left:      info.Length,
		more:      make(chan struct{}),
	}
}

// Info is the torrent of the layer.
func (p *Pieces) Info() Info { return p.info }

// AllDone says that the storage holds everything already, as a seeder's does.
// Nothing is hashed: a peer that gets other bytes will refuse them.
func (p *Pieces) AllDone() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n := range p.has {
		p.complete(n)
	}
}

// Found says that the storage holds these pieces already, and that their hashes
// are right.
func (p *Pieces) Found(pieces ...int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range pieces {
		p.complete(n)
	}
}

// Put checks the bytes of piece n, keeps them and tells the watchers. It ends
// the claim on n when it succeeds. The error is ErrBadPiece when the bytes are
// wrong and ErrStorage when they cannot be kept. A piece that is there already
// is not looked at again.
func (p *Pieces) Put(n int, b []byte, from Origin) error {
	if n < 0 || n >= len(p.info.Hashes) {
		return fmt.Errorf("piece %d of %d: %w", n, len(p.info.Hashes), ErrBadPiece)
	}
	if want := p.info.PieceSize(n); len(b) != want {
		return fmt.Errorf("piece %d: %d bytes, want %d: %w", n, len(b), want, ErrBadPiece)
	}
	if p.Has(n) {
		return nil
	}
	if !p.info.right(n, b) {
		return fmt.Errorf("piece %d: %w", n, ErrBadPiece)
	}
	p.mu.Lock()
	p.storing++
	p.mu.Unlock()
	_, err := p.store.WriteAt(b, int64(n)*p.info.PieceLength)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.storing--
	if err != nil {
		return fmt.Errorf("piece %d: %w: %w", n, ErrStorage, err)
	}
	if !p.complete(n) {
		return nil // somebody else wrote the same bytes meanwhile
	}
	p.brought[from] += int64(len(b))
	return nil
}

// complete marks piece n, with mu held, and says whether that is news.
func (p *Pieces) complete(n int) bool {
	if p.has[n] {
		return false
	}
	size := int64(p.info.PieceSize(n))
	p.has[n], p.claimed[n] = true, false
	p.bytes += size
	p.arrived += size
	p.order = append(p.order, n)
	if p.wants(n) {
		p.lacking--
		p.left -= size
		if p.lacking == 0 {
			close(p.done)
		}
	}
	p.stir()
	return true
}

// stir lets everybody look again, with mu held.
func (p *Pieces) stir() {
	close(p.more)
	p.more = make(chan struct{})
}

func (p *Pieces) wants(n int) bool { return p.wanted == nil || p.wanted[n] }

// Has says whether piece n is complete.
func (p *Pieces) Has(n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return n >= 0 && n < len(p.has) && p.has[n]
}

// Missing is the number of pieces that are wanted and not complete.
func (p *Pieces) Missing() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lacking
}

// Left is the number of bytes that are wanted and not there.
func (p *Pieces) Left() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.left
}

// Done is closed when everything that is wanted is there.
func (p *Pieces) Done() <-chan struct{} { return p.done }

// Transfer counts bytes: verified in all, of these received from a server and
// from peers, and sent to others.
func (p *Pieces) Transfer() (done, fromServer, fromPeers, uploaded int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bytes, p.brought[FromServer] + p.brought[FromHTTP] + p.brought[FromMulticast], p.brought[FromPeer], p.uploaded
}

// Brought is how many verified bytes came from there.
func (p *Pieces) Brought(from Origin) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.brought[from]
}

// SetCopies lets a swarm say how many of its connections have each piece; nil
// takes that back. copies may lock what is locked around calls of p: it is
// called without p's own lock.
func (p *Pieces) SetCopies(copies func() []int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.copies = copies
}

// Copies is how many peers have each piece, or nil where there is no swarm.
func (p *Pieces) Copies() []int32 {
	p.mu.Lock()
	copies := p.copies
	p.mu.Unlock()
	if copies == nil {
		return nil
	}
	return copies()
}

// SetParts lets a source give what it has of pieces that are not complete; nil
// takes that back. parts is as Part, and is called without a lock of p.
func (p *Pieces) SetParts(parts func(n int, b []byte) []Range) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.parts = parts
}

// Part writes what some source has of piece n into b, which is as large, and says
// which parts of b remain to be filled; nil: nothing is there, or it is just being put together. Nothing of it is verified.
func (p *Pieces) Part(n int, b []byte) (holes []Range) {
	p.mu.Lock()
	parts := p.parts
	p.mu.Unlock()
	if parts == nil {
		return nil
	}
	return parts(n, b)
}

// Received adds n bytes that came in but are not a whole piece yet: a sign of
// life for who watches Arrived.
func (p *Pieces) Received(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.arrived += int64(n)
}

// Sent adds n bytes to what was uploaded.
func (p *Pieces) Sent(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.uploaded += int64(n)
}

// Arrived grows whenever anything arrives. Only its changes have a meaning.
func (p *Pieces) Arrived() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.arrived
}

// Prefer asks for the pieces of n bytes from off before all others.
func (p *Pieces) Prefer(off, n int64) {
	first, end := p.span(off, n)
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := first; i < end; i++ {
		p.preferred[i] = true
	}
}

// Hold lets only the pieces that are preferred be claimed, until Want.
func (p *Pieces) Hold() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = true
}

// Held says whether it is not known yet what is wanted, but for what is preferred.
func (p *Pieces) Held() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held
}

// Expect says which pieces come without being asked for: nobody may claim them. nil
// takes that back. It is not to be changed. streams says whether some come now.
func (p *Pieces) Expect(expected []bool, streams bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expected, p.streams = expected, streams
}

// Streams says whether pieces come now without being asked for: they may fill the
// link, which others had better leave to them.
func (p *Pieces) Streams() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.streams
}

// Idle says whether it is no source's fault that nothing arrives: there is
// nothing to claim before Want, or the storage makes a piece wait.
func (p *Pieces) Idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.storing > 0 {
		return true
	}
	if !p.held {
		return false
	}
	for n := range p.has {
		if p.preferred[n] && !p.has[n] {
			return false
		}
	}
	return true
}

// A Range is Size bytes from Offset.
type Range struct{ Offset, Size int64 }

// Want narrows what is wanted to the pieces that the ranges touch, once, and
// ends Hold. What is there stays.
func (p *Pieces) Want(ranges ...Range) {
	wanted := make([]bool, len(p.has))
	for _, r := range ranges {
		first, end := p.span(r.Offset, r.Size)
		for n := first; n < end; n++ {
			wanted[n] = true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.lacking
	p.wanted, p.held = wanted, false
	p.lacking, p.left = 0, 0
	for n := range wanted {
		if wanted[n] && !p.has[n] {
			p.lacking++
			p.left += int64(p.info.PieceSize(n))
		}
	}
	if p.lacking == 0 && was > 0 {
		close(p.done)
	}
	p.stir()
}

// Wanted says of each piece whether it is wanted; nil means that all are. It is
// not to be changed.
func (p *Pieces) Wanted() []bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wanted
}

// Claimable says of each piece whether it may be claimed some time, as far as is
// known by now; nil means that all may.
func (p *Pieces) Claimable() []bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held {
		return slices.Clone(p.preferred)
	}
	return p.wanted
}

// Preferred says of each piece whether it comes before others.
func (p *Pieces) Preferred() []bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.preferred)
}

// File is what the kernel can send a range of complete pieces from, if the
// storage is a file. The error says why not.
func (p *Pieces) File(off, n int64) (syscall.RawConn, error) {
	f, ok := p.store.(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	if n, lacking := p.lacks(off, n); lacking {
		return nil, fmt.Errorf("piece %d is not there", n)
	}
	return f.SyscallConn()
}

func (p *Pieces) wantedN() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.has {
		if p.wants(i) {
			n++
		}
	}
	return n
}

// Claim chooses a piece that is wanted, neither complete, claimed nor expected, and claims
// it for the caller, who will Put or Release it. Preferred pieces come first, then
// the one with the lowest rank; rank says false for a piece the caller cannot
// get. It must not call p.
func (p *Pieces) Claim(rank func(n int) (int64, bool)) (n int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n = Choose(p.claimable, p.preferred, rank)
	if n < 0 {
		return 0, false
	}
	p.claimed[n] = true
	return n, true
}

// claimable are the pieces of which Claim has the choice, with mu held.
func (p *Pieces) claimable(yield func(n int) bool) {
	for n := range p.has {
		if !p.has[n] && !p.claimed[n] && p.wants(n) && (!p.held || p.preferred[n]) && !(p.expected != nil && p.expected[n]) && !yield(n) {
			return
		}
	}
}

// Choose is what Claim chooses of some pieces, or -1.
func Choose(pieces iter.Seq[int], preferred []bool, rank func(n int) (int64, bool)) int {
	best, least := -1, int64(0)
	for n := range pieces {
		r, can := rank(n)
		if !can {
			continue
		}
		if best < 0 || preferred[n] && !preferred[best] || preferred[n] == preferred[best] && r < least {
			best, least = n, r
		}
	}
	return best
}

// Release gives up the claim on piece n.
func (p *Pieces) Release(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.claimed[n] = false
}

// ReadAt reads bytes of complete pieces and refuses all others.
func (p *Pieces) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > p.info.Length {
		return 0, fmt.Errorf("%d bytes at %d of %d: %w", len(b), off, p.info.Length, io.ErrUnexpectedEOF)
	}
	if n, ok := p.lacks(off, int64(len(b))); ok {
		return 0, fmt.Errorf("piece %d is not there", n)
	}
	n, err := p.store.ReadAt(b, off)
	if n == len(b) {
		return n, nil // a ReaderAt may say EOF with the last byte
	}
	return n, err
}

// Since returns the pieces completed after the first i, in the order they came,
// and a channel that is closed when there are more, or when less is wanted. The slice is not to be changed.
func (p *Pieces) Since(i int) ([]int, <-chan struct{}) {
	fresh, _, more := p.news(i)
	return fresh, more
}

// news is Since, and how many pieces were missing at that moment.
func (p *Pieces) news(i int) (fresh []int, missing int, more <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.order[i:len(p.order):len(p.order)], p.lacking, p.more
}

// Completed is every complete piece once: those that are there, then each as
// it comes. It ends after the last one that is wanted, or with ctx.
func (p *Pieces) Completed(ctx context.Context) iter.Seq[int] {
	return func(yield func(int) bool) {
		for seen := 0; ; {
			fresh, missing, more := p.news(seen)
			for _, n := range fresh {
				if ctx.Err() != nil || !yield(n) {
					return
				}
			}
			seen += len(fresh)
			if missing == 0 {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-more:
			}
		}
	}
}

// Wait returns when all of the n bytes from off are there, or with the error
// of ctx.
func (p *Pieces) Wait(ctx context.Context, off, n int64) error {
	for {
		_, more := p.Since(0)
		if _, lacking := p.lacks(off, n); !lacking {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-more:
		}
	}
}

// lacks names a piece of the range that is not complete, if there is one.
func (p *Pieces) lacks(off, n int64) (int, bool) {
	first, end := p.span(off, n)
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := first; i < end; i++ {
		if !p.has[i] {
			return i, true
		}
	}
	return 0, false
}

// span is the pieces [first, end) that the n bytes from off touch, cut to the layer.
func (p *Pieces) span(off, n int64) (first, end int) {
	off, n = max(off, 0), min(n, p.info.Length) // no sum below overflows
	if n <= 0 || off >= p.info.Length {
		return 0, 0
	}
	last := min(off+n, p.info.Length) - 1
	return int(off / p.info.PieceLength), int(last/p.info.PieceLength) + 1
}
