package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// Options say how to extract.
type Options struct {
	// Unprivileged leaves out what only root may do: owners, device nodes, and
	// extended attributes other than user.*. Extractor.Skipped counts them.
	Unprivileged bool
}

// Skipped is how much an unprivileged extraction left out.
type Skipped struct{ Owners, Devices, Xattrs int64 }

// An Extractor writes the frames of a stack of layers to their files. Its methods may
// be called from any goroutine.
type Extractor struct {
	root  *os.File
	view  *View
	opts  Options
	dec   *zstd.Decoder
	plain sync.Pool // *[]byte for one frame's plain bytes

	layers []layerState
	mu     sync.Mutex
	begun  map[int]bool // entries with content in several frames, once they are made

	owners, devices, xattrs atomic.Int64
}

type layerState struct {
	files  []int // entries with content, in the order of the stream
	needed []int
	frames []frameState
}

type frameState struct {
	mu   sync.Mutex
	done bool
}

// NewExtractor makes what has no content below dir, which exists: directories,
// symlinks, devices, empty files. What lies there under the same names is
// replaced, except for directories, which stay. Until Finish, directories
// belong to the caller and are closed to all others.
func NewExtractor(dir string, view *View, opts Options) (*Extractor, error) {
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(runtime.GOMAXPROCS(0)),
		zstd.WithDecodeAllCapLimit(true),
		zstd.IgnoreChecksum(true)) // the SHA-256 came first
	if err != nil {
		return nil, err
	}
	root, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		dec.Close()
		return nil, fmt.Errorf("extract: %w", err)
	}
	x := &Extractor{
		root: root, view: view, opts: opts, dec: dec,
		layers: make([]layerState, len(view.Layers)),
		begun:  make(map[int]bool),
	}
	for n, index := range view.Layers {
		x.layers[n] = layerState{view.files(n), view.Needed(n), make([]frameState, len(index.Frames))}
	}
	if err := x.skeleton(); err != nil {
		x.Close()
		return nil, fmt.Errorf("extract: %w", err)
	}
	return x, nil
}

// Close lets go of the target. An extraction that was not finished stays as
// far as it came.
func (x *Extractor) Close() error {
	x.dec.Close()
	return x.root.Close()
}

// Skipped is what Options.Unprivileged left out so far.
func (x *Extractor) Skipped() Skipped {
	return Skipped{Owners: x.owners.Load(), Devices: x.devices.Load(), Xattrs: x.xattrs.Load()}
}

func (x *Extractor) below() *below { return newBelow(int(x.root.Fd())) }

func (x *Extractor) skeleton() error {
	b := x.below()
	defer b.close()
	for i := range x.view.Entries {
		e := &x.view.Entries[i]
		if e.Path == "." || e.Type == Hardlink || e.Size > 0 {
			continue
		}
		if x.opts.Unprivileged && (e.Type == Char || e.Type == Block) {
			x.devices.Add(1)
			continue
		}
		if err := x.make(b, e); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	return nil
}

// make makes an entry that has no content.
func (x *Extractor) make(b *below, e *Entry) error {
	dir, name, err := b.parent(e.Path)
	if err != nil {
		return err
	}
	switch e.Type {
	case Dir:
		err := unix.Mkdirat(dir, name, 0o700)
		if err == unix.EEXIST { // lost+found, a mount point
			var st unix.Stat_t
			if err = unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
				err = errors.New("is there already and is no directory")
			}
		}
		return err // Finish does the rest
	case Regular:
		fd, err := create(dir, name)
		if err != nil {
			return err
		}
		unix.Close(fd)
	case Symlink:
		err = replace(dir, name, func() error { return unix.Symlinkat(e.Link, dir, name) })
	case Fifo:
		err = replace(dir, name, func() error { return unix.Mknodat(dir, name, unix.S_IFIFO|0o600, 0) })
	case Char:
		err = replace(dir, name, func() error { return unix.Mknodat(dir, name, unix.S_IFCHR|0o600, e.device()) })
	case Block:
		err = replace(dir, name, func() error { return unix.Mknodat(dir, name, unix.S_IFBLK|0o600, e.device()) })
	default:
		err = e.unknown()
	}
	if err != nil {
		return err
	}
	return x.seal(dir, name, e)
}

func (e *Entry) device() int { return int(unix.Mkdev(e.Major, e.Minor)) }

// replace does f again without what is there already. Files are never written
// into where they lie: they could have names outside.
func replace(dir int, name string, f func() error) error {
	err := f()
	if err == unix.EEXIST {
		if err := unix.Unlinkat(dir, name, 0); err != nil {
			return fmt.Errorf("replace: %w", err)
		}
		err = f()
	}
	return err
}

func create(dir int, name string) (fd int, err error) {
	err = replace(dir, name, func() error {
		fd, err = openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
		return err
	})
	return fd, err
}

