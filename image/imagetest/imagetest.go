// Package imagetest has trees that are hard to copy, and what it takes to see
// whether they were.
package imagetest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image"
)

// A Tree is a tree in memory.
type Tree struct {
	Entries  []image.Entry
	Contents map[string][]byte // by path
}

// Open opens the content of a file, for image.Write.
func (t *Tree) Open(e image.Entry) (io.ReadCloser, error) {
	b, ok := t.Contents[e.Path]
	if !ok {
		return nil, errors.New("has no content")
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// When is the time of what needs none in particular.
var When = time.Unix(1700000000, 123456789).UTC()

// New makes a tree that has the root only.
func New() *Tree {
	t := &Tree{Contents: make(map[string][]byte)}
	t.Add(image.Entry{Path: ".", Type: image.Dir, Mode: 0o755})
	return t
}

// Add adds an entry; a zero time becomes When.
func (t *Tree) Add(e image.Entry) *Tree {
	if e.MTime.IsZero() {
		e.MTime = When
	}
	t.Entries = append(t.Entries, e)
	return t
}

// Dir adds directories.
func (t *Tree) Dir(paths ...string) *Tree {
	for _, p := range paths {
		t.Add(image.Entry{Path: p, Type: image.Dir, Mode: 0o755})
	}
	return t
}

// File adds a file with mode 0644.
func (t *Tree) File(p string, content []byte) *Tree {
	return t.FileEntry(image.Entry{Path: p, Mode: 0o644}, content)
}

// Link adds a hard link to the file at to.
func (t *Tree) Link(p, to string) *Tree {
	return t.Add(image.Entry{Path: p, Type: image.Hardlink, Link: to})
}

// Whiteout removes p of the layers below.
func (t *Tree) Whiteout(p string) *Tree { return t.Add(image.Entry{Path: p, Type: image.Whiteout}) }

// FileEntry adds a file whose attributes are e's.
func (t *Tree) FileEntry(e image.Entry, content []byte) *Tree {
	e.Type, e.Size = image.Regular, int64(len(content))
	t.Contents[e.Path] = content
	return t.Add(e)
}

// Layer writes t as a layer.
func (t *Tree) Layer(tb testing.TB) ([]byte, image.Descriptor) {
	tb.Helper()
	var b bytes.Buffer
	d, err := image.Write(&b, t.Entries, t.Open)
	if err != nil {
		tb.Fatal(err)
	}
	return b.Bytes(), d
}

// Noise is content that does not compress; equal seeds give equal noise.
func Noise(seed uint64, n int) []byte {
	var key [32]byte
	key[0] = byte(seed)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// Nasty is a tree with everything a root filesystem can hold. Only root can
// extract it completely.
func Nasty() *Tree {
	t := New()
	t.Dir("a", "b", "empty", "etc", "etc/ssl", "etc/ssl/certs", "many")
	t.Add(image.Entry{Path: "sticky", Type: image.Dir, Mode: 0o1777, UID: 7, GID: 8})
	t.Add(image.Entry{Path: "readonly", Type: image.Dir, Mode: 0o555})
	t.Add(image.Entry{Path: "setgid", Type: image.Dir, Mode: 0o2775, GID: 50,
		// Default ACL: user::rwx user:1234:r-x group::rwx mask::rwx other::r-x
		Xattrs: map[string]string{"system.posix_acl_default": acl(7, 5, 7, 7, 5)}})
	t.File("etc/ssl.conf", []byte("sorts between etc/ssl and etc/ssl/certs by bytes"))
	t.File("etc/ssl/certs/ca.pem", []byte("certificate"))
	t.File("empty/file", nil)
	t.FileEntry(image.Entry{Path: "setgid/file", Mode: 0o644, GID: 50}, []byte("no ACL of its own"))
	t.FileEntry(image.Entry{Path: "readonly/file", Mode: 0o444}, []byte("read me"))
	t.FileEntry(image.Entry{Path: "a/sudo", Mode: 0o6755, GID: 4}, []byte("setuid"))
	t.FileEntry(image.Entry{Path: "a/none", UID: 4294967294, GID: 3000000000}, []byte("mode 0, large owners"))
	t.FileEntry(image.Entry{Path: "a/ping", Mode: 0o755, UID: 1, Xattrs: map[string]string{
		"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00" + strings.Repeat("\x00", 12), // cap_net_raw=ep
		"user.empty":          "",
		"user.nul":            "a\x00b\n=",
		"user.a=b%c%3D%25":    "odd",
		"user.origin":         "here",
	}}, []byte("capable"))
	t.FileEntry(image.Entry{Path: "a/acl", Mode: 0o660, Xattrs: map[string]string{
		"system.posix_acl_access": acl(6, 4, 4, 6, 0),
	}}, []byte("for user 1234 too"))
	t.FileEntry(image.Entry{Path: "a/readonly attrs", Mode: 0o400, Xattrs: map[string]string{"user.x": "y"}}, []byte("x"))
	t.FileEntry(image.Entry{Path: "a/old", Mode: 0o644, MTime: time.Unix(-1000, 1).UTC()}, []byte("before 1970"))
	t.FileEntry(image.Entry{Path: "a/late", Mode: 0o644, MTime: time.Unix(1<<33, 999999999).UTC()}, []byte("after 2106"))
	t.FileEntry(image.Entry{Path: "a/whole second", Mode: 0o644, MTime: time.Unix(1<<30, 0).UTC()}, []byte("x"))
	for _, name := range []string{"-dash", "space ", "new\nline", "invalid \xff\xfe utf8", "ünïcödé", "back\\slash", "*", "a b\tc", "...", strings.Repeat("n", 255)} {
		t.File(name, []byte(name))
	}
	long := strings.Repeat("d", 200)
	t.Dir(long, long+"/"+long)
	t.File(long+"/"+long+"/"+strings.Repeat("f", 200), []byte("long"))

	t.Add(image.Entry{Path: "b/link", Type: image.Symlink, Mode: 0o777, Link: "../a/sudo", UID: 3})
	t.Add(image.Entry{Path: "b/dangling", Type: image.Symlink, Mode: 0o777, Link: "/no/such\xffplace\n"})
	t.Add(image.Entry{Path: "b/long link", Type: image.Symlink, Mode: 0o777, Link: strings.Repeat("x/", 1500)})
	t.Add(image.Entry{Path: "b/fifo", Type: image.Fifo, Mode: 0o622})
	t.Add(image.Entry{Path: "b/char", Type: image.Char, Mode: 0o666, Major: 1, Minor: 3})
	t.Add(image.Entry{Path: "b/block", Type: image.Block, Mode: 0o660, Major: 259, Minor: 70000, GID: 6})
	t.Add(image.Entry{Path: "b/z hard", Type: image.Hardlink, Link: "a/ping"})
	t.Add(image.Entry{Path: "b/z hard to big", Type: image.Hardlink, Link: "a/big"})
	t.Add(image.Entry{Path: "b/z hard to symlink", Type: image.Hardlink, Link: "b/link"})
	t.Add(image.Entry{Path: "b/z hard to device", Type: image.Hardlink, Link: "b/char"})

	t.FileEntry(image.Entry{Path: "a/big", Mode: 0o4755, UID: 9, Xattrs: map[string]string{"user.big": "1"}}, Noise(1, 5<<20+17))
	sparse := make([]byte, 9<<20+5)
	copy(sparse[2<<20:], "in the middle")
	copy(sparse[7<<20:], Noise(2, 1<<20))
	t.File("a/sparse", sparse)
	t.File("a/sparse small", append(make([]byte, 64<<10), 'x'))
	t.File("a/zeros", make([]byte, 5<<20))
	t.File("a/zeros small", make([]byte, 8192))
	for i := range 300 {
		t.File(fmt.Sprintf("many/%03d", i), Noise(uint64(i), i*37))
	}
	return t
}

// Deep adds a file whose path is longer than the kernel takes in one call.
func (t *Tree) Deep() *Tree {
	p := strings.Repeat("x", 250)
	for range 20 {
		t.Dir(p)
		p += "/" + strings.Repeat("x", 250)
	}
	return t.File(p, []byte("deep"))
}

// acl is a POSIX ACL with an entry for user 1234, as the kernel's xattr.
func acl(owner, user, group, mask, other byte) string {
	const none = "\xff\xff\xff\xff"
	entry := func(tag, perm byte, id string) string { return string([]byte{tag, 0, perm, 0}) + id }
	return "\x02\x00\x00\x00" + entry(1, owner, none) + entry(2, user, "\xd2\x04\x00\x00") +
		entry(4, group, none) + entry(16, mask, none) + entry(32, other, none)
}

// Lines describes t as Snapshot describes it extracted.
func (t *Tree) Lines() []string {
	byPath := make(map[string]image.Entry)
	links := make(map[string][]string)
	for _, e := range t.Entries {
		byPath[e.Path] = e
		first := e.Path
		if e.Type == image.Hardlink {
			first = e.Link
		}
		links[first] = append(links[first], e.Path)
	}
	var lines []string
	for first, names := range links {
		slices.Sort(names)
		e := byPath[first]
		if e.Type == image.Regular {
			e.SHA256 = sha256.Sum256(t.Contents[first])
		}
		for _, name := range names {
			lines = append(lines, line(name, e, names))
		}
	}
	slices.Sort(lines)
	return lines
}

func line(name string, e image.Entry, names []string) string {
	if e.Type == image.Dir {
		names = nil
	}
	var attrs []string
	for k, v := range e.Xattrs {
		attrs = append(attrs, fmt.Sprintf("%s=%q", k, v))
	}
	slices.Sort(attrs)
	return fmt.Sprintf("%.80q(%d) %s %04o %d:%d %d.%09d size %d to %.40q(%d) dev %d,%d attrs %v names %.99q sha %x",
		name, len(name), e.Type, e.Mode, e.UID, e.GID, e.MTime.Unix(), e.MTime.Nanosecond(), e.Size, e.Link, len(e.Link),
		e.Major, e.Minor, attrs, strings.Join(names, "|"), e.SHA256[:4])
}

// Snapshot describes what lies in dir, one line for each name.
func Snapshot(tb testing.TB, dir string) []string {
	tb.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		tb.Fatal(err)
	}
	defer root.Close()
	found := &snapshot{entries: make(map[string]image.Entry), names: make(map[uint64][]string), inodes: make(map[string]uint64)}
	if err := found.dir(root, "."); err != nil {
		tb.Fatal(err)
	}
	var lines []string
	for name, e := range found.entries {
		names := found.names[found.inodes[name]]
		slices.Sort(names)
		lines = append(lines, line(name, e, names))
	}
	slices.Sort(lines)
	return lines
}

type snapshot struct {
	entries map[string]image.Entry
	inodes  map[string]uint64
	names   map[uint64][]string
}

func (s *snapshot) dir(root *os.Root, at string) error {
	self, err := root.Open(".")
	if err != nil {
		return err
	}
	defer self.Close()
	if at == "." {
		if err := s.name(root, self, ".", "."); err != nil {
			return err
		}
	}
	names, err := self.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		p := path.Join(at, name)
		if err := s.name(root, self, name, p); err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
		if s.entries[p].Type != image.Dir {
			continue
		}
		sub, err := root.OpenRoot(name)
		if err != nil {
			return err
		}
		err = s.dir(sub, p)
		sub.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *snapshot) name(root *os.Root, self *os.File, name, p string) error {
	info, err := root.Lstat(name)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(self.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	e := image.Entry{Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, MTime: info.ModTime().UTC()}
	switch mode := info.Mode(); mode.Type() {
	case 0:
		e.Type, e.Size = image.Regular, info.Size()
		b, err := root.ReadFile(name)
		if err != nil {
			return err
		}
		e.SHA256 = sha256.Sum256(b)
	case fs.ModeDir:
		e.Type = image.Dir
	case fs.ModeSymlink:
		e.Type = image.Symlink
		if e.Link, err = root.Readlink(name); err != nil {
			return err
		}
	case fs.ModeNamedPipe:
		e.Type = image.Fifo
	case fs.ModeDevice | fs.ModeCharDevice:
		e.Type = image.Char
	case fs.ModeDevice:
		e.Type = image.Block
	default:
		return fmt.Errorf("mode %v", mode)
	}
	if e.Type == image.Char || e.Type == image.Block {
		e.Major, e.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	full := "/proc/self/fd/" + strconv.Itoa(int(self.Fd())) + "/" + name
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(full, list)
	if err != nil && err != unix.ENOTSUP {
		return err
	}
	for attr := range strings.SplitSeq(string(list[:max(n, 0)]), "\x00") {
		if attr == "" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(full, attr, value)
		if err != nil {
			return err
		}
		if e.Xattrs == nil {
			e.Xattrs = make(map[string]string)
		}
		e.Xattrs[attr] = string(value[:n])
	}
	s.entries[p] = e
	s.inodes[p] = st.Ino
	s.names[st.Ino] = append(s.names[st.Ino], p)
	return nil
}

// Same fails the test unless the snapshots are the same.
func Same(tb testing.TB, got, want []string) {
	tb.Helper()
	report := func(word string, a, b []string) {
		shown := 0
		for _, l := range a {
			if _, found := slices.BinarySearch(b, l); !found && shown < 10 {
				tb.Errorf("%s %s", word, l)
				shown++
			}
		}
	}
	report("got ", got, want)
	report("want", want, got)
}

// Root skips a test that needs root.
func Root(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("owners, devices and security attributes need root: run go test as root")
	}
}
