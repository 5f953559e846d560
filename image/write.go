package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"path"
	"runtime"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"

	"rookery/wire"
)

// Frames are cut at 8 MiB of the stream, above the 4 MiB at which a layer takes
// 7 % more than one `zstd -9`: docs/layer-format.md has the measurements. A
// frame that already has frameEnough is not filled up with the beginning of the
// next file.
const (
	frameSize   = 8 << 20
	frameEnough = 6 << 20
	tarBlock    = 512
)

// level takes five times the CPU of the next one, and 6 % less space.
const level = zstd.SpeedBestCompression

// maxWorkers bounds memory: a compressor and its frames take 80 MiB. More would
// wait for the two hashes that go through the stream from end to end.
const maxWorkers = 16

// newEncoder makes frames that depend on their input only.
func newEncoder(workers int) (*zstd.Encoder, error) {
	return zstd.NewWriter(nil,
		zstd.WithEncoderLevel(level),
		zstd.WithEncoderConcurrency(workers),
		zstd.WithWindowSize(frameSize)) // matches reach back to the frame's beginning; a power of two
}

// Write writes a tree as a layer. Entries may come in any order; every parent
// directory and the root "." must be among them, and a hard link must come
// after what it names once they are sorted. open is called for each file that
// has content, one at a time and in the order of the paths. Equal trees give
// equal bytes.
func Write(w io.Writer, entries []Entry, open func(Entry) (io.ReadCloser, error)) (Descriptor, error) {
	es := sorted(entries)
	if err := checkEntries(es); err != nil {
		return Descriptor{}, err
	}
	workers := workersFor(es)
	enc, err := newEncoder(workers)
	if err != nil {
		return Descriptor{}, err
	}
	defer enc.Close()

	f := newFramer(w, enc, workers)
	err = writeStream(f, es, open)
	frames, ferr := f.close()
	if err = errors.Join(ferr, err); err != nil {
		return Descriptor{}, err
	}
	x := Index{Entries: es, Frames: frames}
	index, err := x.encode(enc)
	if err != nil {
		return Descriptor{}, err
	}
	d := Descriptor{
		DiffID:      sum(f.diff),
		IndexOffset: f.written,
		IndexSize:   int64(len(index)),
		IndexDigest: wire.DigestOf(index),
	}
	if err := f.emit(index); err != nil {
		return Descriptor{}, err
	}
	if err := f.emit(x.seekTable(len(index))); err != nil {
		return Descriptor{}, err
	}
	d.Digest, d.Size = sum(f.layer), f.written
	return d, nil
}

// workersFor is how many compressors can have something to do.
func workersFor(es []Entry) int {
	plain := int64(0)
	for i := range es {
		plain += tarBlock + es[i].Size
	}
	return int(min(1+plain/frameSize, maxWorkers, int64(runtime.GOMAXPROCS(0))))
}

func sum(h hash.Hash) wire.Digest { return wire.DigestSum([32]byte(h.Sum(nil))) }

// writeStream writes the tar stream of es into f, and into es where each
// content lies and what its hash is.
func writeStream(f *framer, es []Entry, open func(Entry) (io.ReadCloser, error)) error {
	at := make(map[string]int) // only what hard links name is looked up
	for i := range es {
		if es[i].Type != Hardlink && es[i].Type != Dir {
			at[es[i].Path] = i
		}
	}
	for i := range es {
		e := &es[i]
		target := e
		if e.Type == Hardlink {
			target = &es[at[e.Link]]
		}
		header, err := tarHeader(e, target, nil)
		if err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
		f.begin(int64(len(header)) + e.Size)
		f.Write(header)
		if e.Size == 0 {
			continue
		}
		e.Offset = f.plain
		if err := writeContent(f, e, open); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
		f.Write(make([]byte, -e.Size&(tarBlock-1)))
		if f.failed() {
			return nil // close says why
		}
	}
	f.Write(make([]byte, 2*tarBlock))
	return nil
}

// escapeXattr writes the name of an attribute as GNU tar does (xattr_encode_keyword
// in its xheader.c): a key of PAX ends at "=".
var escapeXattr = strings.NewReplacer("%", "%25", "=", "%3D")

// tarHeader is the header of e with its PAX records and more. A hard link carries
// what the file it names carries, since some readers set it again.
func tarHeader(e, target *Entry, more map[string]string) ([]byte, error) {
	h := &tar.Header{
		Format:   tar.FormatPAX,
		Name:     e.Path,
		Mode:     int64(target.Mode),
		Uid:      int(target.UID),
		Gid:      int(target.GID),
		ModTime:  target.MTime,
		Size:     e.Size,
		Linkname: e.Link,
		Devmajor: int64(e.Major),
		Devminor: int64(e.Minor),

		PAXRecords: maps.Clone(more),
	}
	switch e.Type {
	case Dir:
		h.Typeflag, h.Name = tar.TypeDir, e.Path+"/"
	case Regular:
		h.Typeflag = tar.TypeReg
	case Symlink:
		h.Typeflag = tar.TypeSymlink
	case Hardlink:
		h.Typeflag = tar.TypeLink
	case Char:
		h.Typeflag = tar.TypeChar
	case Block:
		h.Typeflag = tar.TypeBlock
	case Fifo:
		h.Typeflag = tar.TypeFifo
	case Whiteout:
		dir, name := split(e.Path)
		h.Typeflag, h.Name = tar.TypeReg, path.Join(dir, whiteoutPrefix+name)
	default:
		return nil, e.unknown()
	}
	for name, value := range target.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords["SCHILY.xattr."+escapeXattr.Replace(name)] = value
	}
	var b bytes.Buffer
	err := tar.NewWriter(&b).WriteHeader(h)
	return b.Bytes(), err
}

