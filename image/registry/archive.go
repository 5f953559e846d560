package registry

import (
	"archive/tar"
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
)

// An archive is a tar file whose members are read where they lie.
type archive struct {
	file    *os.File
	members map[string]member // by clean name
}

type member struct {
	at, size int64
	link     string // of a link: the clean name of what it is a name of
}

// maxMembers bounds the members of an archive: a layout of a thousand images
// has a few thousand.
const maxMembers = 1 << 16

// openArchive lists a tar file. A compressed one is unpacked into a nameless
// file first.
func openArchive(name string) (_ *archive, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	r, packed, err := plain(bufio.NewReader(f))
	if err == nil && packed {
		defer r.Close()
		var tar *os.File
		if tar, err = unpack(r); err == nil {
			f.Close()
			f = tar
		}
	}
	if err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	return listArchive(f)
}

func unpack(r io.Reader) (*os.File, error) {
	f, err := nameless()
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(f, r); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// nameless makes a file that is gone when it is closed.
func nameless() (*os.File, error) {
	f, err := os.CreateTemp("", "rookery-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func listArchive(f *os.File) (*archive, error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, err
	}
	a := &archive{file: f, members: make(map[string]member)}
	for r := tar.NewReader(f); ; { // it seeks over contents
		h, err := r.Next()
		if err == io.EOF {
			return a, nil
		}
		if err != nil {
			return nil, err
		}
		if len(a.members) == maxMembers {
			return nil, fmt.Errorf("has more than %d members", maxMembers)
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			if h.Size > end-at {
				return nil, fmt.Errorf("%q at %d+%d, the file ends at %d", name, at, h.Size, end)
			}
			a.members[name] = member{at: at, size: h.Size}
		case tar.TypeSymlink: // docker and podman save a layer once
			a.members[name] = member{link: path.Join(path.Dir(name), h.Linkname)}
		case tar.TypeLink:
			a.members[name] = member{link: path.Clean(h.Linkname)}
		}
	}
}

func (a *archive) Close() error { return a.file.Close() }

// member opens a member.
func (a *archive) member(name string) (*io.SectionReader, error) {
	at := path.Clean(name)
	for range 8 {
		m, ok := a.members[at]
		if !ok {
			return nil, fmt.Errorf("%q is not in it", name)
		}
		if m.link == "" {
			return io.NewSectionReader(a.file, m.at, m.size), nil
		}
		at = m.link
	}
	return nil, fmt.Errorf("%q is a link to a link and so on", name)
}
