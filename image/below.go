package image

import (
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// below opens directories under a root, one component at a time and never
// through a symlink, so that a checked path cannot lead out of it whatever
// lies there. It keeps the directories on the way to the last one open, since
// neighbours come together.
type below struct {
	root int // not its own to close
	open []opened
}

type opened struct {
	path string
	fd   int
}

// deepest is how many directories stay open at a time. A path may have
// thousands.
const deepest = 32

// dir gives an O_PATH descriptor of a directory, good until the next call.
func (b *below) dir(path string) (int, error) {
	if path == "." {
		return b.root, nil
	}
	for n := len(b.open); n > 0; n = len(b.open) {
		last := b.open[n-1]
		if last.path == path {
			return last.fd, nil
		}
		if len(path) > len(last.path) && path[len(last.path)] == '/' && strings.HasPrefix(path, last.path) {
			break
		}
		b.pop()
	}
	for {
		at, begin := b.root, 0
		if n := len(b.open); n > 0 {
			at, begin = b.open[n-1].fd, len(b.open[n-1].path)+1
		}
		end := len(path)
		if i := strings.IndexByte(path[begin:], '/'); i >= 0 {
			end = begin + i
		}
		fd, err := openat(at, path[begin:end], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return -1, err
		}
		if len(b.open) == deepest {
			b.pop()
		}
		b.open = append(b.open, opened{path[:end], fd})
		if end == len(path) {
			return fd, nil
		}
	}
}

func (b *below) pop() {
	last := len(b.open) - 1
	unix.Close(b.open[last].fd)
	b.open = b.open[:last]
}

// parent gives the directory that holds path, and path's name in it.
func (b *below) parent(path string) (fd int, name string, err error) {
	dir, name := split(path)
	fd, err = b.dir(dir)
	return fd, name, err
}

func (b *below) close() {
	for len(b.open) > 0 {
		b.pop()
	}
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

// proc is another name of what is open as fd.
func proc(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// chmod does not follow symlinks.
func chmod(dir int, name string, mode uint32) error {
	err := unix.Fchmodat(dir, name, mode, unix.AT_SYMLINK_NOFOLLOW)
	if err != unix.EOPNOTSUPP { // before Linux 6.6
		return err
	}
	fd, err := openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	return closed(fd, unix.Fchmodat(unix.AT_FDCWD, proc(fd), mode, 0))
}

// setTimes sets both times of what is open as fd or, when that is -1, of name.
func setTimes(dir int, name string, fd int, t unix.Timespec) error {
	times := []unix.Timespec{t, t}
	if fd < 0 {
		return unix.UtimesNanoAt(dir, name, times, unix.AT_SYMLINK_NOFOLLOW)
	}
	// A name of nil means the descriptor itself (utimensat(2)); there is no wrapper for that.
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&times[0])), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
