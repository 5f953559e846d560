package tree_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/tree"
)

func stream(name string, b []byte) tree.Stream {
	return tree.Stream{Name: name, Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
}

func streams(t testing.TB, layers ...[]member) (s []tree.Stream) {
	t.Helper()
	for i, l := range layers {
		b, err := os.ReadFile(write(t, l))
		if err != nil {
			t.Fatal(err)
		}
		s = append(s, stream(string(rune('A'+i)), b))
	}
	return s
}

func TestFromLayers(t *testing.T) {
	lower := []member{dir("d"), file("d/x", "1"), file("d/y", "2"), dir("d/e"), file("d/e/z", "3"), file("f", "4"), link(tar.TypeLink, "g", "f"), link(tar.TypeSymlink, "s", "d"), file("tmp/x", "5")}
	for _, tt := range []struct {
		name  string
		upper []member
		want  string
		err   string
	}{
		{name: "nothing", want: "./, d/, d/e/, d/e/z=3, d/x=1, d/y=2, f=4, g hard link f, s symlink d, tmp/"},
		{name: "replaced and new", upper: []member{file("d/x", "9"), file("n/n", "8")},
			want: "./, d/, d/e/, d/e/z=3, d/x=9, d/y=2, f=4, g hard link f, n/, n/n=8, s symlink d, tmp/"},
		{name: "whiteouts", upper: []member{file("d/.wh.x", ""), file("d/.wh.e", ""), file(".wh.f", ""), file(".wh.nothing", "")},
			want: "./, d/, d/y=2, g=4, s symlink d, tmp/"},
		{name: "whiteout of what the layer has", upper: []member{file("d/x", "9"), file("d/.wh.x", ""), file("d/e/q", "7"), file("d/.wh.e", "")},
			want: "./, d/, d/e/, d/e/q=7, d/x=9, d/y=2, f=4, g hard link f, s symlink d, tmp/"},
		{name: "opaque", upper: []member{dir("d"), file("d/.wh..wh..opq", ""), file("d/n", "7")},
			want: "./, d/, d/n=7, f=4, g hard link f, s symlink d, tmp/"},
		{name: "opaque, after what the layer has", upper: []member{file("d/e/n", "7"), file("d/.wh..wh..opq", "")},
			want: "./, d/, d/e/, d/e/n=7, f=4, g hard link f, s symlink d, tmp/"},
		{name: "opaque root", upper: []member{file(".wh..wh..opq", ""), file("n", "7")}, want: "./, n=7"},
		{name: "AUFS's own", upper: []member{file(".wh..wh.aufs", ""), dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", ""), file(".wh.d", "")}, want: "./, f=4, g hard link f, s symlink d, tmp/"},
		{name: "directory to file", upper: []member{file("d", "7")}, want: "./, d=7, f=4, g hard link f, s symlink d, tmp/"},
		{name: "directory to symlink", upper: []member{link(tar.TypeSymlink, "d", "f")}, want: "./, d symlink f, f=4, g hard link f, s symlink d, tmp/"},
		{name: "file to directory", upper: []member{dir("f"), file("f/n", "7"), dir("s")}, want: "./, d/, d/e/, d/e/z=3, d/x=1, d/y=2, f/, f/n=7, g=4, s/, tmp/"},
		{name: "hard link down", upper: []member{link(tar.TypeLink, "n", "d/x"), file(".wh.d", "")}, want: "./, f=4, g hard link f, n=1, s symlink d, tmp/"},
		{name: "hard link down, to one of two", upper: []member{link(tar.TypeLink, "d/n", "g")}, want: "./, d/, d/e/, d/e/z=3, d/n=4, d/x=1, d/y=2, f hard link d/n, g hard link d/n, s symlink d, tmp/"},

		{name: "through a symlink", upper: []member{file("s/x", "9")}, err: `"s/x": lies below "s", a symlink`},
		{name: "below a file", upper: []member{file("f/x", "9")}, err: `"f/x": lies below "f", a file`},
		{name: "root is a file", upper: []member{file(".", "9")}, err: "root"},
		{name: "whiteout of nothing", upper: []member{file("d/.wh.", "")}, err: `layer B: "d/.wh.": whiteout of ""`},
		{name: "below a whiteout", upper: []member{file(".wh.d/x", "")}, err: `".wh.d/x": lies below a whiteout`},
		{name: "whiteout up", upper: []member{file("d/.wh...", "")}, err: `layer B: "d/.wh...": whiteout of ".."`},
		{name: "hard link out", upper: []member{link(tar.TypeLink, "n", "../etc/passwd")}, err: "leads up"},
		{name: "hard link to a directory below", upper: []member{link(tar.TypeLink, "n", "d")}, err: "no earlier file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			temp := t.TempDir()
			tr, err := tree.FromLayers(temp, tree.Builtin(), streams(t, lower, tt.upper)...)
			if left, _ := os.ReadDir(temp); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("FromLayers: %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer tr.Close()
			if got := list(t, tr); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestLayerThatBreaksOff(t *testing.T) {
	s := streams(t, []member{file("a", "1")})
	s = append(s, tree.Stream{Name: "sha256:b", Open: func() (io.ReadCloser, error) {
		return io.NopCloser(io.MultiReader(strings.NewReader("12345"), errReader{})), nil
	}})
	_, err := tree.FromLayers(t.TempDir(), tree.Excludes{}, s...)
	if err == nil || err.Error() != "layer sha256:b: after 5 bytes: connection lost" {
		t.Error(err)
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("connection lost") }

// Our own layers, read as a stranger's, make the same tree.
func TestOwnLayersAsForeign(t *testing.T) {
	plainTar := func(tr *imagetest.Tree) []byte {
		b, _ := tr.Layer(t)
		z, err := zstd.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		b, err = io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for seed := range uint64(15) {
		r := rand.New(rand.NewPCG(seed, 6))
		m := newModel(r, false)
		before := m.tree()
		m = m.clone()
		m.change(15)
		now := m.tree()
		d, err := tree.Changes(t.Context(), view(t, layer(t, before)), tree.New(now.Entries, now.Open), false)
		if err != nil {
			t.Fatal(err)
		}
		upper := &imagetest.Tree{Entries: d.Entries, Contents: now.Contents}
		tr, err := tree.FromLayers(t.TempDir(), tree.Excludes{}, stream("lower", plainTar(before)), stream("upper", plainTar(upper)))
		if err != nil {
			t.Fatal(err)
		}
		got := view(t, layer(t, &imagetest.Tree{Entries: tr.Entries, Contents: contents(t, tr)}))
		if want := view(t, layer(t, now)); !reflect.DeepEqual(plain(got), plain(want)) {
			t.Fatalf("seed %d: got\n%v, want\n%v", seed, plain(got), plain(want))
		}
		tr.Close()
	}
}

func contents(t *testing.T, tr *tree.Tree) map[string][]byte {
	all := make(map[string][]byte)
	for _, e := range tr.Entries {
		if e.Size == 0 {
			continue
		}
		r, err := tr.Open(e)
		if err != nil {
			t.Fatal(err)
		}
		if all[e.Path], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	return all
}

// The layers are lines, "-" between them: the kind of a member, its name, and what
// it links to.
func FuzzFromLayers(f *testing.F) {
	f.Add("d a\nf a/b\n-\nf a/.wh.b\nh l a/b\ns a/s l")
	f.Add("f x/y/z\n-\nf x/.wh..wh..opq\nf x/y\n-\nd x\nh x/q x/y")
	f.Fuzz(func(t *testing.T, lines string) {
		var layers []tree.Stream
		var b *bytes.Buffer
		var w *tar.Writer
		end := func() {
			w.Close()
			layers = append(layers, stream("l", b.Bytes()))
		}
		begin := func() {
			b = new(bytes.Buffer)
			w = tar.NewWriter(b)
		}
		begin()
		for line := range strings.SplitSeq(lines, "\n") {
			kind, name, _ := strings.Cut(line, " ")
			if kind == "-" {
				end()
				begin()
				continue
			}
			name, to, _ := strings.Cut(name, " ")
			h := tar.Header{Name: name, Linkname: to, Mode: 0o755}
			switch kind {
			case "d":
				h.Typeflag = tar.TypeDir
			case "s":
				h.Typeflag = tar.TypeSymlink
			case "h":
				h.Typeflag = tar.TypeLink
			default:
				h.Typeflag = tar.TypeReg
			}
			if err := w.WriteHeader(&h); err != nil {
				return
			}
		}
		end()
		tr, err := tree.FromLayers("", tree.Excludes{}, layers...)
		if err != nil {
			return
		}
		defer tr.Close()
		for i, e := range tr.Entries {
			if !filepath.IsLocal(e.Path) || strings.HasPrefix(filepath.Base(e.Path), ".wh.") {
				t.Fatalf("path %q", e.Path)
			}
			if i > 0 && image.Compare(tr.Entries[i-1].Path, e.Path) >= 0 {
				t.Fatalf("%q after %q", e.Path, tr.Entries[i-1].Path)
			}
		}
	})
}
