package registry

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"rookery/image/store"
	"rookery/wire"
)

// A Layer is a layer of somebody else's image.
type Layer struct {
	Digest wire.Digest // of the blob; "" in a docker archive, which does not say
	DiffID wire.Digest // of the plain tar stream
	Size   int64       // of the blob, bytes

	n    int
	open func(context.Context) (store.Blob, error)
}

// String names a layer for errors.
func (l Layer) String() string { return fmt.Sprintf("%d (%s)", l.n, cmp.Or(l.Digest, l.DiffID)) }

// Open gives the plain tar stream. Only its io.EOF says that it was the right
// one: until then nothing is known about what was read.
func (l Layer) Open(ctx context.Context) (io.ReadCloser, error) {
	blob, err := l.open(ctx)
	if err != nil {
		return nil, err
	}
	s := &stream{ctx: ctx, layer: l, blob: blob, diff: sha256.New()}
	s.raw = &hashed{r: io.NewSectionReader(blob, 0, l.Size+1), h: sha256.New()}
	s.plain, _, err = plain(bufio.NewReaderSize(s.raw, 1<<20))
	if err != nil {
		err = s.check(err)
		blob.Close()
		return nil, err
	}
	return s, nil
}

// A stream is a layer being unpacked, until ctx ends.
type stream struct {
	ctx   context.Context
	layer Layer
	blob  io.Closer
	raw   *hashed
	plain io.ReadCloser
	diff  hash.Hash
	err   error
}

func (s *stream) Read(p []byte) (int, error) {
	if s.err == nil && s.ctx.Err() != nil {
		s.err = context.Cause(s.ctx)
	}
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.plain.Read(p)
	s.diff.Write(p[:n])
	if err != nil {
		s.err = s.check(err)
	}
	return n, s.err
}

func (s *stream) Close() error {
	return errors.Join(s.plain.Close(), s.blob.Close())
}

// check says what the end of the plain stream is worth: an error of the
// decompressor is often only the effect of a flipped bit.
func (s *stream) check(end error) error {
	l := s.layer
	_, err := io.Copy(io.Discard, s.raw)
	switch {
	case err != nil:
		return fmt.Errorf("after %d bytes of %d: %w", s.raw.n, l.Size, err)
	case s.raw.n < l.Size:
		return fmt.Errorf("ends after %d bytes of %d", s.raw.n, l.Size)
	case s.raw.n > l.Size:
		return fmt.Errorf("has more than its %d bytes", l.Size)
	}
	if got := sum(s.raw.h); l.Digest != "" && got != l.Digest {
		return fmt.Errorf("digest is %s, want %s", got, l.Digest)
	}
	if end != io.EOF {
		return fmt.Errorf("unpack: %w", end)
	}
	if got := sum(s.diff); got != l.DiffID {
		return fmt.Errorf("unpacks to %s, want %s", got, l.DiffID)
	}
	return io.EOF
}

// hashed counts and hashes what is read, up to the first error.
type hashed struct {
	r   io.Reader
	h   hash.Hash
	n   int64
	err error
}

func (r *hashed) Read(p []byte) (n int, err error) {
	if r.err != nil {
		return 0, r.err
	}
	n, r.err = r.r.Read(p)
	r.h.Write(p[:n])
	r.n += int64(n)
	return n, r.err
}

func sum(h hash.Hash) wire.Digest { return wire.DigestSum([32]byte(h.Sum(nil))) }

// maxWindow is what zstd -22 wants, and no hostile frame gets more.
const maxWindow = 128 << 20

// plain unpacks gzip and zstd, which it knows by their first bytes.
func plain(r *bufio.Reader) (_ io.ReadCloser, packed bool, err error) {
	magic, err := r.Peek(4)
	if err != nil && err != io.EOF {
		return nil, false, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		gz, err := gzip.NewReader(r)
		return gz, true, err
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}):
		dec, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, true, err
		}
		return dec.IOReadCloser(), true, nil
	}
	return io.NopCloser(r), false, nil
}
