package tree_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/tree"
)

// same fails the test unless tr makes the layer that want describes.
func same(t *testing.T, tr *tree.Tree, err error, want image.Descriptor, index *image.Index) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	d, err := image.Write(io.Discard, tr.Entries, tr.Open)
	if err != nil {
		t.Fatal(err)
	}
	if d == want {
		return
	}
	t.Errorf("layer is %+v, want %+v", d, want)
	for i, e := range tr.Entries {
		if i >= len(index.Entries) {
			break
		}
		w := index.Entries[i]
		w.Offset, w.SHA256, e.MTime = 0, [32]byte{}, e.MTime.UTC()
		if !reflect.DeepEqual(e, w) {
			t.Errorf("got  %+v\nwant %+v", e, w)
		}
	}
}

// From memory to disk, from disk and from GNU tar's tarballs of it: always the
// same layer.
func TestEverySourceSameLayer(t *testing.T) {
	imagetest.Root(t)
	nasty := imagetest.Nasty()
	nasty.Entries = slices.DeleteFunc(nasty.Entries, func(e image.Entry) bool {
		return e.Path == "b/z hard to device" // GNU tar makes two devices of it
	})
	layer, want := nasty.Layer(t)
	index := readIndex(t, layer, want)
	dir := t.TempDir()
	if _, err := image.Extract(context.Background(), dir, image.Options{}, image.Layer{Descriptor: want, Bytes: bytes.NewReader(layer)}); err != nil {
		t.Fatal(err)
	}
	socket, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if err := os.Chtimes(dir, imagetest.When, imagetest.When); err != nil {
		t.Fatal(err)
	}
	t.Run("directory", func(t *testing.T) {
		tr, err := tree.FromDir(dir, tree.Builtin())
		same(t, tr, err, want, index)
	})
	tarball := filepath.Join(t.TempDir(), "tar")
	for _, tt := range []struct{ name, tar, compress string }{
		{"plain", "", "cat"},
		{"sparse, gzip", "--sparse", "gzip -1"},
		{"xz", "", "xz -0"},
		{"zstd", "", "zstd -1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tool, _, _ := strings.Cut(tt.compress, " ")
			if _, err := exec.LookPath(tool); err != nil {
				t.Skipf("%v: install it", err)
			}
			// No sorting: the names of a hard link come in the order of the directory.
			cmd := exec.Command("bash", "-ec", `set -o pipefail; tar -c --format=posix --xattrs --xattrs-include='*' --numeric-owner `+
				tt.tar+` -C "$1" . | `+tt.compress+` > "$2"`, "sh", dir, tarball)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			temp := t.TempDir()
			tr, err := tree.FromTar(t.Context(), tarball, temp, tree.Builtin(), nil)
			same(t, tr, err, want, index)
			if left, _ := os.ReadDir(temp); len(left) > 0 {
				t.Fatalf("left behind: %v", left)
			}
		})
	}
	t.Run("our own", func(t *testing.T) {
		if err := os.WriteFile(tarball, layer, 0o644); err != nil {
			t.Fatal(err)
		}
		tr, err := tree.FromTar(t.Context(), tarball, t.TempDir(), tree.Builtin(), nil)
		same(t, tr, err, want, index)
	})
}

// Unpacking takes long enough for a change of mind, and for wanting to know how
// far it is.
func TestUnpackingIsToldAndStops(t *testing.T) {
	plain := write(t, []member{file("a", string(imagetest.Noise(1, 4<<20)))})
	for _, tool := range []string{"gzip -1", "zstd -1", "xz -0"} {
		t.Run(tool, func(t *testing.T) {
			name, _, _ := strings.Cut(tool, " ")
			if _, err := exec.LookPath(name); err != nil {
				t.Skipf("%v: install it", err)
			}
			packed := filepath.Join(t.TempDir(), "packed")
			if out, err := exec.Command("sh", "-ec", tool+` < "$1" > "$2"`, "sh", plain, packed).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			st, err := os.Stat(packed)
			if err != nil {
				t.Fatal(err)
			}
			var told int64
			tr, err := tree.FromTar(t.Context(), packed, t.TempDir(), tree.Excludes{}, func(n int) { told += int64(n) })
			if err != nil {
				t.Fatal(err)
			}
			tr.Close()
			if told != st.Size() {
				t.Errorf("told of %d bytes, the file has %d", told, st.Size())
			}
			ctx, stop := context.WithCancel(t.Context())
			told = 0
			tr, err = tree.FromTar(ctx, packed, t.TempDir(), tree.Excludes{}, func(n int) { told += int64(n); stop() })
			if !errors.Is(err, context.Canceled) {
				if err == nil {
					tr.Close()
				}
				t.Errorf("stopped after the first read: %v", err)
			}
			if told >= st.Size() {
				t.Errorf("read all %d bytes all the same", told)
			}
		})
	}
}