func writeContent(f *framer, e *Entry, open func(Entry) (io.ReadCloser, error)) error {
	r, err := open(*e)
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	content := withoutHoles(r, e.Size)
	n, err := f.readFrom(content, e.Size, h)
	if err != nil {
		return err
	}
	if n == e.Size {
		var one [1]byte
		if extra, _ := io.ReadFull(content, one[:]); extra > 0 {
			return fmt.Errorf("has more than the %d bytes it had when it was listed", e.Size)
		}
	} else if !f.failed() {
		return fmt.Errorf("has %d bytes, had %d when it was listed", n, e.Size)
	}
	e.SHA256 = [32]byte(h.Sum(nil))
	return nil
}

// A framer cuts what is written into it into frames, compresses them on all
// cores, and writes them in order.
type framer struct {
	w       io.Writer
	enc     *zstd.Encoder
	zeros   func() []byte // a frame of nothing else, as holes have by the thousand
	buf     []byte        // of the frame being filled
	plain   int64         // bytes of the stream so far
	layer   hash.Hash
	written int64

	diff    hash.Hash // of the stream; the collector's until close
	frames  []Frame   // the collector's until close
	err     error     // the collector's; read after broken is closed
	broken  chan struct{}
	queue   chan *job // in order, for the collector
	work    chan *job // for the compressors
	free    chan []byte
	joining sync.WaitGroup
}

// A job is one frame on its way.
type job struct {
	plain, compressed []byte
	sum               [32]byte
	done              chan struct{}
}

func newFramer(w io.Writer, enc *zstd.Encoder, workers int) *framer {
	inFlight := 2*workers + 1
	f := &framer{
		w: w, enc: enc,
		zeros: sync.OnceValue(func() []byte { return enc.EncodeAll(make([]byte, frameSize), nil) }),
		layer: sha256.New(), diff: sha256.New(),
		broken: make(chan struct{}),
		queue:  make(chan *job, inFlight),
		work:   make(chan *job, inFlight),
		free:   make(chan []byte, inFlight),
	}
	for range inFlight {
		f.free <- nil // made when first needed: a small tree needs one
	}
	for range workers {
		f.joining.Go(f.compress)
	}
	f.joining.Go(f.collect)
	return f
}

func (f *framer) compress() {
	for j := range f.work {
		if len(j.plain) == frameSize && isZero(j.plain) {
			j.compressed = f.zeros()
		} else {
			j.compressed = f.enc.EncodeAll(j.plain, nil)
		}
		j.sum = sha256.Sum256(j.compressed)
		close(j.done)
	}
}

// isZero compares p with itself, one byte on.
func isZero(p []byte) bool { return p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1]) }

func (f *framer) collect() {
	plain := int64(0)
	for j := range f.queue {
		f.diff.Write(j.plain)
		<-j.done
		f.frames = append(f.frames, Frame{
			Offset: f.written, Size: int64(len(j.compressed)),
			Plain: plain, PlainSize: int64(len(j.plain)), SHA256: j.sum,
		})
		plain += int64(len(j.plain))
		if f.err == nil {
			if f.err = f.emit(j.compressed); f.err != nil {
				close(f.broken)
			}
		}
		f.free <- j.plain[:0]
	}
}

func (f *framer) emit(b []byte) error {
	if _, err := f.w.Write(b); err != nil {
		return fmt.Errorf("layer at %d: %w", f.written, err)
	}
	f.layer.Write(b)
	f.written += int64(len(b))
	return nil
}

// failed says whether writing further is in vain.
func (f *framer) failed() bool {
	select {
	case <-f.broken:
		return true
	default:
		return false
	}
}

// begin cuts before an entry of n bytes when it would not fit and the frame
// is full enough.
func (f *framer) begin(n int64) {
	if len(f.buf) >= frameEnough && int64(len(f.buf))+n > frameSize {
		f.cut()
	}
}

// room gives the free part of the frame being filled.
func (f *framer) room() []byte {
	if len(f.buf) == frameSize {
		f.cut()
	}
	if f.buf == nil {
		if f.buf = <-f.free; f.buf == nil {
			f.buf = make([]byte, 0, frameSize)
		}
	}
	return f.buf[len(f.buf):frameSize]
}

func (f *framer) fill(n int) {
	f.buf = f.buf[:len(f.buf)+n]
	f.plain += int64(n)
}

func (f *framer) cut() {
	if len(f.buf) == 0 {
		return
	}
	j := &job{plain: f.buf, done: make(chan struct{})}
	f.buf = nil
	f.work <- j
	f.queue <- j
}

func (f *framer) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := copy(f.room(), rest)
		f.fill(n)
		rest = rest[n:]
	}
	return len(p), nil
}

// readFrom reads at most size bytes of r straight into frames, and into h.
func (f *framer) readFrom(r io.Reader, size int64, h hash.Hash) (read int64, err error) {
	for read < size && !f.failed() {
		room := f.room()
		room = room[:min(int64(len(room)), size-read)]
		n, err := io.ReadFull(r, room)
		h.Write(room[:n])
		f.fill(n)
		read += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return read, nil
		}
		if err != nil {
			return read, err
		}
	}
	return read, nil
}

// close cuts the last frame and waits for all of them.
func (f *framer) close() ([]Frame, error) {
	f.cut()
	close(f.work)
	close(f.queue)
	f.joining.Wait()
	return f.frames, f.err
}
