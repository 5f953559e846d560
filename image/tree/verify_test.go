package tree_test

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/tree"
)

// Contents of the same size and time are no way around it.
func TestVerify(t *testing.T) {
	source := imagetest.New().Dir("etc").File("etc/motd", []byte("one\n")).File("etc/passwd", []byte("root\n")).Link("etc/passwd-", "etc/passwd")
	view, dir := written(t, source)
	excludes, err := tree.ParseExcludes("test", strings.NewReader("/.work"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, ".work"), 0o700); err != nil {
		t.Fatal(err)
	}
	back := func() error { return os.Chtimes(dir, imagetest.When, imagetest.When) }
	if err := back(); err != nil {
		t.Fatal(err)
	}
	verify := func(want ...tree.Change) {
		t.Helper()
		got, err := tree.Verify(t.Context(), view, dir, excludes)
		if err != nil || len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
			t.Errorf("Verify: %+v, %v, want %+v", got, err, want)
		}
	}
	verify()
	motd := filepath.Join(dir, "etc/motd")
	if err := errors.Join(os.WriteFile(motd, []byte("two\n"), 0), os.Chtimes(motd, imagetest.When, imagetest.When)); err != nil {
		t.Fatal(err)
	}
	verify(tree.Change{Path: "etc/motd", Kind: "changed", What: []string{"content"}, Bytes: 4})
	if err := errors.Join(os.Remove(motd), os.WriteFile(filepath.Join(dir, "new"), []byte("x"), 0o644), back(),
		os.Chtimes(filepath.Join(dir, "etc"), imagetest.When, imagetest.When)); err != nil {
		t.Fatal(err)
	}
	verify(tree.Change{Path: "etc/motd", Kind: "removed", Bytes: 4}, tree.Change{Path: "new", Kind: "added", Bytes: 1})
}

// written is a tree as a view and as files.
func written(t *testing.T, source *imagetest.Tree) (*image.View, string) {
	t.Helper()
	imagetest.Root(t)
	b, d := source.Layer(t)
	layer := image.Layer{Descriptor: d, Bytes: strings.NewReader(string(b))}
	view, err := image.ReadView(layer)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := image.Extract(t.Context(), dir, image.Options{}, layer); err != nil {
		t.Fatal(err)
	}
	return view, dir
}
