package image

import (
	"strings"

	"golang.org/x/sys/unix"
)

// below opens directories under a root, one component at a time and never
// through a symlink, so that a checked path cannot lead out of it whatever
// lies there. It keeps the last directory open: neighbours come together.
type below struct {
	root int // not its own to close
	path string
	fd   int // of path, unless that is the root
}

func newBelow(root int) *below { return &below{root: root, path: "."} }

// dir gives an O_PATH descriptor of a directory, good until the next call.
func (b *below) dir(path string) (int, error) {
	switch path {
	case ".":
		return b.root, nil
	case b.path:
		return b.fd, nil
	}
	fd, rest := b.root, path
	if deeper, ok := strings.CutPrefix(path, b.path+"/"); ok && b.path != "." {
		fd, rest = b.fd, deeper
	}
	for name := range strings.SplitSeq(rest, "/") {
		next, err := openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if fd != b.root && fd != b.fd {
			unix.Close(fd)
		}
		if err != nil {
			return -1, err
		}
		fd = next
	}
	b.close()
	b.path, b.fd = path, fd
	return fd, nil
}

// parent gives the directory that holds path, and path's name in it.
func (b *below) parent(path string) (fd int, name string, err error) {
	dir, name := split(path)
	fd, err = b.dir(dir)
	return fd, name, err
}

func (b *below) close() {
	if b.path != "." {
		unix.Close(b.fd)
	}
	b.path, b.fd = ".", 0
}

func openat(dir int, name string, flags int, mode uint32) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		return err
	})
	return fd, err
}

// retry repeats a call that a signal interrupted: the runtime sends them often.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
