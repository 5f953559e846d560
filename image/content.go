package image

import (
	"fmt"
	"io"
	"slices"

	"github.com/klauspost/compress/zstd"
)

// Contents opens the files of a view. It keeps the last frame of each layer, so
// files are best opened in their order. It is for one goroutine.
type Contents struct {
	view   *View
	layers []Layer
	dec    *zstd.Decoder
	last   []lastFrame // one for each layer
	buf    []byte
}

type lastFrame struct {
	n     int
	plain []byte // nil: none yet
	buf   []byte // that plain lies in
}

// NewContents takes the layers that view was read of.
func NewContents(view *View, layers ...Layer) (*Contents, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true), zstd.IgnoreChecksum(true))
	if err != nil {
		return nil, err
	}
	return &Contents{view: view, layers: layers, dec: dec, last: make([]lastFrame, len(layers))}, nil
}

// Close ends all use of c and of what it opened.
func (c *Contents) Close() { c.dec.Close() }

// Open opens the content of e, an entry of the view: of a hard link, what it is
// a name of.
func (c *Contents) Open(e Entry) (io.ReadCloser, error) {
	if e.Type == Hardlink {
		e, _ = c.view.entry(e.Link)
	}
	if e.Type != Regular {
		return nil, fmt.Errorf("%q: a %s has no content", e.Path, e.Type)
	}
	return io.NopCloser(&content{c, e.Layer, e.Offset, e.Offset + e.Size}), nil
}

// A content reads what lies between two places of a layer's stream.
type content struct {
	*Contents
	layer   int
	at, end int64
}

func (r *content) Read(p []byte) (int, error) {
	if r.at == r.end {
		return 0, io.EOF
	}
	n := r.view.Layers[r.layer].frameAt(r.at)
	plain, err := r.frame(r.layer, n)
	if err != nil {
		return 0, err
	}
	f := r.view.Layers[r.layer].Frames[n]
	plain = plain[r.at-f.Plain:]
	copied := copy(p, plain[:min(int64(len(plain)), r.end-r.at)])
	r.at += int64(copied)
	return copied, nil
}

// frame gives the plain bytes of a frame, good until the next of its layer.
func (c *Contents) frame(layer, n int) ([]byte, error) {
	last := &c.last[layer]
	if last.plain != nil && last.n == n {
		return last.plain, nil
	}
	f := &c.view.Layers[layer].Frames[n]
	last.plain = nil
	if int64(cap(last.buf)) < f.PlainSize {
		last.buf = make([]byte, max(f.PlainSize, frameSize))
	}
	compressed := slices.Grow(c.buf[:0], int(f.Size))[:f.Size]
	c.buf = compressed
	got, err := c.layers[layer].Bytes.ReadAt(compressed, f.Offset)
	if got == len(compressed) {
		last.n = n
		last.plain, err = f.decode(c.dec, compressed, last.buf)
	}
	if err != nil {
		return nil, fmt.Errorf("layer %d: frame %d at %d+%d: %w", layer, n, f.Offset, f.Size, err)
	}
	return last.plain, nil
}

// decode verifies a frame and decompresses it into buf, which has the room.
func (f *Frame) decode(dec *zstd.Decoder, compressed, buf []byte) ([]byte, error) {
	if err := f.verify(compressed); err != nil {
		return nil, err
	}
	// The capacity is the bound of what can come out.
	plain, err := dec.DecodeAll(compressed, buf[:0:f.PlainSize])
	if err != nil {
		return nil, err
	}
	if int64(len(plain)) != f.PlainSize {
		return nil, fmt.Errorf("decompresses to %d bytes, want %d", len(plain), f.PlainSize)
	}
	return plain, nil
}
