package tree

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
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

// A source is the names of a tree and what they stand for. As in a filesystem, a
// hard link is a second name of an inode, and a name that comes again stands for
// something new.
type source map[string]*inode

// A bundle is files that are closed together.
type bundle []*os.File

func (b *bundle) add(f *os.File) { *b = append(*b, f) }

func (b bundle) Close() error {
	var errs []error
	for _, f := range b {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// FromTar reads a tarball, without x: plain, gzip, zstd, or xz (with the xz
// program). A compressed one is unpacked into a nameless file in temp, "" being
// the system's place for those; that much room is needed until Close. Names that
// lead out of the tree are refused. Of names that come twice the last counts.
// While it is unpacked read, when not nil, is told how many of its bytes were read.
func FromTar(ctx context.Context, file, temp string, x Excludes, read func(n int)) (*Tree, error) {
	t, err := fromTar(ctx, file, temp, x, read)
	if err != nil {
		return nil, fmt.Errorf("tarball %s: %w", file, err)
	}
	return t, nil
}

func fromTar(ctx context.Context, file, temp string, x Excludes, read func(n int)) (_ *Tree, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	files := &bundle{f}
	defer func() {
		if err != nil {
			files.Close()
		}
	}()
	plain, err := decompress(ctx, f, temp, read)
	if err != nil {
		return nil, err
	}
	if plain != f {
		files.add(plain)
	}
	sparse := &spool{temp: temp, files: files}
	s, ended, err := readTar(plain, sparse, nil)
	if err != nil {
		return nil, err
	}
	if !ended {
		return nil, errors.New("ends without the mark at a tarball's end: truncated")
	}
	return s.tree(files, x)
}

// A Stream is one layer of a foreign image, a plain tar stream.
type Stream struct {
	Name string // for errors
	Open func() (io.ReadCloser, error)
}

// FromLayers reads the layers of a foreign OCI image, the lowest first, and
// stacks them: the tree that they make, without x. They are copied into nameless
// files in temp, as in FromTar.
func FromLayers(temp string, x Excludes, layers ...Stream) (_ *Tree, err error) {
	files := &bundle{}
	defer func() {
		if err != nil {
			files.Close()
		}
	}()
	sparse := &spool{temp: temp, files: files}
	var s source
	for _, l := range layers {
		if s, err = l.stack(s, sparse); err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.Name, err)
		}
	}
	return s.tree(files, x)
}

func (l Stream) stack(lower source, sparse *spool) (source, error) {
	r, err := l.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	f, err := nameless(sparse.temp)
	if err != nil {
		return nil, err
	}
	sparse.files.add(f)
	if n, err := io.Copy(f, r); err != nil {
		return nil, fmt.Errorf("after %d bytes: %w", n, err)
	}
	upper, _, err := readTar(f, sparse, lower) // some builders set no mark at the end
	if err != nil {
		return nil, err
	}
	return lower.under(upper)
}

// whiteout begins the names that remove something of lower layers; opaque is
// the one that removes all of a directory. Other names that begin as it does are
// AUFS's own (image-spec, layer.md; docker's pkg/archive/whiteouts.go).
const (
	whiteout     = ".wh."
	whiteoutMeta = ".wh..wh."
	opaque       = ".wh..wh..opq"
)

// under puts the layer upper on s.
func (s source) under(upper source) (source, error) {
	gone, emptied := make(map[string]bool), make(map[string]bool)
	for p := range upper {
		name := path.Base(p)
		hidden, ok := strings.CutPrefix(name, whiteout)
		switch above := "/" + dirOf(p); {
		case strings.Contains(above, "/"+whiteoutMeta):
		case strings.Contains(above, "/"+whiteout):
			return nil, fmt.Errorf("%q: lies below a whiteout", p)
		case !ok:
			continue
		case name == opaque:
			emptied[dirOf(p)] = true
		case strings.HasPrefix(name, whiteoutMeta):
		case hidden == "" || hidden == "." || hidden == "..":
			return nil, fmt.Errorf("%q: whiteout of %q", p, hidden)
		default:
			gone[path.Join(dirOf(p), hidden)] = true
		}
		delete(upper, p)
	}
	hides := func(p string) bool {
		if gone[p] {
			return true
		}
		for p != "." {
			p = dirOf(p)
			if n := upper[p]; gone[p] || emptied[p] || n != nil && n.Type != image.Dir {
				return true
			}
		}
		return false
	}
	for p, n := range s {
		if upper[p] == nil && !hides(p) {
			upper[p] = n
		}
	}
	return upper, nil
}

// tree is the tree that s makes, without x. It closes files when it is closed.
func (s source) tree(files *bundle, x Excludes) (*Tree, error) {
	u := &users{source: s, open: (*inode).content, known: make(map[string]map[string]uint32)}
	names := make([]named, 0, len(s))
	for p, n := range s {
		for _, a := range n.acls {
			value, err := a.binary(u)
			if err != nil {
				return nil, fmt.Errorf("%q: %w", p, err)
			}
			if value != "" {
				n.setXattr(a.xattr, value)
			}
		}
		n.acls = nil
		names = append(names, named{p, n})
	}
	es, err := entries(names, x.drop)
	if err != nil {
		return nil, err
	}
	inodes := make(map[string]*inode)
	for _, n := range s {
		if n.place != nil {
			inodes[n.Path] = n
		}
	}
	return &Tree{Entries: es, close: files.Close, open: func(e image.Entry) (io.ReadCloser, error) {
		n := inodes[e.Path]
		if n == nil {
			return nil, errors.New("has no content")
		}
		return io.NopCloser(n.content()), nil
	}}, nil
}

