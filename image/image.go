// Package image is the layer format: it writes a tree as a layer, reads a
// layer's index, and extracts the layer's frames in any order.
//
// A layer is a PAX tar stream in independent zstd frames, followed by two
// skippable frames: the index and the standard zstd seek table. zstd and tar
// see a plain tar.zst; the index is what lets a frame be written to its files
// alone, before the others are there.
package image

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"rookery/wire"
)

// An Entry is one name in a tree and what it stands for.
type Entry struct {
	Path     string // clean and relative; "." is the root. May hold any bytes but NUL
	Type     Type
	Mode     uint32 // permissions with setuid, setgid and sticky: 07777
	UID, GID uint32
	MTime    time.Time         // with nanoseconds
	Size     int64             // Regular: bytes of content
	Link     string            // Symlink: its text. Hardlink: the Path it is another name of
	Xattrs   map[string]string // by full name, "user.origin"
	Major    uint32            // Char, Block
	Minor    uint32
	Offset   int64    // Regular: where its content begins in the plain tar stream; Write sets it
	SHA256   [32]byte // Regular: of its content; Write sets it
	Layer    int      // in a View: which of its Layers the entry is of
}

// A Type is what an entry is.
type Type byte

// The types of entries. A Hardlink is a further name of an entry that comes
// earlier; it has only a Path and a Link, all else is the other entry's. A
// Whiteout says that a Path of the layers below is gone, with all below it.
const (
	Dir Type = iota + 1
	Regular
	Symlink
	Hardlink
	Char
	Block
	Fifo
	Whiteout
)

func (t Type) String() string {
	names := []string{"directory", "file", "symlink", "hard link", "character device", "block device", "fifo", "whiteout"}
	if t < Dir || int(t) > len(names) {
		return fmt.Sprintf("type %d", byte(t))
	}
	return names[t-1]
}

// A Frame is an independent zstd frame of a layer.
type Frame struct {
	Offset, Size     int64    // compressed, in the layer
	Plain, PlainSize int64    // in the plain tar stream
	SHA256           [32]byte // of the compressed bytes
}

// An Index is a layer's table of contents. Entries are in the order of their
// paths, parents before children; frames are in the order of the stream.
type Index struct {
	Entries []Entry
	Frames  []Frame

	parsed bool // by ParseIndex, and so checked
}

// A Descriptor is what a manifest says of a layer.
type Descriptor struct {
	Digest      wire.Digest // of the layer
	Size        int64       // of the layer, bytes
	DiffID      wire.Digest // of the plain tar stream; "" where only the manifest is known
	IndexOffset int64       // the skippable frame that holds the index
	IndexSize   int64
	IndexDigest wire.Digest
}

// Bounds of what is read. They leave room for trees of four million names and
// layers of 16 TiB.
const (
	MaxIndex = 64 << 20 // bytes of the index in the layer
	MaxPlain = 16 << 20 // bytes of the tar stream in one frame

	maxCompressed = 2 * MaxPlain
	maxIndexPlain = 512 << 20
	maxEntries    = 4 << 20
	maxFrames     = 4 << 20
	maxStream     = 1 << 50
	maxPath       = 64 << 10
	maxName       = 255  // NAME_MAX
	maxLink       = 4095 // PATH_MAX without its NUL
	maxXattrs     = 256
	maxXattr      = 64 << 10 // XATTR_SIZE_MAX
)

// Check says what is wrong with d, or nil.
func (d Descriptor) Check() error {
	if err := d.Digest.Check(); err != nil {
		return err
	}
	if err := d.IndexDigest.Check(); err != nil {
		return fmt.Errorf("index: %w", err)
	}
	if d.DiffID != "" {
		if err := d.DiffID.Check(); err != nil {
			return fmt.Errorf("diff ID: %w", err)
		}
	}
	if d.Size <= 0 || d.Size > maxStream {
		return fmt.Errorf("layer of %d bytes", d.Size)
	}
	if d.IndexSize <= 0 || d.IndexSize > MaxIndex {
		return fmt.Errorf("index of %d bytes, want 1 to %d", d.IndexSize, MaxIndex)
	}
	if d.IndexOffset < 0 || d.IndexOffset > d.Size-d.IndexSize {
		return fmt.Errorf("index at %d+%d, layer has %d bytes", d.IndexOffset, d.IndexSize, d.Size)
	}
	return nil
}

// ReadIndex reads, verifies and parses the index of the layer that d describes.
func ReadIndex(layer io.ReaderAt, d Descriptor) (*Index, error) {
	if err := d.Check(); err != nil {
		return nil, err
	}
	b := make([]byte, d.IndexSize)
	if n, err := layer.ReadAt(b, d.IndexOffset); n < len(b) {
		return nil, fmt.Errorf("index at %d+%d: %w", d.IndexOffset, d.IndexSize, err)
	}
	if err := d.IndexDigest.Verify(b); err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	x, err := ParseIndex(b)
	if err != nil {
		return nil, err
	}
	if err := x.endsAt(d.IndexOffset); err != nil {
		return nil, err
	}
	return x, nil
}

// Compare orders paths as a layer does: the root first, then name by name, so
// that a directory and all below it come together. Tar sets a directory's time
// when it sees the first name outside, and byte order would have "etc/ssl.conf"
// between "etc/ssl" and "etc/ssl/certs".
func Compare(a, b string) int {
	if a == "." || b == "." {
		switch {
		case a == b:
			return 0
		case a == ".":
			return -1
		}
		return 1
	}
	for i := range min(len(a), len(b)) {
		if a[i] == b[i] {
			continue
		}
		if a[i] == '/' {
			return -1
		}
		if b[i] == '/' {
			return 1
		}
		return cmp.Compare(a[i], b[i])
	}
	return cmp.Compare(len(a), len(b))
}

