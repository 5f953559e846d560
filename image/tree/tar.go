package tree

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"

	"rookery/image"
)

// A place is where a file's content lies.
type place struct {
	file *os.File
	at   int64
}

// FromTar reads a tarball: plain, gzip, zstd, or xz (with the xz program). A
// compressed one is unpacked into a nameless file in temp, "" being the
// system's place for those; that much room is needed until Close. Names that
// lead out of the tree are refused. Of names that come twice the last counts.
func FromTar(file, temp string) (*Tree, error) {
	t, err := fromTar(file, temp)
	if err != nil {
		return nil, fmt.Errorf("tarball %s: %w", file, err)
	}
	return t, nil
}

func fromTar(file, temp string) (_ *Tree, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	open := []*os.File{f}
	closeAll := func() error {
		var errs []error
		for _, f := range open {
			errs = append(errs, f.Close())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			closeAll()
		}
	}()

	plain, err := decompress(f, temp)
	if err != nil {
		return nil, err
	}
	if plain != f {
		open = append(open, plain)
	}
	sparse := &spool{temp: temp}
	s, err := readTar(plain, sparse)
	if sparse.f != nil {
		open = append(open, sparse.f)
	}
	if err != nil {
		return nil, err
	}
	entries, err := s.entries()
	if err != nil {
		return nil, err
	}
	return &Tree{
		Entries: entries,
		files:   s,
		close:   closeAll,
		open: func(n *inode) (io.ReadCloser, error) {
			if n.place == nil {
				return nil, errors.New("has no content")
			}
			return io.NopCloser(io.NewSectionReader(n.place.file, n.place.at, n.Size)), nil
		},
	}, nil
}

// decompress gives a file with the plain tar stream of f: f itself, where it
// is not compressed.
func decompress(f *os.File, temp string) (_ *os.File, err error) {
	var magic [6]byte
	n, err := f.ReadAt(magic[:], 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	var r io.Reader
	switch m := magic[:n]; {
	case bytes.HasPrefix(m, []byte{0x1f, 0x8b}):
		gz, err := gzip.NewReader(bufio.NewReaderSize(f, 1<<20))
		if err != nil {
			return nil, err
		}
		r = gz
	case bytes.HasPrefix(m, []byte{0x28, 0xb5, 0x2f, 0xfd}), len(m) > 3 && m[0]&0xf0 == 0x50 && bytes.HasPrefix(m[1:], []byte{0x2a, 0x4d, 0x18}):
		zs, err := zstd.NewReader(f, zstd.WithDecoderMaxWindow(1<<31)) // as zstd --long=31 needs
		if err != nil {
			return nil, err
		}
		defer zs.Close()
		r = zs
	case bytes.Equal(m, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return unxz(f, temp)
	default:
		return f, nil
	}
	out, err := nameless(temp)
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(out, r); err != nil {
		out.Close()
		return nil, fmt.Errorf("unpack: %w", err)
	}
	return out, nil
}

func unxz(f *os.File, temp string) (*os.File, error) {
	out, err := nameless(temp)
	if err != nil {
		return nil, err
	}
	var said bytes.Buffer
	cmd := exec.Command("xz", "--decompress", "--stdout", "--threads=0")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = f, out, &said
	if err := cmd.Run(); err != nil {
		out.Close()
		return nil, fmt.Errorf("unpack: xz: %w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	return out, nil
}

// nameless makes a file that is gone when it is closed.
func nameless(temp string) (*os.File, error) {
	f, err := os.CreateTemp(temp, "rookery-tar-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// A spool holds the expanded content of sparse members, with their holes.
type spool struct {
	temp string
	f    *os.File
	end  int64
}

func (s *spool) add(r io.Reader, size int64) (_ *place, err error) {
	if s.f == nil {
		if s.f, err = nameless(s.temp); err != nil {
			return nil, err
		}
	}
	p := &place{file: s.f, at: s.end}
	block := make([]byte, 64<<10)
	zeros := make([]byte, len(block))
	for left := size; left > 0; {
		b := block[:min(left, int64(len(block)))]
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		if !bytes.Equal(b, zeros[:len(b)]) {
			if _, err := s.f.WriteAt(b, s.end); err != nil {
				return nil, err
			}
		}
		s.end += int64(len(b))
		left -= int64(len(b))
	}
	return p, s.f.Truncate(s.end)
}

// readTar lists the members of a plain tarball and where their contents lie.
func readTar(f *os.File, sparse *spool) (source, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	s := make(source)
	r := tar.NewReader(f) // it seeks over contents
	for {
		h, err := r.Next()
		if err == io.EOF {
			return s, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // git's comment
		}
		if err := s.add(h, f, r, sparse, end); err != nil {
			return nil, fmt.Errorf("%q: %w", h.Name, err)
		}
	}
}

func (s source) add(h *tar.Header, f *os.File, r io.Reader, sparse *spool, end int64) error {
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		target, err := clean(h.Linkname)
		if err != nil {
			return fmt.Errorf("hard link to %q: %w", h.Linkname, err)
		}
		n := s[target]
		if n == nil || n.Type == image.Dir {
			return fmt.Errorf("hard link to %q, which is no earlier file of the tarball", h.Linkname)
		}
		s[name] = n
		return nil
	}
	n := &inode{Entry: image.Entry{Path: name, Mode: uint32(h.Mode & 0o7777), MTime: h.ModTime}}
	if n.UID, err = number("uid", int64(h.Uid)); err != nil {
		return err
	}
	if n.GID, err = number("gid", int64(h.Gid)); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		n.Type = image.Dir
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		n.Type, n.Size = image.Regular, h.Size
		if n.Size == 0 {
			break
		}
		if isSparse(h) {
			if n.place, err = sparse.add(r, n.Size); err != nil {
				return err
			}
			break
		}
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		if n.Size > end-at {
			return fmt.Errorf("content at %d+%d, tarball ends at %d", at, n.Size, end)
		}
		n.place = &place{file: f, at: at}
	case tar.TypeSymlink:
		n.Type, n.Link = image.Symlink, h.Linkname
	case tar.TypeChar, tar.TypeBlock:
		n.Type = image.Char
		if h.Typeflag == tar.TypeBlock {
			n.Type = image.Block
		}
		if n.Major, err = number("major", h.Devmajor); err != nil {
			return err
		}
		if n.Minor, err = number("minor", h.Devminor); err != nil {
			return err
		}
	case tar.TypeFifo:
		n.Type = image.Fifo
	default:
		return fmt.Errorf("has the unknown type %q", h.Typeflag)
	}
	for key, value := range h.PAXRecords {
		if strings.HasPrefix(key, "SCHILY.acl.") {
			return errors.New("has an ACL in text form: make the tarball with --xattrs --xattrs-include='*' and without --acls")
		}
		xattr, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok || !keeps(xattr) {
			continue
		}
		if n.Xattrs == nil {
			n.Xattrs = make(map[string]string)
		}
		n.Xattrs[strings.ReplaceAll(xattr, "%3D", "=")] = value
	}
	s[name] = n
	return nil
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// clean is a member's name as the path of an entry.
func clean(name string) (string, error) {
	if name == "" {
		return "", errors.New("empty name")
	}
	if strings.HasPrefix(name, "/") {
		return "", errors.New("absolute name")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", errors.New("name leads up")
		}
	}
	name = path.Clean(name)
	return name, image.CheckPath(name)
}

func number(what string, v int64) (uint32, error) {
	if v < 0 || v > 1<<32-1 {
		return 0, fmt.Errorf("%s %d", what, v)
	}
	return uint32(v), nil
}
