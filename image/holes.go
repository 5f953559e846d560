package image

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// withoutHoles reads what r reads, and where r is a large file, its holes
// without the kernel: through it they cost more than their hash.
func withoutHoles(r io.Reader, size int64) io.Reader {
	if f, ok := r.(*os.File); ok && size >= frameSize {
		return &holes{file: f}
	}
	return r
}

// holes is a reader of a file from its beginning.
type holes struct {
	file     *os.File
	at       int64
	data     int64 // where the next data begins, at or after at
	dataEnd  int64 // and where it ends; nothing is known beyond
	notAsked bool  // the filesystem does not know holes
}

func (h *holes) Read(p []byte) (int, error) {
	if h.at >= h.dataEnd && !h.notAsked {
		if err := h.ask(); err != nil {
			return 0, err
		}
	}
	if h.at < h.data {
		n := min(int64(len(p)), h.data-h.at)
		clear(p[:n])
		h.at += n
		return int(n), nil
	}
	if !h.notAsked {
		p = p[:min(int64(len(p)), h.dataEnd-h.at)]
	}
	n, err := h.file.ReadAt(p, h.at)
	h.at += int64(n)
	return n, err
}

// ask finds the next data from at on.
func (h *holes) ask() error {
	data, err := seek(h.file, h.at, unix.SEEK_DATA)
	if err == unix.ENXIO { // nothing but a hole, or nothing
		st, err := h.file.Stat()
		if err != nil {
			return err
		}
		if st.Size() <= h.at {
			return io.EOF
		}
		h.data, h.dataEnd = st.Size(), st.Size()
		return nil
	}
	end := int64(0)
	if err == nil {
		end, err = seek(h.file, data, unix.SEEK_HOLE)
	}
	if err != nil {
		h.notAsked, h.data = true, h.at
		return nil
	}
	h.data, h.dataEnd = data, end
	return nil
}

func seek(f *os.File, off int64, whence int) (at int64, err error) {
	err = retry(func() error {
		at, err = unix.Seek(int(f.Fd()), off, whence)
		return err
	})
	return at, err
}
