package image_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
)

// mixed is content of which a little compresses as text does: under the race
// detector the encoder is 20 times slower, but for noise.
func mixed(seed uint64, n int) []byte {
	b := imagetest.Noise(seed, n)
	for at := 0; at < n; at += 1 << 20 {
		var text []byte
		for i := range 800 {
			text = fmt.Appendf(text, "%x of %d\n", b[at+i]&15, b[at+i]>>3)
		}
		copy(b[at:], text)
	}
	return b
}

// Frames depend on nothing but the tree: not on how many cores compress, which
// of them is first, or what it compressed before.
func TestSameBytesOnAnyMachine(t *testing.T) {
	unraced(t)
	tree := imagetest.New().File("mixed", mixed(1, 30<<20)).File("void", make([]byte, 30<<20)).File("zz", mixed(2, 3<<20))
	var want image.Descriptor
	for _, cores := range []int{1, 2, 8} {
		before := runtime.GOMAXPROCS(cores)
		_, d := tree.Layer(t)
		runtime.GOMAXPROCS(before)
		if want == (image.Descriptor{}) {
			want = d
		}
		if d != want {
			t.Errorf("%d cores: %+v, want %+v", cores, d, want)
		}
	}
}

// A change of these makes new layers of old trees: nothing breaks, but nobody
// has the frames yet. The stream is the format's, its compression the pinned
// encoder's.
func TestBytesStayTheSame(t *testing.T) {
	const (
		stream = "sha256:cb710478116c185f69e3ad453ac4f86d283ad5ce2203d4c27ac512cbf8493a2e"
		layer  = "sha256:25d5eb2b0b81f94515a95540ad29bf56d3fb1df83396fde719a281cc6d901e8e"
	)
	_, d := imagetest.New().Dir("d").Link("l", "d/mixed").File("d/mixed", mixed(1, 9<<20)).
		FileEntry(image.Entry{Path: "d/x", Mode: 0o4755, UID: 1, Xattrs: map[string]string{"user.b": "1", "user.a": "2"}}, []byte("x")).
		Layer(t)
	if d.DiffID != stream {
		t.Errorf("stream is %s, was %s on 2026-11-22", d.DiffID, stream)
	}
	if d.Digest != layer {
		t.Errorf("layer is %s, was %s on 2026-11-22", d.Digest, layer)
	}
}

// The encoder counts what went through it in 31 bits and starts anew when they
// overflow: here once, since each frame counts for 8 MiB more than it has.
func TestUsedEncoder(t *testing.T) {
	enc := image.NewEncoder(t)
	a := mixed(1, 140<<10)
	want := enc.EncodeAll(a, nil)
	for i := range 300 {
		enc.EncodeAll(a[i:1000+i], nil)
		if got := enc.EncodeAll(a, nil); !bytes.Equal(got, want) {
			t.Fatalf("after %d other frames: %d bytes, were %d", i+1, len(got), len(want))
		}
	}
}

// Frames end at entries where they are nearly full, and never hold more than
// 8 MiB; a frame of zeros is the same one each time.
func TestFrames(t *testing.T) {
	const M = 1 << 20
	tree := imagetest.New().File("a", mixed(1, 7*M)).File("b", mixed(2, 2*M)).File("c", make([]byte, 30*M)).File("d", nil)
	layer, d := tree.Layer(t)
	x := readIndex(t, layer, d)
	if first, b := x.Frames[0], x.Entries[2]; first.PlainSize >= b.Offset || first.PlainSize < 7*M {
		t.Errorf("first frame has %d bytes, %s is at %d", first.PlainSize, b.Path, b.Offset)
	}
	var zeros []byte
	for n, f := range x.Frames {
		if f.PlainSize > 8*M {
			t.Errorf("frame %d has %d bytes", n, f.PlainSize)
		}
		if f.PlainSize < 8*M || f.Plain < x.Entries[3].Offset {
			continue
		}
		if zeros == nil {
			zeros = frame(layer, x, n)
		}
		if !bytes.Equal(frame(layer, x, n), zeros) {
			t.Errorf("frame %d of zeros differs from the first", n)
		}
	}
	if zeros == nil {
		t.Error("no frame of zeros")
	}
}

