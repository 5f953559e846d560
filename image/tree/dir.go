package tree

import (
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image"
)

// FromDir reads a directory that stays as it is until Close. Sockets are left
// out: they are of the processes that made them.
func FromDir(dir string) (*Tree, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	w := walk{source: make(source), inodes: make(map[[2]uint64]*inode)}
	if err := w.root(root); err != nil {
		root.Close()
		return nil, fmt.Errorf("directory %s: %w", dir, err)
	}
	entries, err := w.source.entries()
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("directory %s: %w", dir, err)
	}
	return &Tree{
		Entries: entries,
		files:   w.source,
		close:   root.Close,
		open: func(n *inode) (io.ReadCloser, error) {
			return root.OpenFile(n.Path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
		},
	}, nil
}

type walk struct {
	source source
	inodes map[[2]uint64]*inode // by device and number, what has several names
}

func (w *walk) root(root *os.Root) error {
	f, err := root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := w.name(f, ".", "."); err != nil {
		return err
	}
	return w.dir(f, ".")
}

// dir lists an open directory. It goes down by descriptors, since paths may be
// longer than the kernel takes.
func (w *walk) dir(dir *os.File, at string) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("%q: %w", at, err)
	}
	for _, name := range names {
		p := path.Join(at, name)
		if excluded(p) {
			continue
		}
		if err := w.name(dir, name, p); err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
		if n := w.source[p]; n == nil || n.Type != image.Dir {
			continue
		}
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
		sub := os.NewFile(uintptr(fd), p)
		err = w.dir(sub, p)
		sub.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// name notes what name in dir stands for.
func (w *walk) name(dir *os.File, name, p string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	id := [2]uint64{st.Dev, st.Ino}
	if n := w.inodes[id]; n != nil {
		w.source[p] = n
		return nil
	}
	n := &inode{Entry: image.Entry{
		Path: p, Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, MTime: time.Unix(st.Mtim.Unix()),
	}}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.Type = image.Dir
	case unix.S_IFREG:
		n.Type, n.Size = image.Regular, st.Size
	case unix.S_IFLNK:
		n.Type = image.Symlink
		b := make([]byte, unix.PathMax)
		size, err := unix.Readlinkat(int(dir.Fd()), name, b)
		if err != nil {
			return err
		}
		n.Link = string(b[:size])
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Type = image.Char
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			n.Type = image.Block
		}
		n.Major, n.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	case unix.S_IFIFO:
		n.Type = image.Fifo
	case unix.S_IFSOCK:
		return nil
	default:
		return fmt.Errorf("has the unknown mode %o", st.Mode)
	}
	var err error
	if n.Xattrs, err = xattrs("/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + name); err != nil {
		return err
	}
	if st.Nlink > 1 && n.Type != image.Dir {
		w.inodes[id] = n
	}
	w.source[p] = n
	return nil
}

// xattrs reads the attributes that are part of an image.
func xattrs(path string) (map[string]string, error) {
	list, err := sized(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if err == unix.ENOTSUP || err == nil && len(list) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	var attrs map[string]string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if !keeps(name) {
			continue
		}
		value, err := sized(func(b []byte) (int, error) { return unix.Lgetxattr(path, name, b) })
		if err == unix.ENODATA {
			continue // gone since
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if attrs == nil {
			attrs = make(map[string]string)
		}
		attrs[name] = string(value)
	}
	return attrs, nil
}

// sized asks for a length, and then for as much.
func sized(f func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := f(nil)
		if n == 0 || err != nil {
			return nil, err
		}
		b := make([]byte, n)
		n, err = f(b)
		if err == unix.ERANGE {
			continue // it grew
		}
		return b[:max(n, 0)], err
	}
}