func TestDeepDirectory(t *testing.T) {
	deep := imagetest.New().Deep()
	layer, want := deep.Layer(t)
	dir := t.TempDir()
	if _, err := image.Extract(context.Background(), dir, image.Options{Unprivileged: true}, image.Layer{Descriptor: want, Bytes: bytes.NewReader(layer)}); err != nil {
		t.Fatal(err)
	}
	tr, err := tree.FromDir(dir, tree.Builtin())
	if err != nil {
		t.Fatal(err)
	}
	for i := range tr.Entries { // an unprivileged copy is the caller's
		tr.Entries[i].UID, tr.Entries[i].GID = 0, 0
	}
	same(t, tr, nil, want, readIndex(t, layer, want))
}

func readIndex(t *testing.T, layer []byte, d image.Descriptor) *image.Index {
	t.Helper()
	x, err := image.ReadIndex(bytes.NewReader(layer), d)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

type member struct {
	tar.Header
	content string
}

func write(t testing.TB, members []member) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		m.Size = int64(len(m.content))
		if m.Mode == 0 && m.Typeflag != tar.TypeXGlobalHeader {
			m.Mode = 0o755
		}
		if err := w.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "t.tar")
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func dir(name string) member { return member{Header: tar.Header{Typeflag: tar.TypeDir, Name: name}} }

func file(name, content string) member {
	return member{Header: tar.Header{Typeflag: tar.TypeReg, Name: name}, content: content}
}

func link(kind byte, name, to string) member {
	return member{Header: tar.Header{Typeflag: kind, Name: name, Linkname: to}}
}

