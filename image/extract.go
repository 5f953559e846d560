package image

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// Options say how to extract.
type Options struct {
	// Unprivileged leaves out what only root may do: owners, device nodes, and
	// extended attributes other than user.*. Extractor.Skipped counts them.
	Unprivileged bool
	// Journal is a file that says which frames are written, so that an
	// extraction into the same directory continues where another was stopped: by
	// an error, kill -9 or, up to half a minute back, the loss of power. A
	// journal of something else is refused. Finish removes it; nothing is synced then.
	Journal string
	// Workers is how many frames are written at a time at the most; 0 means
	// GOMAXPROCS. No more are than 32 MiB have room for.
	Workers int
}

// Skipped is how much an unprivileged extraction left out.
type Skipped struct{ Owners, Devices, Xattrs int64 }

// An Extractor writes the frames of a stack of layers to their files. Its methods may
// be called from any goroutine.
type Extractor struct {
	root    *os.File
	view    *View
	opts    Options
	dec     *zstd.Decoder
	workers chan *worker // those that have nothing to do
	journal *journal     // nil: none, or no more

	layers []layerState
	mu     sync.Mutex
	begun  map[int]origin // entries with content in several frames, once they are made

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

// A worker is what one goroutine needs to write frames or make files.
type worker struct {
	below
	plain []byte // of a frame
}

// memory bounds what the plain frames take that are being written at a time,
// however many cores there are. With the compressed ones and what the garbage
// collector leaves lying it becomes four times as much.
const memory = 32 << 20

// An origin is whose a file is that comes in several frames.
type origin bool

const (
	ours    origin = false // made by this Extractor
	earlier origin = true  // made by another, as its journal says
)

// NewExtractor makes what has no content below dir, which exists: directories,
// symlinks, devices, empty files. What lies there under the same names is
// replaced, except for directories, which stay. Until Finish, directories
// belong to the caller and are closed to all others.
func NewExtractor(dir string, view *View, opts Options) (*Extractor, error) {
	x, err := newExtractor(dir, view, opts)
	if err != nil {
		return nil, fmt.Errorf("extract: %w", err)
	}
	return x, nil
}

func newExtractor(dir string, view *View, opts Options) (_ *Extractor, err error) {
	largest := int64(1)
	for _, index := range view.Layers {
		for i := range index.Frames {
			largest = max(largest, index.Frames[i].PlainSize)
		}
	}
	workers := int(min(int64(cmp.Or(opts.Workers, runtime.GOMAXPROCS(0))), max(1, memory/largest)))
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(workers),
		zstd.WithDecodeAllCapLimit(true),
		zstd.IgnoreChecksum(true)) // the SHA-256 came first
	if err != nil {
		return nil, err
	}
	root, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		dec.Close()
		return nil, err
	}
	x := &Extractor{
		root: root, view: view, opts: opts, dec: dec,
		workers: make(chan *worker, workers),
		layers:  make([]layerState, len(view.Layers)),
		begun:   make(map[int]origin),
	}
	for range workers {
		x.workers <- &worker{below: below{root: int(root.Fd())}}
	}
	defer func() {
		if err != nil {
			x.Close()
		}
	}()
	for n, index := range view.Layers {
		x.layers[n] = layerState{view.files(n), view.Needed(n), make([]frameState, len(index.Frames))}
	}
	var done map[frameID]int64
	if opts.Journal != "" {
		if x.journal, done, err = openJournal(opts.Journal, int(root.Fd()), view, opts); err != nil {
			return nil, err
		}
	}
	if err := x.skeleton(); err != nil {
		return nil, err
	}
	return x, x.resume(done)
}

// Close lets go of the target. An extraction that was not finished stays as
// far as it came.
func (x *Extractor) Close() error {
	for range cap(x.workers) { // waits for all of them
		w := <-x.workers
		w.close()
		defer func() { x.workers <- &worker{below: below{root: -1}} }()
	}
	x.dec.Close()
	var err error
	if x.journal != nil {
		err = x.journal.close()
	}
	return errors.Join(err, x.root.Close())
}

// Skipped is what Options.Unprivileged left out so far.
func (x *Extractor) Skipped() Skipped {
	return Skipped{Owners: x.owners.Load(), Devices: x.devices.Load(), Xattrs: x.xattrs.Load()}
}

