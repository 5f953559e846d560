package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"

	"rookery/wire"
)

// A Damage is a part of a layer whose bytes are not what its manifest and its
// index say.
type Damage struct {
	Part         string // "frame 17", "index", "seek table", or "layer": only the whole
	Offset, Size int64  // in the layer
	Files        []string
	Err          error
}

func (d Damage) String() string {
	return fmt.Sprintf("%s at %d+%d: %v", d.Part, d.Offset, d.Size, d.Err)
}

// VerifyLayer reads a layer once, from begin to end, and says what of it is
// damaged; a layer that ends early or cannot be read in places is damaged there.
// An error says why it could not be told. progress, when not nil, is told how
// many bytes were read so far.
func VerifyLayer(layer io.ReaderAt, d Descriptor, progress func(done int64)) ([]Damage, error) {
	if err := d.Check(); err != nil {
		return nil, err
	}
	var damages []Damage
	var end int64
	whole := newTeller()
	defer whole.close()
	// part reads and hashes the next n bytes; check has what was read only when all of it was.
	part := func(name string, n int64, files func() []string, check func([]byte) error) error {
		b := <-whole.free
		b = slices.Grow(b[:0], int(n))[:n]
		got, err := layer.ReadAt(b, end)
		switch {
		case int64(got) == n:
			err = check(b)
		case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, unix.EIO):
			return fmt.Errorf("%s at %d+%d: %w", name, end, n, err)
		case errors.Is(err, io.EOF):
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			damages = append(damages, Damage{name, end, n, files(), err})
		}
		whole.work <- b
		end += n
		if progress != nil {
			progress(end)
		}
		return nil
	}
	none := func() []string { return nil }
	unknown := func([]byte) error { return nil }

	index, indexErr := ReadIndex(layer, d)
	if indexErr == nil {
		for n := range index.Frames {
			f := &index.Frames[n]
			err := part(fmt.Sprintf("frame %d", n), f.Size, func() []string { return index.filesIn(f) }, f.verify)
			if err != nil {
				return nil, err
			}
		}
	}
	for end < d.IndexOffset { // without an index only the whole tells
		if err := part("frames", min(MaxPlain, d.IndexOffset-end), none, unknown); err != nil {
			return nil, err
		}
	}
	if err := part("index", d.IndexSize, none, func([]byte) error { return indexErr }); err != nil {
		return nil, err
	}
	var table []byte
	if indexErr == nil {
		table = index.seekTable(int(d.IndexSize))
	}
	for rest := d.Size - end; rest > 0; rest = d.Size - end {
		err := part("seek table", min(MaxPlain, rest), none, func(b []byte) error {
			n := min(len(b), len(table))
			if indexErr == nil && (!bytes.Equal(b, table[:n]) || int64(len(table)) != rest) {
				return fmt.Errorf("does not say what the index says")
			}
			table = table[n:]
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if got := whole.close(); got != d.Digest && len(damages) == 0 {
		damages = append(damages, Damage{"layer", 0, d.Size, nil, fmt.Errorf("digest is %s, want %s", got, d.Digest)})
	}
	if n, _ := layer.ReadAt(make([]byte, 1), d.Size); n > 0 {
		damages = append(damages, Damage{"layer", 0, d.Size, nil, fmt.Errorf("goes on after its %d bytes", d.Size)})
	}
	return damages, nil
}

// A teller hashes a whole layer beside those who look at its parts: the one
// hash that cannot be shared out.
type teller struct {
	work, free chan []byte
	sum        chan wire.Digest
	closed     bool
}

func newTeller() *teller {
	t := &teller{work: make(chan []byte, 2), free: make(chan []byte, 3), sum: make(chan wire.Digest, 1)}
	for range cap(t.free) {
		t.free <- nil
	}
	go func() {
		h := sha256.New()
		for b := range t.work {
			h.Write(b)
			t.free <- b
		}
		t.sum <- sum(h)
	}()
	return t
}

func (t *teller) close() wire.Digest {
	if t.closed {
		return ""
	}
	t.closed = true
	close(t.work)
	return <-t.sum
}

// verify says whether compressed is the frame, or how it differs.
func (f *Frame) verify(compressed []byte) error {
	if int64(len(compressed)) != f.Size {
		return fmt.Errorf("has %d bytes, want %d", len(compressed), f.Size)
	}
	if got := sha256.Sum256(compressed); got != f.SHA256 {
		return fmt.Errorf("sha256 is %x, want %x", got, f.SHA256)
	}
	return nil
}

// filesIn are the files with content in a frame.
func (x *Index) filesIn(f *Frame) (paths []string) {
	for i := range x.Entries {
		if e := &x.Entries[i]; e.Size > 0 && e.Offset < f.Plain+f.PlainSize && f.Plain < e.Offset+e.Size {
			paths = append(paths, e.Path)
		}
	}
	return paths
}

// ErrForeign is what Describe finds when a blob is no layer of ours, though it
// may well be one of somebody else's.
var ErrForeign = errors.New("has no index")

// Describe finds the index of a layer of size bytes by the seek table at its
// end, for when a manifest does not say where it is. Digest and DiffID are left
// out: they take all of the layer, or a manifest and a config.
func Describe(layer io.ReaderAt, size int64) (Descriptor, error) {
	const foot = 9 // rows, flags, magic
	read := func(what string, n, at int64) ([]byte, error) {
		b := make([]byte, n)
		if got, err := layer.ReadAt(b, at); got < len(b) {
			return nil, fmt.Errorf("%s at %d+%d: %w", what, at, n, err)
		}
		return b, nil
	}
	if size < 8+foot || size > maxStream {
		return Descriptor{}, fmt.Errorf("%d bytes: %w", size, ErrForeign)
	}
	b, err := read("end of the layer", foot, size-foot)
	if err != nil {
		return Descriptor{}, err
	}
	rows := int64(binary.LittleEndian.Uint32(b))
	tableSize := 8 + 8*rows + foot
	if binary.LittleEndian.Uint32(b[5:]) != seekMagic || b[4] != 0 || rows == 0 || rows > maxFrames+1 || tableSize > size {
		return Descriptor{}, fmt.Errorf("ends with %x, no seek table of ours: %w", b, ErrForeign)
	}
	table, err := read("seek table", tableSize, size-tableSize)
	if err != nil {
		return Descriptor{}, err
	}
	last := binary.LittleEndian.Uint32(table[8*rows:]) // the 8 bytes before the rows make up for the row itself
	d := Descriptor{Size: size, IndexSize: int64(last), IndexOffset: size - tableSize - int64(last)}
	if d.IndexSize == 0 || d.IndexSize > MaxIndex || d.IndexOffset < 0 {
		return Descriptor{}, fmt.Errorf("seek table of %d frames ends with one of %d bytes: %w", rows, last, ErrForeign)
	}
	if b, err = read("index", d.IndexSize, d.IndexOffset); err != nil {
		return Descriptor{}, err
	}
	if !isIndex(b) {
		return Descriptor{}, fmt.Errorf("last frame, at %d+%d: %w", d.IndexOffset, d.IndexSize, ErrForeign)
	}
	x, err := ParseIndex(b)
	if err != nil {
		return Descriptor{}, err
	}
	if err := x.endsAt(d.IndexOffset); err != nil {
		return Descriptor{}, err
	}
	if !bytes.Equal(table, x.seekTable(len(b))) {
		return Descriptor{}, errors.New("seek table does not say what the index says")
	}
	d.IndexDigest = wire.DigestOf(b)
	return d, nil
}