// checkEntries holds what both sides rely on: sorted, no name twice, and every
// parent a directory of the same tree. The last is what makes a path through a
// symlink impossible to say.
func checkEntries(entries []Entry) error {
	if len(entries) == 0 || entries[0].Path != "." || entries[0].Type != Dir {
		return errors.New("tree has no root directory")
	}
	if len(entries) > maxEntries {
		return fmt.Errorf("tree has %d entries, at most %d are read", len(entries), maxEntries)
	}
	dir := "." // is one
	for i := range entries {
		e := &entries[i]
		err := e.check(entries[:i])
		if parent, _ := split(e.Path); err == nil && parent != dir {
			err = checkParent(entries[:i], parent)
			dir = parent
		}
		if err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
		if i > 0 && Compare(entries[i-1].Path, e.Path) >= 0 {
			return fmt.Errorf("%q: comes after %q", e.Path, entries[i-1].Path)
		}
	}
	return nil
}

func checkParent(earlier []Entry, path string) error {
	parent, ok := find(earlier, path)
	if !ok {
		return fmt.Errorf("directory %q is missing", path)
	}
	if parent.Type != Dir {
		return fmt.Errorf("lies below %q, a %s", path, parent.Type)
	}
	return nil
}

// check says what is wrong with e, when earlier are the entries before it.
func (e *Entry) check(earlier []Entry) error {
	if err := CheckPath(e.Path); err != nil {
		return err
	}
	_, name := split(e.Path)
	if strings.HasPrefix(name, whiteoutPrefix) {
		return errors.New("has the name of an OCI whiteout")
	}
	if e.Mode > 0o7777 {
		return fmt.Errorf("mode %o", e.Mode)
	}
	if e.Size < 0 || e.Size > maxStream || e.Size > 0 && e.Type != Regular {
		return fmt.Errorf("%s of size %d", e.Type, e.Size)
	}
	switch e.Type {
	case Dir, Char, Block, Fifo, Regular:
	case Whiteout:
		if e.Path == "." || len(name) > maxName-len(whiteoutPrefix) {
			return fmt.Errorf("whiteout of %.80q, a name of %d bytes", name, len(name))
		}
	case Symlink:
		if e.Link == "" || len(e.Link) > maxLink || strings.IndexByte(e.Link, 0) >= 0 {
			return fmt.Errorf("symlink to %.80q (%d bytes)", e.Link, len(e.Link))
		}
	case Hardlink:
		if file, ok := find(earlier, e.Link); !ok || file.Type == Dir || file.Type == Hardlink || file.Type == Whiteout {
			return fmt.Errorf("hard link to %.80q, which is no earlier file of the tree", e.Link)
		}
	default:
		return e.unknown()
	}
	if len(e.Xattrs) > maxXattrs {
		return fmt.Errorf("%d extended attributes, at most %d are read", len(e.Xattrs), maxXattrs)
	}
	for name, value := range e.Xattrs {
		if name == "" || len(name) > maxName || strings.IndexByte(name, 0) >= 0 || len(value) > maxXattr {
			return fmt.Errorf("extended attribute %.80q of %d bytes", name, len(value))
		}
	}
	return nil
}

// whiteoutPrefix begins the name that a whiteout has in the tar stream
// (image-spec, layer.md).
const whiteoutPrefix = ".wh."

func (e *Entry) unknown() error { return fmt.Errorf("unknown %s", e.Type) }

// CheckPath says what keeps p from being the Path of an entry, or nil.
func CheckPath(p string) error {
	if p == "." {
		return nil
	}
	if len(p) > maxPath {
		return fmt.Errorf("path of %d bytes, at most %d are read", len(p), maxPath)
	}
	if strings.IndexByte(p, 0) >= 0 {
		return errors.New("path holds a NUL")
	}
	for name := range strings.SplitSeq(p, "/") {
		if name == "" || name == "." || name == ".." {
			return errors.New("path is not clean and relative")
		}
		if len(name) > maxName {
			return fmt.Errorf("name of %d bytes, at most %d can be made", len(name), maxName)
		}
	}
	return nil
}

// split gives the directory and the last name of a checked path. The root is
// the name "." in itself.
func split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return ".", path
	}
	return path[:i], path[i+1:]
}

func (x *Index) entry(path string) (Entry, bool) { return find(x.Entries, path) }

// PlainSize is the length of the plain tar stream, in bytes.
func (x *Index) PlainSize() int64 {
	if len(x.Frames) == 0 {
		return 0
	}
	last := x.Frames[len(x.Frames)-1]
	return last.Plain + last.PlainSize
}

// sorted is a copy of entries in the layer's order and in one form: fields
// that mean nothing for a type are empty, so that equal trees give equal bytes.
func sorted(entries []Entry) []Entry {
	es := slices.Clone(entries)
	slices.SortFunc(es, func(a, b Entry) int { return Compare(a.Path, b.Path) })
	for i, e := range es {
		clean := Entry{
			Path: e.Path, Type: e.Type, Mode: e.Mode, UID: e.UID, GID: e.GID,
			MTime: time.Unix(e.MTime.Unix(), int64(e.MTime.Nanosecond())).UTC(), Xattrs: e.Xattrs,
		}
		switch e.Type {
		case Regular:
			clean.Size = e.Size
		case Whiteout:
			clean = Entry{Path: e.Path, Type: e.Type}
		case Symlink:
			clean.Link = e.Link
			clean.Mode = 0o777 // Linux knows no other
		case Hardlink:
			clean = Entry{Path: e.Path, Type: e.Type, Link: e.Link}
		case Char, Block:
			clean.Major, clean.Minor = e.Major, e.Minor
		}
		es[i] = clean
	}
	return es
}
