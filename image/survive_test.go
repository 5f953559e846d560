package image_test

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
)

// Labels survive on everything that has them, where no SELinux is loaded too.
func TestSELinuxLabels(t *testing.T) {
	imagetest.Root(t)
	label := func(kind string) map[string]string {
		return map[string]string{"security.selinux": "system_u:object_r:" + kind + ":s0\x00"}
	}
	tree := imagetest.New()
	tree.Entries[0].Xattrs = label("root_t")
	tree.Add(image.Entry{Path: "d", Type: image.Dir, Mode: 0o755, Xattrs: label("etc_t")})
	tree.FileEntry(image.Entry{Path: "d/shadow", Xattrs: label("shadow_t")}, []byte("secret"))
	tree.FileEntry(image.Entry{Path: "d/large", Mode: 0o444, UID: 5, Xattrs: label("usr_t")}, imagetest.Noise(1, 9<<20))
	tree.Add(image.Entry{Path: "d/link", Type: image.Symlink, Link: "shadow", Mode: 0o777, Xattrs: label("lnk_t")})
	tree.Add(image.Entry{Path: "d/fifo", Type: image.Fifo, Mode: 0o600, Xattrs: label("initctl_t")})
	layer, d := tree.Layer(t)
	dir := t.TempDir()
	extract(t, dir, layer, d)
	imagetest.Same(t, imagetest.Snapshot(t, dir), tree.Lines())
}

// An ACL that a directory of the target has gives nobody more than the entry
// that takes its place, and nothing to what is made in it.
func TestACLsOfTargetGo(t *testing.T) {
	imagetest.Root(t)
	dir := t.TempDir()
	acl := ""
	for _, e := range imagetest.Nasty().Entries {
		acl = cmp.Or(acl, e.Xattrs["system.posix_acl_default"])
	}
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "d"} {
		for _, kind := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
			if err := unix.Setxattr(filepath.Join(dir, name), kind, []byte(acl), 0); err != nil {
				t.Skipf("%s: %v: set TMPDIR to a filesystem with ACLs", kind, err)
			}
		}
	}
	tree := imagetest.New().Dir("d").Dir("d/e").File("d/f", []byte("f"))
	layer, d := tree.Layer(t)
	extract(t, dir, layer, d)
	imagetest.Same(t, imagetest.Snapshot(t, dir), tree.Lines())
}

// The names that are left of a file after several layers are one file still,
// with the content of its own layer.
func TestHardLinksAcrossLayers(t *testing.T) {
	large := imagetest.Noise(1, 9<<20)
	lower := imagetest.New().Dir("d").File("a", large).Link("b", "a").Link("d/c", "a").File("e", []byte("e")).Link("f", "e")
	upper := imagetest.New().Whiteout("a").File("e", []byte("new"))
	var layers []image.Layer
	for _, tree := range []*imagetest.Tree{imagetest.New(), lower, upper} {
		b, d := tree.Layer(t)
		layers = append(layers, image.Layer{Descriptor: d, Bytes: bytes.NewReader(b)})
	}
	dir := t.TempDir()
	if _, err := image.Extract(t.Context(), dir, image.Options{Unprivileged: true}, layers...); err != nil {
		t.Fatal(err)
	}
	inode := make(map[string]unix.Stat_t)
	for _, name := range []string{"b", "d/c", "e", "f"} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		inode[name] = st
	}
	if b, c := inode["b"], inode["d/c"]; b.Ino != c.Ino || b.Nlink != 2 || inode["e"].Ino == inode["f"].Ino || inode["f"].Nlink != 1 {
		t.Errorf("%+v", inode)
	}
	for name, want := range map[string][]byte{"b": large, "e": []byte("new"), "f": []byte("e")} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// A file of 9 GiB with a few bytes at its ends takes a few blocks. Its layer is
// made by hand: to hash such a file takes longer than to extract it.
func TestHugeSparseFile(t *testing.T) {
	unraced(t)
	const size, plain = 9 << 30, 16 << 20
	x := &image.Index{Entries: imagetest.New().Add(image.Entry{Path: "huge", Type: image.Regular, Mode: 0o600, Size: size}).Entries}
	zeros := image.FrameOf(make([]byte, plain))
	ends := make([]byte, plain)
	copy(ends, "begins")
	copy(ends[plain-4:], "ends")
	data := image.FrameOf(ends)
	at := int64(0)
	of := func(n int) []byte {
		if n == 0 || n == size/plain-1 {
			return data
		}
		return zeros
	}
	for n := range size / plain {
		b := of(n)
		x.Frames = append(x.Frames, image.Frame{Offset: at, Size: int64(len(b)), Plain: int64(n) * plain, PlainSize: plain, SHA256: sha256.Sum256(b)})
		at += int64(len(b))
	}
	dir := t.TempDir()
	v := view(t, x)
	if bytes, inodes := v.Room(4096); bytes > 100<<20 || inodes != 2 {
		t.Errorf("takes %d bytes and %d inodes", bytes, inodes)
	}
	e, err := image.NewExtractor(dir, v, image.Options{Unprivileged: true})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for n := range x.Frames {
		if err := e.Frame(0, n, of(n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Finish(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dir, "huge"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Size != size || st.Blocks*512 > 64<<10 {
		t.Errorf("%d bytes in %d on disk, %v", st.Size, st.Blocks*512, err)
	}
	for at, want := range map[int64]string{0: "begins\x00", plain - 4: "ends\x00", size / 2: "\x00\x00", size - plain: "begins", size - 5: "\x00ends"} {
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, at); err != nil && err != io.EOF || string(got) != want {
			t.Errorf("at %d: %q, %v, want %q", at, got, err, want)
		}
	}
}
