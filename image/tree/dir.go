package tree

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image"
)

// FromDir reads a directory, without x. Sockets are left out: they are of the
// processes that made them. In a tree in use, what vanishes while it is being
// listed is left out, and image.Write tells of a file that has another size later.
func FromDir(dir string, x Excludes) (*Tree, error) {
	t, err := fromDir(dir, x)
	if err != nil {
		return nil, fmt.Errorf("directory %s: %w", dir, err)
	}
	return t, nil
}

func fromDir(dir string, x Excludes) (_ *Tree, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			root.Close()
		}
	}()
	w := walk{
		excludes: x,
		helpers:  make(chan struct{}, 2*runtime.GOMAXPROCS(0)), // one waits for the disk
		inodes:   make(map[[2]uint64]*inode),
	}
	if w.mounts, err = mountsBelow(dir); err != nil {
		return nil, err
	}
	if err := w.root(root); err != nil {
		return nil, err
	}
	es, err := entries(w.names, nil)
	if err != nil {
		return nil, err
	}
	return &Tree{Entries: es, close: root.Close, open: func(e image.Entry) (io.ReadCloser, error) {
		// A file could be a fifo by now, which would wait for a writer.
		f, err := root.OpenFile(e.Path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			f.Close()
			return nil, errors.Join(err, errors.New("is no file any more"))
		}
		return f, nil
	}}, nil
}

func mountsBelow(dir string) (Mounts, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return nil, err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ParseMounts(f, abs)
}

// A walk lists directories, several at once.
type walk struct {
	excludes Excludes
	mounts   Mounts
	helpers  chan struct{} // as many as are at work
	working  sync.WaitGroup

	mu     sync.Mutex
	names  []named
	inodes map[[2]uint64]*inode // by device and number, what has several names
	err    error                // the first
}

func (w *walk) root(root *os.Root) error {
	f, err := root.Open(".")
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	var n *inode
	if err == nil {
		n, err = read(f, newXattrs(f), ".", &st)
	}
	if err != nil {
		f.Close()
		return err
	}
	w.names = append(w.names, named{".", n})
	w.dir(f, ".")
	w.working.Wait()
	return w.err
}

func (w *walk) fail(at string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = fmt.Errorf("%q: %w", at, err)
	}
}

// vanished says whether an error comes of a name that is no longer what it was.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR)
}

// dir lists an open directory and closes it. It goes down by descriptors, since
// paths may be longer than the kernel takes.
func (w *walk) dir(dir *os.File, at string) {
	defer dir.Close()
	list, err := dir.Readdirnames(-1)
	if err != nil && !vanished(err) {
		w.fail(at, err)
		return
	}
	below := ""
	if at != "." {
		below = at + "/"
	}
	x := newXattrs(dir)
	found := make([]named, 0, len(list))
	defer func() {
		w.mu.Lock()
		w.names = append(w.names, found...)
		w.mu.Unlock()
	}()
	for _, name := range list {
		p := below + name
		n, err := w.name(dir, x, name, p)
		if err != nil && !vanished(err) {
			w.fail(p, err)
			return
		}
		if n == nil || err != nil {
			continue
		}
		if n.Type == image.Dir {
			if err := w.sub(dir, name, p); err != nil {
				if vanished(err) {
					continue
				}
				w.fail(p, err)
				return
			}
		}
		found = append(found, named{p, n})
	}
}

// sub goes down into a directory, or has another goroutine do so.
func (w *walk) sub(dir *os.File, name, p string) error {
	if fs, ok := w.mounts[p]; ok && w.excludes.dropMount(fs) {
		return nil
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	sub := os.NewFile(uintptr(fd), p)
	select {
	case w.helpers <- struct{}{}:
		w.working.Go(func() {
			w.dir(sub, p)
			<-w.helpers
		})
	default:
		w.dir(sub, p)
	}
	return nil
}

// name is what a name stands for, nil when it stays out.
func (w *walk) name(dir *os.File, x *xattrs, name, p string) (*inode, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, err
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFSOCK || w.excludes.drop(p, kind == unix.S_IFDIR) {
		return nil, nil
	}
	if st.Nlink == 1 || kind == unix.S_IFDIR {
		return read(dir, x, name, &st)
	}
	w.mu.Lock() // until it is complete: another name may not get less of it
	defer w.mu.Unlock()
	id := [2]uint64{st.Dev, st.Ino}
	n := w.inodes[id]
	if n == nil {
		var err error
		if n, err = read(dir, x, name, &st); n != nil && err == nil {
			w.inodes[id] = n
		}
		return n, err
	}
	return n, nil
}

// read is what a name stands for, beyond st.
func read(dir *os.File, x *xattrs, name string, st *unix.Stat_t) (n *inode, err error) {
	n = &inode{Entry: entry(st)}
	switch n.Type {
	case image.Symlink:
		b := make([]byte, max(st.Size, 255)+1) // some filesystems give no size
		size, err := unix.Readlinkat(int(dir.Fd()), name, b)
		for ; err == nil && size == len(b); size, err = unix.Readlinkat(int(dir.Fd()), name, b) {
			b = make([]byte, 2*len(b))
		}
		if err == unix.EINVAL {
			return nil, nil // none any more
		}
		if err != nil {
			return nil, err
		}
		n.Link = string(b[:size])
	case 0:
		return nil, fmt.Errorf("has the unknown mode %o", st.Mode)
	}
	n.Xattrs, err = x.of(name)
	return n, err
}

func entry(st *unix.Stat_t) image.Entry {
	e := image.Entry{Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, MTime: time.Unix(st.Mtim.Unix())}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Type = image.Dir
	case unix.S_IFREG:
		e.Type, e.Size = image.Regular, st.Size
	case unix.S_IFLNK:
		e.Type = image.Symlink
	case unix.S_IFCHR:
		e.Type = image.Char
	case unix.S_IFBLK:
		e.Type = image.Block
	case unix.S_IFIFO:
		e.Type = image.Fifo
	}
	if e.Type == image.Char || e.Type == image.Block {
		e.Major, e.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	return e
}

// xattrs reads the extended attributes of names in one directory.
type xattrs struct {
	dir string // there is no listxattrat before Linux 6.13; a path through /proc is the same
	buf []byte
}

func newXattrs(dir *os.File) *xattrs {
	return &xattrs{"/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/", make([]byte, 1024)}
}

// of gives the attributes that are part of an image.
func (x *xattrs) of(name string) (map[string]string, error) {
	path := x.dir + name
	list, err := x.sized(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if err == unix.ENOTSUP || err == nil && len(list) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	var attrs map[string]string
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if !keeps(attr) {
			continue
		}
		value, err := x.sized(func(b []byte) (int, error) { return unix.Lgetxattr(path, attr, b) })
		if err == unix.ENODATA {
			continue // gone since
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", attr, err)
		}
		if attrs == nil {
			attrs = make(map[string]string)
		}
		attrs[attr] = string(value)
	}
	return attrs, nil
}

// sized calls f with a buffer that is large enough. What it returns is good
// until the next call.
func (x *xattrs) sized(f func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := f(x.buf)
		if err == unix.ERANGE && len(x.buf) < 1<<20 { // a list or value has at most 64 KiB
			x.buf = make([]byte, 4*len(x.buf))
			continue
		}
		return x.buf[:max(n, 0)], err
	}
}