// seal gives an entry that is complete its owner, attributes, mode and time.
// chown and writing clear setuid and capabilities, a read-only file takes no
// attributes from its owner, and all of them are later than the time: hence
// the order.
func (x *Extractor) seal(dir int, name string, e *Entry) error {
	if x.opts.Unprivileged {
		x.owners.Add(1)
	} else if err := unix.Fchownat(dir, name, int(e.UID), int(e.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("chown %d:%d: %w", e.UID, e.GID, err)
	}
	for attr, value := range e.Xattrs {
		if x.opts.Unprivileged && (e.Type == Symlink || len(attr) < 5 || attr[:5] != "user.") {
			x.xattrs.Add(1)
			continue
		}
		// There is no setxattrat before Linux 6.13; this is the same.
		path := "/proc/self/fd/" + strconv.Itoa(dir) + "/" + name
		if err := unix.Lsetxattr(path, attr, []byte(value), 0); err != nil {
			return fmt.Errorf("set %s: %w", attr, err)
		}
	}
	if e.Type != Symlink {
		if err := unix.Fchmodat(dir, name, e.Mode, 0); err != nil {
			return fmt.Errorf("chmod %o: %w", e.Mode, err)
		}
	}
	mtime, err := unix.TimeToTimespec(e.MTime)
	if err != nil {
		return fmt.Errorf("time %v: %w", e.MTime, err)
	}
	if err := unix.UtimesNanoAt(dir, name, []unix.Timespec{mtime, mtime}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// Frame verifies the n-th frame of a layer, decompresses it and writes it to
// its files. Frames may come in any order and twice; a frame that failed may
// come again. Frames that the view does not need are left alone.
func (x *Extractor) Frame(layer, n int, compressed []byte) error {
	if layer < 0 || layer >= len(x.layers) {
		return fmt.Errorf("layer %d: there are %d", layer, len(x.layers))
	}
	l := &x.layers[layer]
	if n < 0 || n >= len(l.frames) {
		return fmt.Errorf("layer %d: frame %d: layer has %d", layer, n, len(l.frames))
	}
	if _, needed := slices.BinarySearch(l.needed, n); !needed {
		return nil
	}
	s := &l.frames[n]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return nil
	}
	f := &x.view.Layers[layer].Frames[n]
	if err := x.frame(l, f, compressed); err != nil {
		return fmt.Errorf("layer %d: frame %d at %d+%d: %w", layer, n, f.Offset, f.Size, err)
	}
	s.done = true
	return nil
}

func (x *Extractor) frame(l *layerState, f *Frame, compressed []byte) error {
	if err := f.verify(compressed); err != nil {
		return err
	}
	buf, _ := x.plain.Get().(*[]byte)
	if buf == nil || int64(cap(*buf)) < f.PlainSize {
		b := make([]byte, max(f.PlainSize, frameSize))
		buf = &b
	}
	defer x.plain.Put(buf)
	// The capacity is the bound of what can come out.
	plain, err := x.dec.DecodeAll(compressed, (*buf)[:0:f.PlainSize])
	if err != nil {
		return err
	}
	if int64(len(plain)) != f.PlainSize {
		return fmt.Errorf("decompresses to %d bytes, want %d", len(plain), f.PlainSize)
	}

	b := x.below()
	defer b.close()
	end := f.Plain + f.PlainSize
	first := sort.Search(len(l.files), func(i int) bool {
		e := &x.view.Entries[l.files[i]]
		return e.Offset+e.Size > f.Plain
	})
	for _, i := range l.files[first:] {
		e := &x.view.Entries[i]
		if e.Offset >= end {
			break
		}
		from, to := max(e.Offset, f.Plain), min(e.Offset+e.Size, end)
		if err := x.write(b, i, from-e.Offset, plain[from-f.Plain:to-f.Plain]); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	return nil
}

// write writes the part of the i-th entry's content that begins at off.
func (x *Extractor) write(b *below, i int, off int64, part []byte) error {
	e := &x.view.Entries[i]
	dir, name, err := b.parent(e.Path)
	if err != nil {
		return err
	}
	whole := int64(len(part)) == e.Size
	var fd int
	if whole {
		fd, err = create(dir, name)
	} else {
		fd, err = x.part(dir, name, i)
	}
	if err != nil {
		return err
	}
	holes, err := writeSparse(fd, off, part)
	if err == nil && whole && holes {
		err = unix.Ftruncate(fd, e.Size)
	}
	if cerr := unix.Close(fd); err == nil {
		err = cerr // NFS and quotas speak up here
	}
	if err != nil || !whole {
		return err // what came in parts is sealed by Finish
	}
	return x.seal(dir, name, e)
}

// part opens a file that comes in several frames; the first one makes it.
func (x *Extractor) part(dir int, name string, i int) (fd int, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.begun[i] {
		return openat(dir, name, unix.O_WRONLY|unix.O_NOFOLLOW, 0)
	}
	if fd, err = create(dir, name); err != nil {
		return -1, err
	}
	if err := unix.Ftruncate(fd, x.view.Entries[i].Size); err != nil {
		unix.Close(fd)
		return -1, err
	}
	x.begun[i] = true
	return fd, nil
}

// hole is the unit in which zeros are left out: the block size of nearly every
// filesystem.
const hole = 4096

var zeros [hole]byte

// writeSparse writes p at off, except for blocks of zeros, and says whether
// there were any. The file has nothing there yet.
func writeSparse(fd int, off int64, p []byte) (holes bool, err error) {
	start := 0 // of what is not written yet
	flush := func(end int) error {
		for start < end {
			n, err := unix.Pwrite(fd, p[start:end], off+int64(start))
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return err
			}
			start += n
		}
		return nil
	}
	for at := 0; at < len(p); {
		n := min(int(hole-(off+int64(at))%hole), len(p)-at)
		if bytes.Equal(p[at:at+n], zeros[:n]) {
			if err := flush(at); err != nil {
				return holes, err
			}
			start, holes = at+n, true
		}
		at += n
	}
	return holes, flush(len(p))
}

// Finish makes the hard links and gives the directories their owners, modes
// and times, when all frames are in; otherwise it says which are missing.
func (x *Extractor) Finish() error {
	if err := x.missing(); err != nil {
		return fmt.Errorf("extract: %w", err)
	}
	b := x.below()
	defer b.close()
	es := x.view.Entries
	types := make(map[string]Type)
	for i := range es {
		e := &es[i]
		var err error
		switch {
		case x.begun[i]:
			var dir int
			var name string
			if dir, name, err = b.parent(e.Path); err == nil {
				err = x.seal(dir, name, e)
			}
		case e.Type == Hardlink:
			if t := types[e.Link]; x.opts.Unprivileged && (t == Char || t == Block) {
				x.devices.Add(1)
				continue
			}
			err = x.link(b, e)
		}
		if err != nil {
			return fmt.Errorf("extract: %q: %w", e.Path, err)
		}
		types[e.Path] = e.Type
	}
	// Children before parents, since a directory that is sealed may not let
	// its maker in any more.
	for i := len(es) - 1; i >= 0; i-- {
		if es[i].Type != Dir {
			continue
		}
		dir, name, err := b.parent(es[i].Path)
		if err == nil {
			err = x.seal(dir, name, &es[i])
		}
		if err != nil {
			return fmt.Errorf("extract: %q: %w", es[i].Path, err)
		}
	}
	return nil
}

func (x *Extractor) link(b *below, e *Entry) error {
	other := x.below() // both directories are needed at once
	defer other.close()
	from, oldname, err := other.parent(e.Link)
	if err != nil {
		return err
	}
	dir, name, err := b.parent(e.Path)
	if err != nil {
		return err
	}
	err = replace(dir, name, func() error { return unix.Linkat(from, oldname, dir, name, 0) })
	if err != nil {
		return fmt.Errorf("link to %q: %w", e.Link, err)
	}
	return nil
}

// missing says which frames have not come, or nil.
func (x *Extractor) missing() error {
	missing, needed := 0, 0
	first := ""
	for layer := range x.layers {
		l := &x.layers[layer]
		needed += len(l.needed)
		for _, n := range l.needed {
			s := &l.frames[n]
			s.mu.Lock()
			done := s.done
			s.mu.Unlock()
			if done {
				continue
			}
			if missing++; missing == 1 {
				f := x.view.Layers[layer].Frames[n]
				first = fmt.Sprintf("frame %d at %d+%d of layer %d", n, f.Offset, f.Size, layer)
			}
		}
	}
	if missing == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d frames are missing, the first is %s", missing, needed, first)
}

// A Layer is a layer whose bytes are all there.
type Layer struct {
	Descriptor
	Bytes io.ReaderAt
}

// ReadView reads the indexes of layers, the lowest first, and stacks them.
func ReadView(layers ...Layer) (*View, error) {
	indexes := make([]*Index, len(layers))
	for n, l := range layers {
		var err error
		if indexes[n], err = ReadIndex(l.Bytes, l.Descriptor); err != nil {
			return nil, fmt.Errorf("layer %d: %w", n, err)
		}
	}
	return Flatten(indexes...)
}

// Extract extracts a stack of layers, the lowest first, below dir, on all cores.
func Extract(ctx context.Context, dir string, opts Options, layers ...Layer) (Skipped, error) {
	view, err := ReadView(layers...)
	if err != nil {
		return Skipped{}, err
	}
	x, err := NewExtractor(dir, view, opts)
	if err != nil {
		return Skipped{}, err
	}
	defer x.Close()
	type job struct{ layer, frame int }
	var jobs []job
	for layer := range layers {
		for _, n := range x.layers[layer].needed {
			jobs = append(jobs, job{layer, n})
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			var b []byte
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(jobs) {
					return
				}
				j := jobs[i]
				f := &view.Layers[j.layer].Frames[j.frame]
				b = slices.Grow(b[:0], int(f.Size))[:f.Size]
				if n, err := layers[j.layer].Bytes.ReadAt(b, f.Offset); n < len(b) {
					cancel(fmt.Errorf("layer %d: frame %d at %d+%d: %w", j.layer, j.frame, f.Offset, f.Size, err))
					return
				}
				if err := x.Frame(j.layer, j.frame, b); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	workers.Wait()
	if ctx.Err() != nil {
		return x.Skipped(), fmt.Errorf("extract: %w", context.Cause(ctx))
	}
	err = x.Finish()
	return x.Skipped(), err
}
