package image_test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"rookery/image"
	"rookery/image/imagetest"
)

// flattened writes trees as layers and their flattened view as a tarball.
func flattened(t *testing.T, file string, trees ...*imagetest.Tree) (*image.View, []image.Layer) {
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
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := v.WriteTar(f, layers...); err != nil {
		t.Fatal(err)
	}
	return v, layers
}

// tar gives the same tree from the tarball as the extractor does.
func TestWriteTar(t *testing.T) {
	imagetest.Root(t)
	file := filepath.Join(t.TempDir(), "flat.tar")
	sparseName := strings.Repeat("AAA.sparse.", 9) + "AAB.sparse.name GNU.sparse.major"
	upper := imagetest.New().Dir("a", sparseName).Whiteout("a/ping").Whiteout("many").
		File("a/big", imagetest.Noise(9, 3<<20)).
		File(sparseName+"/"+sparseName, append(make([]byte, 1<<20), "x\n"...)).
		File("late hole", append([]byte("x"), make([]byte, 70<<10)...))
	_, layers := flattened(t, file, imagetest.Nasty(), upper)

	extracted, unpacked := t.TempDir(), t.TempDir()
	if _, err := image.Extract(t.Context(), extracted, image.Options{}, layers...); err != nil {
		t.Fatal(err)
	}
	tar := exec.Command("tar", "-xpf", file, "-C", unpacked, "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "--warning=no-timestamp")
	if out, err := tar.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	imagetest.Same(t, imagetest.Snapshot(t, unpacked), imagetest.Snapshot(t, extracted))

	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if most := int64(12 << 20); st.Size() > most { // zeros alone are 14 MiB
		t.Errorf("tarball of %d bytes, want at most %d: holes are written", st.Size(), most)
	}
}

// Contents come in any order, in small pieces, and of whatever name.
func TestContents(t *testing.T) {
	lower := imagetest.New().File("big", imagetest.Noise(1, 9<<20)).File("small", []byte("lower")).Link("x", "big")
	upper := imagetest.New().File("small", []byte("upper"))
	v, layers := flattened(t, filepath.Join(t.TempDir(), "flat.tar"), lower, upper)
	c, err := image.NewContents(v, layers...)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := map[string][]byte{".": nil, "big": lower.Contents["big"], "x": lower.Contents["big"], "small": []byte("upper")}
	for i := len(v.Entries) - 1; i >= 0; i-- {
		e := v.Entries[i]
		r, err := c.Open(e)
		if e.Type == image.Dir {
			if err == nil {
				t.Error("the content of a directory was opened")
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, want[e.Path]) {
			t.Errorf("%q: %d bytes, %v, want %d", e.Path, len(got), err, len(want[e.Path]))
		}
	}
}

// A flipped bit is found before it is decompressed.
func TestContentsFlippedBit(t *testing.T) {
	b, d := imagetest.New().File("big", imagetest.Noise(1, 9<<20)).Layer(t)
	layer := image.Layer{Descriptor: d, Bytes: bytes.NewReader(b)}
	v, err := image.ReadView(layer)
	if err != nil {
		t.Fatal(err)
	}
	b[v.Layers[0].Frames[1].Offset+99] ^= 4
	err = v.WriteTar(io.Discard, layer)
	if want := `"big": layer 0: frame 1 at `; err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), "sha256 is") {
		t.Errorf("WriteTar: %v, want %s", err, want)
	}
}