// each does something for each of list, which are places of entries, on all
// cores, and stops at the first that fails.
func (x *Extractor) each(list []int, do func(w *worker, e *Entry) error) error {
	parts := cap(x.workers)
	if len(list) < 100 {
		parts = 1
	}
	errs := make([]error, parts)
	var workers sync.WaitGroup
	for k := range parts {
		workers.Go(func() {
			w := <-x.workers
			defer func() { x.workers <- w }()
			for _, i := range list[len(list)*k/parts : len(list)*(k+1)/parts] {
				e := &x.view.Entries[i]
				if err := do(w, e); err != nil {
					errs[k] = fmt.Errorf("%q: %w", e.Path, err)
					return
				}
			}
		})
	}
	workers.Wait()
	return cmp.Or(errs...)
}

// directories lists the directories by their depth, the root first.
func (x *Extractor) directories() (levels [][]int) {
	for i := range x.view.Entries {
		e := &x.view.Entries[i]
		if e.Type != Dir {
			continue
		}
		depth := 0
		if e.Path != "." {
			depth = 1 + strings.Count(e.Path, "/")
		}
		for len(levels) <= depth {
			levels = append(levels, nil)
		}
		levels[depth] = append(levels[depth], i)
	}
	return levels
}

func (x *Extractor) skeleton() error {
	for _, level := range x.directories() {
		if err := x.each(level, x.mkdir); err != nil {
			return err
		}
	}
	var rest []int
	for i := range x.view.Entries {
		if e := &x.view.Entries[i]; e.Type != Dir && e.Type != Hardlink && e.Size == 0 {
			rest = append(rest, i)
		}
	}
	return x.each(rest, x.make)
}

// mkdir makes a directory; Finish does the rest. One that is there, such as
// lost+found or a mount point, must not give what is made in it more than its entry has.
func (x *Extractor) mkdir(w *worker, e *Entry) error {
	dir, name, err := w.parent(e.Path)
	if err != nil {
		return err
	}
	if err := unix.Mkdirat(dir, name, 0o700); err != unix.EEXIST {
		return err
	}
	fd, err := openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err == unix.ENOTDIR {
		return errors.New("is there already and is no directory")
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fchmodat(unix.AT_FDCWD, proc(fd), 0o700, 0); err != nil {
		return fmt.Errorf("chmod 700: %w", err)
	}
	for _, acl := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
		err := unix.Removexattr(proc(fd), acl)
		if err != nil && err != unix.ENODATA && err != unix.ENOTSUP {
			return fmt.Errorf("remove %s: %w", acl, err)
		}
	}
	return nil
}

