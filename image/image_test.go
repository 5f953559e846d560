package image_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
)

func extract(t *testing.T, dir string, layer []byte, d image.Descriptor) {
	t.Helper()
	if _, err := image.Extract(context.Background(), dir, image.Options{}, image.Layer{Descriptor: d, Bytes: bytes.NewReader(layer)}); err != nil {
		t.Fatal(err)
	}
}

func readIndex(t testing.TB, layer []byte, d image.Descriptor) *image.Index {
	t.Helper()
	x, err := image.ReadIndex(bytes.NewReader(layer), d)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func view(t testing.TB, x *image.Index) *image.View {
	t.Helper()
	v, err := image.Flatten(x)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func frame(layer []byte, x *image.Index, n int) []byte {
	f := x.Frames[n]
	return layer[f.Offset : f.Offset+f.Size]
}

func TestRoundTrip(t *testing.T) {
	imagetest.Root(t)
	tree := imagetest.Nasty().Deep()
	layer, d := tree.Layer(t)
	dir := t.TempDir()
	extract(t, dir, layer, d)
	imagetest.Same(t, imagetest.Snapshot(t, dir), tree.Lines())
	for name, most := range map[string]int64{"a/sparse": 2 << 20, "a/zeros": 0, "a/zeros small": 0, "a/sparse small": 8 << 10} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks*512 > most {
			t.Errorf("%s takes %d bytes on disk, want %d at the most", name, st.Blocks*512, most)
		}
	}
}

// The layer is a tar.zst for everybody else.
func TestZstdAndTar(t *testing.T) {
	imagetest.Root(t)
	for _, tool := range []string{"zstd", "tar"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%v: install it", err)
		}
	}
	tree := imagetest.Nasty()
	layer, d := tree.Layer(t)
	file := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(file, layer, 0o644); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command("sh", "-ec", `zstd -qt "$1"; zstd -dc "$1" | tar -x --xattrs --xattrs-include='*' --numeric-owner -C "$2"`, "sh", file, dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	imagetest.Same(t, imagetest.Snapshot(t, dir), tree.Lines())

	// The seek table adds up to the layer, its last frame being itself.
	x := readIndex(t, layer, d)
	table := layer[d.IndexOffset+d.IndexSize:]
	if n, want := len(table), 8+8*(len(x.Frames)+1)+9; n != want {
		t.Fatalf("seek table of %d bytes, want %d", n, want)
	}
	if magic := binary.LittleEndian.Uint32(table[len(table)-4:]); magic != 0x8F92EAB1 {
		t.Fatalf("seek table ends with %x", magic)
	}
	var size, plain int64
	for row := table[8 : len(table)-9]; len(row) > 0; row = row[8:] {
		size += int64(binary.LittleEndian.Uint32(row))
		plain += int64(binary.LittleEndian.Uint32(row[4:]))
	}
	if size != d.IndexOffset+d.IndexSize || plain != x.PlainSize() {
		t.Fatalf("seek table adds up to %d and %d, want %d and %d", size, plain, d.IndexOffset+d.IndexSize, x.PlainSize())
	}
}

func TestSameTreeSameBytes(t *testing.T) {
	tree := imagetest.Nasty()
	layer, d := tree.Layer(t)
	rand.Shuffle(len(tree.Entries), func(i, j int) {
		tree.Entries[i], tree.Entries[j] = tree.Entries[j], tree.Entries[i]
	})
	again, d2 := tree.Layer(t)
	if !bytes.Equal(layer, again) || d != d2 {
		t.Fatalf("layers of the same tree differ: %+v, %+v", d, d2)
	}
	if err := d.Digest.Verify(layer); err != nil {
		t.Fatal(err)
	}
}

// Frames come in random order, from several goroutines, some of them twice.
func TestAnyOrder(t *testing.T) {
	tree := imagetest.Nasty()
	layer, d := tree.Layer(t)
	x := readIndex(t, layer, d)
	inOrder, anyhow := t.TempDir(), t.TempDir()
	t.Cleanup(func() { // lets its owner remove it
		os.Chmod(filepath.Join(inOrder, "readonly"), 0o755)
		os.Chmod(filepath.Join(anyhow, "readonly"), 0o755)
	})
	opts := image.Options{Unprivileged: true} // everything but owners and devices, for everybody
	if _, err := image.Extract(context.Background(), inOrder, opts, image.Layer{Descriptor: d, Bytes: bytes.NewReader(layer)}); err != nil {
		t.Fatal(err)
	}
	e, err := image.NewExtractor(anyhow, view(t, x), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	order := append(rand.Perm(len(x.Frames)), rand.Perm(len(x.Frames))...)
	var workers sync.WaitGroup
	work := make(chan int)
	for range 8 {
		workers.Go(func() {
			for n := range work {
				if err := e.Frame(0, n, frame(layer, x, n)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, n := range order {
		work <- n
	}
	close(work)
	workers.Wait()
	if err := e.Finish(); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // others cannot read the file of mode 0
		imagetest.Same(t, imagetest.Snapshot(t, anyhow), imagetest.Snapshot(t, inOrder))
	}
	if s := e.Skipped(); s.Owners == 0 || s.Devices != 3 || s.Xattrs != 3 {
		t.Fatalf("Skipped: %+v", s)
	}
}

func TestFlippedBit(t *testing.T) {
	tree := imagetest.New().Dir("d").File("d/f", imagetest.Noise(1, 17<<20))
	layer, d := tree.Layer(t)
	x := readIndex(t, layer, d)
	dir := t.TempDir()
	e, err := image.NewExtractor(dir, view(t, x), image.Options{Unprivileged: true})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for _, n := range []int{0, len(x.Frames) - 1} {
		bad := bytes.Clone(frame(layer, x, n))
		bad[len(bad)/2] ^= 1
		if err := e.Frame(0, n, bad); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("frame %d at %d+%d: sha256 is", n, x.Frames[n].Offset, x.Frames[n].Size)) {
			t.Fatalf("flipped bit in frame %d: %v", n, err)
		}
		if err := e.Frame(0, n, bad[1:]); err == nil {
			t.Fatal("short frame was taken")
		}
		if _, err := os.Lstat(filepath.Join(dir, "d/f")); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("something was written: %v", err)
		}
	}
	if err := e.Finish(); err == nil || !strings.Contains(err.Error(), "3 of 3 frames are missing, the first is frame 0") {
		t.Fatalf("Finish: %v", err)
	}
	if err := e.Frame(0, len(x.Frames), nil); err == nil {
		t.Fatal("a frame too many was taken")
	}
	for n := range x.Frames { // and the right ones are still welcome
		if err := e.Frame(0, n, frame(layer, x, n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Finish(); err != nil {
		t.Fatal(err)
	}

	bad := bytes.Clone(layer)
	bad[d.IndexOffset+d.IndexSize/2] ^= 1
	if _, err := image.ReadIndex(bytes.NewReader(bad), d); err == nil || !strings.Contains(err.Error(), "index: digest is") {
		t.Fatalf("flipped bit in the index: %v", err)
	}
}

func TestHostileEntries(t *testing.T) {
	file := func(p string) image.Entry { return image.Entry{Path: p, Type: image.Regular} }
	for _, tt := range []struct {
		name    string
		entries []image.Entry
		want    string
	}{
		{"absolute", []image.Entry{file("/etc/passwd")}, "not clean"},
		{"up", []image.Entry{file("../x")}, "not clean"},
		{"up inside", []image.Entry{{Path: "a", Type: image.Dir}, file("a/../x")}, "not clean"},
		{"dot", []image.Entry{file("./x")}, "not clean"},
		{"slash at the end", []image.Entry{file("x/")}, "not clean"},
		{"nothing", []image.Entry{file("")}, "not clean"},
		{"NUL", []image.Entry{file("a\x00b")}, "NUL"},
		{"long name", []image.Entry{file(strings.Repeat("x", 256))}, "256 bytes"},
		{"through a symlink", []image.Entry{{Path: "a", Type: image.Symlink, Link: "/etc"}, file("a/passwd")}, `lies below "a", a symlink`},
		{"below a file", []image.Entry{file("a"), file("a/b")}, "lies below"},
		{"no parent", []image.Entry{file("a/b")}, `directory "a" is missing`},
		{"twice", []image.Entry{file("a"), file("a")}, "comes after"},
		{"hard link out", []image.Entry{{Path: "a", Type: image.Hardlink, Link: "../etc/passwd"}}, "no earlier file"},
		{"hard link to absolute", []image.Entry{{Path: "a", Type: image.Hardlink, Link: "/etc/passwd"}}, "no earlier file"},
		{"hard link to nothing", []image.Entry{{Path: "a", Type: image.Hardlink}}, "no earlier file"},
		{"hard link to itself", []image.Entry{{Path: "a", Type: image.Hardlink, Link: "a"}}, "no earlier file"},
		{"hard link to directory", []image.Entry{{Path: "a", Type: image.Dir}, {Path: "b", Type: image.Hardlink, Link: "a"}}, "no earlier file"},
		{"hard link through symlink", []image.Entry{{Path: "a", Type: image.Symlink, Link: "/etc"}, {Path: "b", Type: image.Hardlink, Link: "a/passwd"}}, "no earlier file"},
		{"root is a symlink", []image.Entry{{Path: ".", Type: image.Symlink, Link: "/"}}, ""},
		{"symlink to nothing", []image.Entry{{Path: "a", Type: image.Symlink}}, "symlink to"},
		{"mode", []image.Entry{{Path: "a", Type: image.Fifo, Mode: 0o10000}}, "mode"},
		{"type", []image.Entry{{Path: "a", Type: 99}}, "type 99"},
		{"whiteout", []image.Entry{file(".wh.a")}, "whiteout"},
		{"opaque whiteout", []image.Entry{file(".wh..wh..opq")}, "whiteout"},
		{"whiteout of everything", []image.Entry{{Path: ".", Type: image.Whiteout}}, ""},
		{"below a whiteout", []image.Entry{{Path: "a", Type: image.Whiteout}, file("a/b")}, `"a/b": lies below "a", a whiteout`},
		{"whiteout of the way out", []image.Entry{{Path: "../a", Type: image.Whiteout}}, "not clean"},
		{"whiteout and file", []image.Entry{{Path: "a", Type: image.Whiteout}, file("a")}, `"a": comes after "a"`},
		{"hard link to a whiteout", []image.Entry{{Path: "a", Type: image.Whiteout}, {Path: "b", Type: image.Hardlink, Link: "a"}}, "no earlier file"},
		{"attribute", []image.Entry{{Path: "a", Type: image.Fifo, Xattrs: map[string]string{"": ""}}}, "attribute"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			entries := append(imagetest.New().Entries, tt.entries...)
			_, err := image.Write(io.Discard, entries, nil)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Write: %v, want %q", err, tt.want)
			}
			_, err = image.Flatten(&image.Index{Entries: entries})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Flatten: %v, want %q", err, tt.want)
			}
		})
	}
}

// What lies in the target already cannot lead out of it, and is not written
// into: it may have a name outside.
func TestTargetLies(t *testing.T) {
	outside := t.TempDir()
	victim := filepath.Join(outside, "f")
	if err := os.WriteFile(victim, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	tree := imagetest.New().Dir("d").File("d/f", []byte("new")).File("big", imagetest.Noise(1, 9<<20)).
		Add(image.Entry{Path: "d/s", Type: image.Symlink, Link: "x"})
	layer, d := tree.Layer(t)
	opts := image.Options{Unprivileged: true}

	dir := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	_, err := image.Extract(context.Background(), dir, opts, image.Layer{Descriptor: d, Bytes: bytes.NewReader(layer)})
	if err == nil || !strings.Contains(err.Error(), `"d": is there already and is no directory`) {
		t.Fatalf("directory is a symlink: %v", err)
	}

	dir = t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(string, string) error{"d/f": os.Link, "big": os.Symlink, "d/s": os.Symlink} {
		if err := f(victim, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := image.Extract(context.Background(), dir, opts, image.Layer{Descriptor: d, Bytes: bytes.NewReader(layer)}); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(victim); string(b) != "precious" {
		t.Fatalf("outside: %q, %v", b, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "d/f")); string(b) != "new" {
		t.Fatalf("inside: %q, %v", b, err)
	}
	if link, err := os.Readlink(filepath.Join(dir, "d/s")); link != "x" {
		t.Fatalf("symlink: %q, %v", link, err)
	}

	// Swapped under a running extraction.
	dir = t.TempDir()
	x := readIndex(t, layer, d)
	e, err := image.NewExtractor(dir, view(t, x), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := os.RemoveAll(filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	failed := false
	for n := range x.Frames {
		failed = e.Frame(0, n, frame(layer, x, n)) != nil || failed
	}
	if b, _ := os.ReadFile(victim); string(b) != "precious" || !failed {
		t.Fatalf("outside: %q, refused %v", b, failed)
	}
}

func TestContentChangesMeanwhile(t *testing.T) {
	for _, size := range []int64{3, 5, 20 << 20} {
		tree := imagetest.New().File("f", []byte("four"))
		tree.Entries[1].Size = size
		_, err := image.Write(io.Discard, tree.Entries, tree.Open)
		if err == nil || !strings.Contains(err.Error(), `"f": has `) {
			t.Errorf("listed with %d bytes: %v", size, err)
		}
	}
	tree := imagetest.New().File("f", []byte("four"))
	delete(tree.Contents, "f")
	if _, err := image.Write(io.Discard, tree.Entries, tree.Open); err == nil || !strings.Contains(err.Error(), `"f": has no content`) {
		t.Error(err)
	}
}

type fullDisk struct{ left int64 }

func (w *fullDisk) Write(p []byte) (int, error) {
	if w.left -= int64(len(p)); w.left < 0 {
		return 0, unix.ENOSPC
	}
	return len(p), nil
}

func TestWriteFails(t *testing.T) {
	tree := imagetest.New().File("f", make([]byte, 40<<20)) // more frames than are in flight
	_, d := tree.Layer(t)
	for _, room := range []int64{0, d.IndexOffset / 2, d.IndexOffset, d.Size - 1} {
		if _, err := image.Write(&fullDisk{left: room}, tree.Entries, tree.Open); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%d bytes of room: %v", room, err)
		}
	}
}

func FuzzParseIndex(f *testing.F) {
	tree := imagetest.New().Dir("d").File("d/f", []byte("content")).File("g", nil)
	tree.Add(image.Entry{Path: "d/l", Type: image.Symlink, Link: "f", Xattrs: map[string]string{"trusted.x": "y"}})
	tree.Add(image.Entry{Path: "h", Type: image.Hardlink, Link: "d/f"})
	tree.Add(image.Entry{Path: "c", Type: image.Char, Major: 1, Minor: 3})
	layer, d := tree.Layer(f)
	index := layer[d.IndexOffset : d.IndexOffset+d.IndexSize]
	f.Add(index)
	f.Add(index[:len(index)-1])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if x, err := image.ParseIndex(b); err == nil {
			checkIndex(t, x)
		}
	})
}

// The same from inside, past the compression that stops most mutations.
func FuzzIndexBody(f *testing.F) {
	tree := imagetest.New().Dir("d").File("d/f", []byte("content")).File("g", nil)
	tree.Add(image.Entry{Path: "d/l", Type: image.Symlink, Link: "f", Xattrs: map[string]string{"trusted.x": "y"}})
	tree.Add(image.Entry{Path: "h", Type: image.Hardlink, Link: "d/f"})
	tree.Add(image.Entry{Path: "c", Type: image.Char, Major: 1, Minor: 3})
	layer, d := tree.Layer(f)
	f.Add(image.IndexBody(f, layer[d.IndexOffset:d.IndexOffset+d.IndexSize]))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := image.ParseIndex(image.WrapIndexBody(b))
		if err != nil {
			return
		}
		checkIndex(t, x)
		again, err := image.ParseIndex(image.EncodeIndex(t, x))
		if err != nil || !reflect.DeepEqual(x, again) {
			t.Fatalf("%v: %+v becomes %+v", err, x, again)
		}
	})
}

// checkIndex is what the package promises about a parsed index.
func checkIndex(t *testing.T, x *image.Index) {
	end := int64(0)
	for i, e := range x.Entries {
		if !filepath.IsLocal(e.Path) || filepath.Clean(e.Path) != e.Path {
			t.Fatalf("path %q", e.Path)
		}
		if i > 0 && image.Compare(x.Entries[i-1].Path, e.Path) >= 0 {
			t.Fatalf("%q before %q", x.Entries[i-1].Path, e.Path)
		}
		if e.Type == image.Hardlink && !filepath.IsLocal(e.Link) {
			t.Fatalf("link %q", e.Link)
		}
		if e.Size > 0 {
			if e.Offset < end {
				t.Fatalf("content of %q at %d, after %d", e.Path, e.Offset, end)
			}
			end = e.Offset + e.Size
		}
	}
	if end > x.PlainSize() {
		t.Fatalf("content to %d of %d", end, x.PlainSize())
	}
}

func BenchmarkWrite(b *testing.B) {
	tree := imagetest.Nasty()
	size := int64(0)
	for _, c := range tree.Contents {
		size += int64(len(c))
	}
	b.SetBytes(size)
	for b.Loop() {
		if _, err := image.Write(io.Discard, tree.Entries, tree.Open); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkExtract(b *testing.B) {
	layer, d := imagetest.Nasty().Layer(b)
	dir := b.TempDir()
	b.SetBytes(d.Size)
	for b.Loop() {
		opts := image.Options{Unprivileged: true}
		if _, err := image.Extract(context.Background(), dir, opts, image.Layer{Descriptor: d, Bytes: bytes.NewReader(layer)}); err != nil {
			b.Fatal(err)
		}
	}
}

// A target that something holds open cannot be unmounted.
func TestNothingStaysOpen(t *testing.T) {
	tr := imagetest.Nasty().Deep()
	layer, d := tr.Layer(t)
	dir := t.TempDir()
	t.Cleanup(func() { os.Chmod(filepath.Join(dir, "readonly"), 0o755) }) // lets its owner remove it
	if _, err := image.Extract(t.Context(), dir, image.Options{Unprivileged: true}, image.Layer{Descriptor: d, Bytes: bytes.NewReader(layer)}); err != nil {
		t.Fatal(err)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		if target == dir || strings.HasPrefix(target, dir+"/") {
			t.Errorf("descriptor %s is still open on %s", fd.Name(), target)
		}
	}
}