// What is left out of reading reads as zeros.
func TestHoles(t *testing.T) {
	unraced(t)
	const M = 1 << 20
	for name, data := range map[string][]int64{ // where there is a byte; the last is the size
		"none":       {M, 20 * M},
		"all":        {20 * M},
		"at the end": {0, 5*M + 17, 20*M + 3},
		"at first":   {19*M + 4095, 19*M + 4096},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "f")
			f, err := os.Create(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			size := data[len(data)-1]
			content := make([]byte, size)
			if name == "none" {
				copy(content, imagetest.Noise(1, len(content)))
				_, err = f.Write(content)
			}
			for _, at := range data[:len(data)-1] {
				content[at] = 'x'
				_, werr := f.WriteAt([]byte{'x'}, at)
				err = errors.Join(err, werr)
			}
			if err := errors.Join(err, f.Truncate(size)); err != nil {
				t.Fatal(err)
			}
			tree := imagetest.New().File("f", content)
			_, want := tree.Layer(t)
			open := func(image.Entry) (io.ReadCloser, error) { return os.Open(file) }
			if got, err := image.Write(io.Discard, tree.Entries, open); err != nil || got != want {
				t.Errorf("%+v, %v, want %+v", got, err, want)
			}
			for _, change := range []int64{-5 * M, 5 * M} { // into a hole, and by one
				tree.Entries[1].Size = size + change
				if _, err := image.Write(io.Discard, tree.Entries, open); err == nil || !strings.Contains(err.Error(), `"f": has `) {
					t.Errorf("listed with %d bytes, has %d: %v", size+change, size, err)
				}
			}
		})
	}
}

// Over 8 GiB a size no longer fits the tar header, and a hole of that size is
// no reason to wait.
func TestHugeFile(t *testing.T) {
	unraced(t)
	if testing.Short() {
		t.Skip("writes the layer of an 8 GiB hole: run without -short")
	}
	for _, tool := range []string{"zstd", "tar"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%v: install it", err)
		}
	}
	t.Parallel()
	const size = 8<<30 + 4097
	file := filepath.Join(t.TempDir(), "huge")
	if err := errors.Join(os.WriteFile(file, []byte("begins"), 0o600), os.Truncate(file, size)); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(file + ".layer")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	tree := imagetest.New().Add(image.Entry{Path: "huge", Type: image.Regular, Mode: 0o600, Size: size}).File("zz", []byte("behind"))
	d, err := image.Write(out, tree.Entries, func(e image.Entry) (io.ReadCloser, error) {
		if e.Path == "huge" {
			return os.Open(file)
		}
		return tree.Open(e)
	})
	if err != nil {
		t.Fatal(err)
	}
	if d.Size > 1<<20 {
		t.Errorf("layer has %d bytes", d.Size)
	}
	x, err := image.ReadIndex(out, d)
	if err != nil {
		t.Fatal(err)
	}
	// (printf begins; head -c 8589938683 /dev/zero) | sha256sum
	const want = "6f3f1fe2a680aaec3fe8d917a3ac22bef3884a700730bd2335df00162a6d0f66"
	if got := fmt.Sprintf("%x", x.Entries[1].SHA256); got != want {
		t.Errorf("content is %s, want %s", got, want)
	}

	zstd := exec.Command("zstd", "-qdc", out.Name())
	tar := exec.Command("tar", "-tvf", "-", "--full-time", "--utc")
	if tar.Stdin, err = zstd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := zstd.Start(); err != nil {
		t.Fatal(err)
	}
	list, err := tar.Output()
	if err := errors.Join(err, zstd.Wait()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(list), fmt.Sprint(size)) || !strings.Contains(string(list), "6 2023-11-14 22:13:20.123456789 zz") {
		t.Errorf("tar lists %s", list)
	}
}

func TestWriteFailsWithPlace(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	tree := imagetest.New().File("f", imagetest.Noise(1, 20<<20))
	_, err = image.Write(full, tree.Entries, tree.Open)
	if !errors.Is(err, unix.ENOSPC) || err.Error() != "layer at 0: write /dev/full: no space left on device" {
		t.Error(err)
	}
}