// make makes an entry that is no directory and has no content.
func (x *Extractor) make(w *worker, e *Entry) error {
	if x.opts.Unprivileged && (e.Type == Char || e.Type == Block) {
		x.devices.Add(1)
		return nil
	}
	dir, name, err := w.parent(e.Path)
	if err != nil {
		return err
	}
	switch e.Type {
	case Regular:
		fd, err := create(dir, name, e.firstMode())
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return x.seal(dir, name, fd, e)
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
	return x.seal(dir, name, -1, e)
}

// resume takes over what an earlier extraction wrote, as far as it is there.
func (x *Extractor) resume(done map[frameID]int64) error {
	var dropped []frameID
	for layer := range x.layers {
		l := &x.layers[layer]
		for _, n := range l.needed {
			id := frameID{layer, n}
			if _, ok := done[id]; !ok {
				continue
			}
			if x.there(l, &x.view.Layers[layer].Frames[n]) {
				l.frames[n].done = true
			} else {
				dropped = append(dropped, id)
			}
		}
	}
	if len(dropped) == 0 {
		return nil
	}
	return x.journal.dropped(dropped)
}

// there says whether all files of a frame look as it left them.
func (x *Extractor) there(l *layerState, f *Frame) bool {
	w := <-x.workers
	defer func() { x.workers <- w }()
	for i := range x.within(l, f) {
		e := &x.view.Entries[i]
		dir, name, err := w.parent(e.Path)
		if err != nil {
			return false
		}
		var st unix.Stat_t
		if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != e.Size {
			return false
		}
		if e.Offset >= f.Plain && e.Offset+e.Size <= f.Plain+f.PlainSize {
			if time.Unix(st.Mtim.Unix()).Equal(e.MTime) {
				continue // the time came last
			}
			return false
		}
		// It may be sealed: its owner is to write what is missing.
		if chmod(dir, name, 0o600) != nil {
			return false
		}
		x.begun[i] = earlier
	}
	return true
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

func create(dir int, name string, mode uint32) (fd int, err error) {
	err = replace(dir, name, func() error {
		fd, err = openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, mode)
		return err
	})
	return fd, err
}

// firstMode is what a file is made with that is written and sealed at once.
// With some luck it stays; the others cannot see it, nor set it off.
func (e *Entry) firstMode() uint32 {
	if len(e.Xattrs) > 0 {
		return 0o600 // a read-only file takes no attributes from its owner
	}
	return e.Mode & 0o777
}

// seal gives an entry that is complete its owner, attributes, mode and time,
// as far as it has others, by fd when that is not -1. chown and writing clear
// setuid and capabilities, a read-only file takes no attributes from its owner,
// and all of them are later than the time: hence the order.
func (x *Extractor) seal(dir int, name string, fd int, e *Entry) error {
	var st unix.Stat_t
	var err error
	if fd >= 0 {
		err = unix.Fstat(fd, &st)
	} else {
		err = unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	sameMode := st.Mode&0o7777 == e.Mode && len(e.Xattrs) == 0
	if x.opts.Unprivileged {
		x.owners.Add(1)
	} else if st.Uid != e.UID || st.Gid != e.GID {
		if err := unix.Fchownat(dir, name, int(e.UID), int(e.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("chown %d:%d: %w", e.UID, e.GID, err)
		}
		sameMode = sameMode && e.Mode <= 0o777
	}
	for attr, value := range e.Xattrs {
		if x.opts.Unprivileged && (e.Type == Symlink || !strings.HasPrefix(attr, "user.")) {
			x.xattrs.Add(1)
			continue
		}
		// There is no setxattrat before Linux 6.13; this is the same.
		if err := unix.Lsetxattr(proc(dir)+"/"+name, attr, []byte(value), 0); err != nil {
			return fmt.Errorf("set %s: %w", attr, err)
		}
	}
	if e.Type != Symlink && !sameMode {
		if fd >= 0 {
			err = unix.Fchmod(fd, e.Mode)
		} else {
			err = chmod(dir, name, e.Mode)
		}
		if err != nil {
			return fmt.Errorf("chmod %o: %w", e.Mode, err)
		}
	}
	mtime, err := unix.TimeToTimespec(e.MTime)
	if err != nil {
		return fmt.Errorf("time %v: %w", e.MTime, err)
	}
	if err := setTimes(dir, name, fd, mtime); err != nil {
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
	err := x.frame(l, f, compressed)
	if err == nil && x.journal != nil {
		err = x.journal.wrote(layer, n)
	}
	if err != nil {
		return fmt.Errorf("layer %d: frame %d at %d+%d: %w", layer, n, f.Offset, f.Size, err)
	}
	s.done = true
	return nil
}

func (x *Extractor) frame(l *layerState, f *Frame, compressed []byte) error {
	if err := f.verify(compressed); err != nil {
		return err
	}
	w := <-x.workers
	defer func() { x.workers <- w }()
	if int64(cap(w.plain)) < f.PlainSize {
		w.plain = make([]byte, f.PlainSize)
	}
	// The capacity is the bound of what can come out.
	plain, err := x.dec.DecodeAll(compressed, w.plain[:0:f.PlainSize])
	if err != nil {
		return err
	}
	if int64(len(plain)) != f.PlainSize {
		return fmt.Errorf("decompresses to %d bytes, want %d", len(plain), f.PlainSize)
	}
	end := f.Plain + f.PlainSize
	for i := range x.within(l, f) {
		e := &x.view.Entries[i]
		from, to := max(e.Offset, f.Plain), min(e.Offset+e.Size, end)
		if err := x.write(w, i, from-e.Offset, plain[from-f.Plain:to-f.Plain]); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	return nil
}

// within are the entries with content in a frame.
func (x *Extractor) within(l *layerState, f *Frame) iter.Seq[int] {
	return func(yield func(int) bool) {
		first := sort.Search(len(l.files), func(i int) bool {
			e := &x.view.Entries[l.files[i]]
			return e.Offset+e.Size > f.Plain
		})
		for _, i := range l.files[first:] {
			if x.view.Entries[i].Offset >= f.Plain+f.PlainSize || !yield(i) {
				return
			}
		}
	}
}

// write writes the part of the i-th entry's content that begins at off.
func (x *Extractor) write(w *worker, i int, off int64, part []byte) error {
	e := &x.view.Entries[i]
	dir, name, err := w.parent(e.Path)
	if err != nil {
		return err
	}
	if int64(len(part)) < e.Size {
		return x.writePart(dir, name, i, off, part)
	}
	fd, err := create(dir, name, e.firstMode())
	if err != nil {
		return err
	}
	holes, err := writeSparse(fd, 0, part)
	if err == nil && holes {
		err = unix.Ftruncate(fd, e.Size)
	}
	if err == nil {
		err = x.seal(dir, name, fd, e)
	}
	return closed(fd, err)
}

// closed closes fd. NFS and quotas speak up only here.
func closed(fd int, err error) error {
	return cmp.Or(err, unix.Close(fd))
}

// writePart writes to a file that comes in several frames; Finish seals it.
func (x *Extractor) writePart(dir int, name string, i int, off int64, part []byte) error {
	fd, origin, err := x.open(dir, name, i)
	if err != nil {
		return err
	}
	if origin == earlier {
		// Some of it may be there, or what a crash left in its place.
		err = unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(len(part)))
		if err == unix.EOPNOTSUPP {
			return closed(fd, pwrite(fd, off, part))
		}
	}
	if err == nil {
		_, err = writeSparse(fd, off, part)
	}
	return closed(fd, err)
}

// open opens a file that comes in several frames; the first one makes it.
func (x *Extractor) open(dir int, name string, i int) (fd int, by origin, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if by, ok := x.begun[i]; ok {
		fd, err := openat(dir, name, unix.O_WRONLY|unix.O_NOFOLLOW, 0)
		return fd, by, err
	}
	if fd, err = create(dir, name, 0o600); err != nil {
		return -1, ours, err
	}
	if err := unix.Ftruncate(fd, x.view.Entries[i].Size); err != nil {
		unix.Close(fd)
		return -1, ours, err
	}
	x.begun[i] = ours
	return fd, ours, nil
}

// hole is the unit in which zeros are left out: the block size of nearly every
// filesystem.
const hole = 4096

var zeros [hole]byte

// writeSparse writes p at off, except for blocks of zeros, and says whether
// there were any. The file has nothing there yet.
func writeSparse(fd int, off int64, p []byte) (holes bool, err error) {
	start := 0 // of what is not written yet
	for at := 0; at < len(p); {
		n := min(int(hole-(off+int64(at))%hole), len(p)-at)
		if bytes.Equal(p[at:at+n], zeros[:n]) {
			if err := pwrite(fd, off+int64(start), p[start:at]); err != nil {
				return holes, err
			}
			start, holes = at+n, true
		}
		at += n
	}
	return holes, pwrite(fd, off+int64(start), p[start:])
}

func pwrite(fd int, off int64, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(fd, p, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// Finish makes the hard links and gives the directories their owners, modes
// and times, when all frames are in; otherwise it says which are missing.
func (x *Extractor) Finish() error {
	if err := x.missing(); err != nil {
		return fmt.Errorf("extract: %w", err)
	}
	if err := x.finish(); err != nil {
		return fmt.Errorf("extract: %w", err)
	}
	return nil
}

func (x *Extractor) finish() error {
	seal := func(w *worker, e *Entry) error {
		dir, name, err := w.parent(e.Path)
		if err != nil {
			return err
		}
		return x.seal(dir, name, -1, e)
	}
	if err := x.each(slices.Sorted(maps.Keys(x.begun)), seal); err != nil {
		return err
	}
	if err := x.links(); err != nil {
		return err
	}
	// Children before parents, since a directory that is sealed may not let
	// its maker in any more.
	for depth, level := range slices.Backward(x.directories()) {
		if depth == 0 && x.journal != nil {
			if err := x.removeJournal(seal); err != nil {
				return err
			}
		}
		if err := x.each(level, seal); err != nil {
			return err
		}
	}
	return nil
}

// removeJournal removes the journal, which may lie in the root. After it, at
// most the root's time is not what it is to be.
func (x *Extractor) removeJournal(seal func(*worker, *Entry) error) error {
	root := x.view.Entries[0]
	root.Mode |= 0o300
	w := <-x.workers
	defer func() { x.workers <- w }()
	if err := seal(w, &root); err != nil {
		return fmt.Errorf("%q: %w", root.Path, err)
	}
	if err := x.journal.remove(); err != nil {
		return err
	}
	x.journal = nil
	return nil
}

func (x *Extractor) links() error {
	w := <-x.workers
	defer func() { x.workers <- w }()
	from := below{root: w.root} // both directories are needed at once
	defer from.close()
	for i := range x.view.Entries {
		e := &x.view.Entries[i]
		if e.Type != Hardlink {
			continue
		}
		if file, _ := x.view.entry(e.Link); x.opts.Unprivileged && (file.Type == Char || file.Type == Block) {
			x.devices.Add(1)
			continue
		}
		if err := link(&w.below, &from, e); err != nil {
			return fmt.Errorf("%q: link to %q: %w", e.Path, e.Link, err)
		}
	}
	return nil
}

func link(to, from *below, e *Entry) error {
	olddir, oldname, err := from.parent(e.Link)
	if err != nil {
		return err
	}
	dir, name, err := to.parent(e.Path)
	if err != nil {
		return err
	}
	return replace(dir, name, func() error { return unix.Linkat(olddir, oldname, dir, name, 0) })
}

// Missing are the frames of a layer that Finish still needs, in order.
func (x *Extractor) Missing(layer int) (frames []int) {
	l := &x.layers[layer]
	for _, n := range l.needed {
		s := &l.frames[n]
		s.mu.Lock()
		if !s.done {
			frames = append(frames, n)
		}
		s.mu.Unlock()
	}
	return frames
}

// missing says which frames have not come, or nil.
func (x *Extractor) missing() error {
	missing, needed := 0, 0
	first := ""
	for layer := range x.layers {
		needed += len(x.layers[layer].needed)
		frames := x.Missing(layer)
		if missing += len(frames); len(frames) > 0 && first == "" {
			f := x.view.Layers[layer].Frames[frames[0]]
			first = fmt.Sprintf("frame %d at %d+%d of layer %d", frames[0], f.Offset, f.Size, layer)
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
// It begins only when there seems to be room, as far as that can be told: in a
// directory that has nothing in it yet.
func Extract(ctx context.Context, dir string, opts Options, layers ...Layer) (Skipped, error) {
	view, err := ReadView(layers...)
	if err != nil {
		return Skipped{}, err
	}
	if empty(dir) {
		if err := CheckRoom(dir, view); err != nil {
			return Skipped{}, fmt.Errorf("extract: %w", err)
		}
	}
	x, err := NewExtractor(dir, view, opts)
	if err != nil {
		return Skipped{}, err
	}
	err = x.extract(ctx, layers)
	if err == nil {
		err = x.Finish()
	}
	return x.Skipped(), errors.Join(err, x.Close())
}

// extract writes the frames that are missing. Each worker begins at another place,
// where it has directories to itself, and then helps the others.
func (x *Extractor) extract(ctx context.Context, layers []Layer) error {
	var todo []frameID
	for layer := range layers {
		for _, n := range x.Missing(layer) {
			todo = append(todo, frameID{layer, n})
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	parts := cap(x.workers)
	next := make([]atomic.Int64, parts)
	var workers sync.WaitGroup
	for k := range parts {
		workers.Go(func() {
			var b []byte
			for p := range parts {
				part := (k + p) % parts
				begin, end := len(todo)*part/parts, len(todo)*(part+1)/parts
				for ctx.Err() == nil {
					i := begin + int(next[part].Add(1)) - 1
					if i >= end {
						break
					}
					var err error
					if b, err = x.read(layers, todo[i], b); err != nil {
						cancel(err)
					}
				}
			}
		})
	}
	workers.Wait()
	if ctx.Err() != nil {
		return fmt.Errorf("extract: %w", context.Cause(ctx))
	}
	return nil
}

// read reads a frame into b, or what b has to grow to, and writes it to its files.
func (x *Extractor) read(layers []Layer, id frameID, b []byte) ([]byte, error) {
	f := &x.view.Layers[id.layer].Frames[id.frame]
	b = slices.Grow(b[:0], int(f.Size))[:f.Size]
	if n, err := layers[id.layer].Bytes.ReadAt(b, f.Offset); n < len(b) {
		return b, fmt.Errorf("layer %d: frame %d at %d+%d: %w", id.layer, id.frame, f.Offset, f.Size, err)
	}
	return b, x.Frame(id.layer, id.frame, b)
}
