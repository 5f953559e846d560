package image_test

import (
	"bytes"
	"strings"
	"testing"

	"rookery/image"
	"rookery/image/imagetest"
)

// stacked writes each tree as a layer and extracts the stack: what is there, a
// name and its content each.
func stacked(t *testing.T, trees ...*imagetest.Tree) string {
	t.Helper()
	var layers []image.Layer
	for _, tree := range trees {
		b, d := tree.Layer(t)
		layers = append(layers, image.Layer{Descriptor: d, Bytes: bytes.NewReader(b)})
	}
	v, err := image.ReadView(layers...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.Extract(t.Context(), t.TempDir(), image.Options{Unprivileged: true}, layers...); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range v.Entries[1:] {
		s := e.Path
		switch e.Type {
		case image.Dir:
			s += "/"
		case image.Hardlink, image.Symlink:
			s += "->" + e.Link
		default:
			s += strings.Repeat("+", e.Layer)
		}
		names = append(names, s)
	}
	return strings.Join(names, " ")
}

func TestFlatten(t *testing.T) {
	lower := func() *imagetest.Tree {
		return imagetest.New().Dir("d").File("d/x", []byte("x")).Dir("d/sub").File("d/sub/y", []byte("y")).
			File("d-later", []byte("l")).File("f", []byte("f")).Link("g", "f").Link("h", "f")
	}
	for _, tt := range []struct {
		name  string
		upper *imagetest.Tree
		want  string
	}{
		{"nothing", imagetest.New(), "d/ d/sub/ d/sub/y d/x d-later f g->f h->f"},
		{"one more", imagetest.New().Dir("d").File("d/z", []byte("z")), "d/ d/sub/ d/sub/y d/x d/z+ d-later f g->f h->f"},
		{"whiteout of a tree", imagetest.New().Whiteout("d"), "d-later f g->f h->f"},
		{"whiteout below", imagetest.New().Dir("d").Whiteout("d/sub"), "d/ d/x d-later f g->f h->f"},
		{"whiteout of nothing", imagetest.New().Whiteout("q"), "d/ d/sub/ d/sub/y d/x d-later f g->f h->f"},
		{"file on a directory", imagetest.New().File("d", []byte("!")), "d+ d-later f g->f h->f"},
		{"directory on a file", imagetest.New().Dir("d-later").File("d-later/a", []byte("!")), "d/ d/sub/ d/sub/y d/x d-later/ d-later/a+ f g->f h->f"},
		{"first name replaced", imagetest.New().File("f", []byte("!")), "d/ d/sub/ d/sub/y d/x d-later f+ g h->g"},
		{"first name gone", imagetest.New().Whiteout("f"), "d/ d/sub/ d/sub/y d/x d-later g h->g"},
		{"only the last name left", imagetest.New().Whiteout("f").Whiteout("g"), "d/ d/sub/ d/sub/y d/x d-later h"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := stacked(t, lower(), tt.upper); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
	t.Run("three", func(t *testing.T) {
		got := stacked(t, lower(), imagetest.New().Whiteout("d").Whiteout("f"), imagetest.New().Dir("d").File("d/x", []byte("new")))
		if want := "d/ d/x++ d-later g h->g"; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	})
}

// Frames of which nothing is to be seen are not asked for.
func TestNeeded(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	_, lower := index(t, imagetest.New().File("a", big).File("b", big))
	_, upper := index(t, imagetest.New().File("a", []byte("small")))
	v, err := image.Flatten(lower, upper)
	if err != nil {
		t.Fatal(err)
	}
	needed := v.Needed(0)
	e, _ := v.Find("b")
	for _, n := range needed {
		if f := lower.Frames[n]; f.Plain+f.PlainSize <= e.Offset {
			t.Errorf("frame %d is needed and ends before b", n)
		}
	}
	if len(needed) == 0 || len(needed) > len(lower.Frames)/2+1 || len(v.Needed(1)) != 1 {
		t.Errorf("needed: %v of %d, and %v", needed, len(lower.Frames), v.Needed(1))
	}
}

func index(t *testing.T, tree *imagetest.Tree) ([]byte, *image.Index) {
	t.Helper()
	b, d := tree.Layer(t)
	x, err := image.ReadIndex(bytes.NewReader(b), d)
	if err != nil {
		t.Fatal(err)
	}
	return b, x
}

// The view of one layer is without its whiteouts too: there is nothing below.
func TestFlattenOne(t *testing.T) {
	if got := stacked(t, imagetest.New().File("a", []byte("a")).Whiteout("b")); got != "a" {
		t.Errorf("got %s, want a", got)
	}
}