func (n *inode) content() io.Reader {
	if n.place == nil {
		return strings.NewReader("")
	}
	return io.NewSectionReader(n.place.file, n.place.at, n.Size)
}

func (n *inode) setXattr(name, value string) {
	if n.Xattrs == nil {
		n.Xattrs = make(map[string]string)
	}
	n.Xattrs[name] = value
}

// decompress gives a file with the plain tar stream of f: f itself, where it
// is not compressed.
func decompress(ctx context.Context, f *os.File, temp string, read func(n int)) (_ *os.File, err error) {
	var magic [6]byte
	n, err := f.ReadAt(magic[:], 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	packed := stoppable{ctx, counted{f, read}}
	var r io.Reader
	switch m := magic[:n]; {
	case bytes.HasPrefix(m, []byte{0x1f, 0x8b}):
		gz, err := gzip.NewReader(bufio.NewReaderSize(packed, 1<<20))
		if err != nil {
			return nil, err
		}
		r = gz
	case bytes.HasPrefix(m, []byte{0x28, 0xb5, 0x2f, 0xfd}), len(m) > 3 && m[0]&0xf0 == 0x50 && bytes.HasPrefix(m[1:], []byte{0x2a, 0x4d, 0x18}):
		zs, err := zstd.NewReader(packed, zstd.WithDecoderMaxWindow(1<<31)) // as zstd --long=31 needs
		if err != nil {
			return nil, err
		}
		defer zs.Close()
		r = zs
	case bytes.Equal(m, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return unxz(ctx, packed, temp)
	default:
		return f, nil
	}
	out, err := nameless(temp)
	if err != nil {
		return nil, err
	}
	if n, err := io.Copy(out, r); err != nil {
		out.Close()
		return nil, fmt.Errorf("unpack: after %d bytes: %w", n, err)
	}
	return out, nil
}

func unxz(ctx context.Context, packed io.Reader, temp string) (*os.File, error) {
	out, err := nameless(temp)
	if err != nil {
		return nil, err
	}
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, "xz", "--decompress", "--stdout", "--threads=0")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = packed, out, &said
	if err := cmd.Run(); err != nil {
		out.Close()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("unpack: %w", context.Cause(ctx))
		}
		return nil, fmt.Errorf("unpack: xz: %w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	return out, nil
}

// counted tells read, when it is not nil, how many bytes it read.
type counted struct {
	io.Reader
	read func(n int)
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if c.read != nil {
		c.read(n)
	}
	return n, err
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
	temp  string
	files *bundle
	f     *os.File
	end   int64
}

func (s *spool) add(r io.Reader, size int64) (_ *place, err error) {
	if s.f == nil {
		if s.f, err = nameless(s.temp); err != nil {
			return nil, err
		}
		s.files.add(s.f)
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

// blocks is a tarball that says whether the last header read was all zeros,
// which is the mark at the end; archive/tar does not miss it.
type blocks struct {
	*os.File
	zero bool
}

func (b *blocks) Read(p []byte) (int, error) {
	n, err := b.File.Read(p)
	if n > 0 {
		b.zero = n == len(block) && bytes.Equal(p[:n], block[:])
	}
	return n, err
}

var block [512]byte

// readTar lists the members of a plain tarball and where their contents lie, and
// says whether the mark at the end is there. Hard links may name files of lower.
func readTar(f *os.File, sparse *spool, lower source) (s source, ended bool, err error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, false, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, false, err
	}
	s = make(source)
	b := &blocks{File: f}
	r := tar.NewReader(b) // it seeks over contents
	last := "the beginning"
	for {
		h, err := r.Next()
		if err == io.EOF {
			return s, b.zero, nil
		}
		at, serr := f.Seek(0, io.SeekCurrent)
		if serr != nil {
			return nil, false, serr
		}
		if err != nil {
			return nil, false, fmt.Errorf("at byte %d of %d, after %s: %w", at, end, last, err)
		}
		last = fmt.Sprintf("%q", h.Name)
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // git's comment
		}
		if err := s.add(h, at, end, f, r, sparse, lower); err != nil {
			return nil, false, fmt.Errorf("%q: %w", h.Name, err)
		}
		b.zero = false
	}
}

func (s source) add(h *tar.Header, at, end int64, f *os.File, r io.Reader, sparse *spool, lower source) error {
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
		if n == nil {
			n = lower[target]
		}
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
		xattr, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if xattr = unescapeXattr.Replace(xattr); ok && keeps(xattr) {
			n.setXattr(xattr, value)
		}
	}
	if label := h.PAXRecords["RHT.security.selinux"]; label != "" && n.Xattrs["security.selinux"] == "" { // tar --selinux
		n.setXattr("security.selinux", strings.TrimSuffix(label, "\x00")+"\x00") // as setfilecon writes it
	}
	for key, xattr := range map[string]string{"SCHILY.acl.access": aclAccess, "SCHILY.acl.default": aclDefault} {
		if text, ok := h.PAXRecords[key]; ok && n.Xattrs[xattr] == "" {
			n.acls = append(n.acls, acl{xattr, text})
		}
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

// unescapeXattr reads the name of an attribute that GNU tar wrote.
var unescapeXattr = strings.NewReplacer("%25", "%", "%3D", "=")

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