// list is a tree in one line.
func list(t *testing.T, tr *tree.Tree) string {
	t.Helper()
	var parts []string
	for _, e := range tr.Entries {
		s := e.Path
		switch e.Type {
		case image.Dir:
			s += "/"
		case image.Regular:
			r, err := tr.Open(e)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			r.Close()
			s += "=" + string(b)
		default:
			s += fmt.Sprintf(" %s %s", e.Type, e.Link)
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, ", ")
}

func TestFromTar(t *testing.T) {
	for _, tt := range []struct {
		name    string
		members []member
		want    string
		err     string
	}{
		{name: "names", members: []member{dir("./"), dir("./a/"), file("./a/b", "1"), file("c//./d", "2")}, want: "./, a/, a/b=1, c/, c/d=2"},
		{name: "last counts", members: []member{file("a", "1"), file("b", "2"), file("a", "3")}, want: "./, a=3, b=2"},
		{name: "last counts, of another kind", members: []member{file("a", "1"), dir("a"), file("a/b", "2")}, want: "./, a/, a/b=2"},
		{name: "link to what was replaced later", members: []member{file("a", "1"), link(tar.TypeLink, "b", "a"), file("a", "2")}, want: "./, a=2, b=1"},
		{name: "link that sorts first", members: []member{file("z", "1"), link(tar.TypeLink, "a", "./z")}, want: "./, a=1, z hard link a"},
		{name: "emptied", members: []member{dir("dev"), file("dev/null", ""), dir("tmp"), file("tmp/x", "1"), dir("var"), dir("var/tmp"), file("var/tmp/x", "1"), file("run", "a file")},
			want: "./, dev/, run=a file, tmp/, var/, var/tmp/, var/tmp/x=1"},
		{name: "link into what is emptied", members: []member{dir("tmp"), file("tmp/x", "1"), link(tar.TypeLink, "y", "tmp/x")}, want: "./, tmp/, y=1"},
		{name: "symlink out is only text", members: []member{link(tar.TypeSymlink, "a", "../../etc")}, want: "./, a symlink ../../etc"},
		{name: "global header", members: []member{{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}}, file("a", "1")}, want: "./, a=1"},

		{name: "absolute", members: []member{file("/a", "")}, err: `"/a": absolute name`},
		{name: "up", members: []member{file("a/../../b", "")}, err: "leads up"},
		{name: "only up", members: []member{dir("..")}, err: "leads up"},
		{name: "through a symlink", members: []member{link(tar.TypeSymlink, "a", "/etc"), file("a/passwd", "")}, err: `"a/passwd": lies below "a", a symlink`},
		{name: "hard link out", members: []member{link(tar.TypeLink, "a", "../b")}, err: "leads up"},
		{name: "hard link to absolute", members: []member{link(tar.TypeLink, "a", "/etc/passwd")}, err: "absolute"},
		{name: "hard link through a symlink", members: []member{link(tar.TypeSymlink, "a", "/etc"), link(tar.TypeLink, "b", "a/passwd")}, err: "no earlier file"},
		{name: "hard link to a directory", members: []member{dir("a"), link(tar.TypeLink, "b", "a")}, err: "no earlier file"},
		{name: "hard link ahead", members: []member{link(tar.TypeLink, "b", "a"), file("a", "")}, err: "no earlier file"},
		{name: "ACL of half an entry", members: []member{{Header: tar.Header{Typeflag: tar.TypeReg, Name: "a", PAXRecords: map[string]string{"SCHILY.acl.access": "user::rwx"}}}}, err: `"a": ACL "user::rwx" has no entry`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tr, err := tree.FromTar(t.Context(), write(t, tt.members), t.TempDir(), tree.Builtin(), nil)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("FromTar: %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := list(t, tr); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if _, err := image.Write(io.Discard, tr.Entries, tr.Open); err != nil {
				t.Error(err)
			}
			if err := tr.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A label survives, in whichever form a tarball has it.
func TestLabels(t *testing.T) {
	const label = "system_u:object_r:etc_t:s0"
	for _, records := range []map[string]string{
		{"RHT.security.selinux": label},
		{"SCHILY.xattr.security.selinux": label + "\x00"},
		{"SCHILY.xattr.security.selinux": label + "\x00", "RHT.security.selinux": "another"},
	} {
		tr, err := tree.FromTar(t.Context(), write(t, []member{{Header: tar.Header{Typeflag: tar.TypeReg, Name: "a", PAXRecords: records}}}), t.TempDir(), tree.Excludes{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		tr.Close()
		if got := tr.Entries[1].Xattrs["security.selinux"]; got != label+"\x00" {
			t.Errorf("%v: label %q", records, got)
		}
	}
}

// What is left out by one name is kept by another.
func TestExcludedByOneName(t *testing.T) {
	d := t.TempDir()
	if err := os.WriteFile(filepath.Join(d, "a"), []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"b", "c"} {
		if err := os.Link(filepath.Join(d, "a"), filepath.Join(d, name)); err != nil {
			t.Fatal(err)
		}
	}
	x := excludes(t, "/a")
	tr, err := tree.FromDir(d, x)
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	tar, err := tree.FromTar(t.Context(), write(t, []member{file("a", "1"), link(tar.TypeLink, "b", "a"), link(tar.TypeLink, "c", "a")}), t.TempDir(), x, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tar.Close()
	for _, tr := range []*tree.Tree{tr, tar} {
		if got, want := list(t, tr), "./, b=1, c hard link b"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func FuzzFromTar(f *testing.F) {
	for _, members := range [][]member{
		{dir("a"), file("a/b", "content"), link(tar.TypeLink, "c", "a/b"), link(tar.TypeSymlink, "d", "a")},
		{{Header: tar.Header{Typeflag: tar.TypeReg, Name: "a", Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}}}},
	} {
		b, err := os.ReadFile(write(f, members))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	name := filepath.Join(f.TempDir(), "t.tar")
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.HasPrefix(b, []byte("\xfd7zXZ")) {
			t.Skip() // that is the xz program's to bear
		}
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
		tr, err := tree.FromTar(t.Context(), name, "", tree.Builtin(), nil)
		if err != nil {
			return
		}
		defer tr.Close()
		for _, e := range tr.Entries {
			if !filepath.IsLocal(e.Path) {
				t.Fatalf("path %q", e.Path)
			}
			if e.Size > 1<<20 {
				return // a sparse member says a lot
			}
		}
		image.Write(io.Discard, tr.Entries, tr.Open) // may refuse a whiteout and such
	})
}
