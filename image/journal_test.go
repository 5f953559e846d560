package image_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"rookery/image"
	"rookery/image/imagetest"
)

// A watched layer says which frames were read.
type watched struct {
	layer []byte
	index *image.Index
	image.Descriptor

	mu   sync.Mutex
	read []int
}

func (w *watched) ReadAt(p []byte, off int64) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n, ok := slices.BinarySearchFunc(w.index.Frames, off, func(f image.Frame, off int64) int { return int(f.Offset - off) }); ok {
		w.read = append(w.read, n)
	}
	return copy(p, w.layer[off:]), nil
}

// frames gives what was read since the last time.
func (w *watched) frames() []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	read := w.read
	w.read = nil
	slices.Sort(read)
	return read
}

func (w *watched) extract(dir string) error {
	opts := image.Options{Unprivileged: true, Journal: filepath.Join(dir, image.Unfinished)}
	_, err := image.Extract(context.Background(), dir, opts, image.Layer{Descriptor: w.Descriptor, Bytes: w})
	return err
}

// long is a tree of several frames: small files, and a large one across them.
var long = sync.OnceValue(func() *imagetest.Tree {
	tree := imagetest.New().Dir("a", "b", "c")
	tree.Add(image.Entry{Path: "closed", Type: image.Dir, Mode: 0o555})
	tree.FileEntry(image.Entry{Path: "closed/file", Mode: 0o444}, []byte("read me"))
	for _, dir := range []string{"a", "c"} {
		for i := range 15 {
			tree.File(fmt.Sprintf("%s/%02d", dir, i), imagetest.Noise(uint64(i), 1<<20+i))
		}
	}
	large := make([]byte, 30<<20)
	for at := 0; at < len(large); at += 4 << 20 { // every other 2 MiB is a hole
		copy(large[at:], imagetest.Noise(uint64(at>>20), 2<<20))
	}
	return tree.FileEntry(image.Entry{Path: "b/large", Mode: 0o4555}, large).Link("link", "b/large")
})

var longLayer = sync.OnceValues(func() ([]byte, image.Descriptor) {
	var b bytes.Buffer
	d, err := image.Write(&b, long().Entries, long().Open)
	if err != nil {
		panic(err)
	}
	return b.Bytes(), d
})

func watch(t testing.TB) *watched {
	layer, d := longLayer()
	return &watched{layer: layer, index: readIndex(t, layer, d), Descriptor: d}
}

func same(t *testing.T, dir string) {
	t.Helper()
	want := t.TempDir()
	for _, d := range []string{dir, want} {
		t.Cleanup(func() { os.Chmod(filepath.Join(d, "closed"), 0o755) }) // lets its owner remove it
	}
	if err := watch(t).extract(want); err != nil {
		t.Fatal(err)
	}
	imagetest.Same(t, imagetest.Snapshot(t, dir), imagetest.Snapshot(t, want))
}

// some extracts every frame for which write is true and, unless it is killed,
// lets go in good order.
func some(t *testing.T, dir string, write func(n int) bool, killed bool) (wrote []int) {
	t.Helper()
	w := watch(t)
	journal := filepath.Join(dir, image.Unfinished)
	e, err := image.NewExtractor(dir, view(t, w.index), image.Options{Unprivileged: true, Journal: journal})
	if err != nil {
		t.Fatal(err)
	}
	for n := range w.index.Frames {
		if !write(n) {
			continue
		}
		if err := e.Frame(0, n, frame(w.layer, w.index, n)); err != nil {
			t.Fatal(err)
		}
		wrote = append(wrote, n)
	}
	before, err := os.ReadFile(journal)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if killed { // Close has added what a dead process cannot
		if err := os.WriteFile(journal, before, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return wrote
}

func even(n int) bool { return n%2 == 0 }

func TestContinue(t *testing.T) {
	var all []int
	for n := range watch(t).index.Frames {
		all = append(all, n)
	}
	odd := slices.DeleteFunc(slices.Clone(all), even)
	for _, tt := range []struct {
		name string
		make func(t *testing.T, dir string)
		read []int
		err  string
	}{
		{"from nothing", func(*testing.T, string) {}, all, ""},
		{"let go", func(t *testing.T, dir string) { some(t, dir, even, false) }, odd, ""},
		{"killed", func(t *testing.T, dir string) { some(t, dir, even, true) }, odd, ""},
		{"let go, other boot", func(t *testing.T, dir string) { some(t, dir, even, false); image.Reboot(t) }, odd, ""},
		{"synced, power lost", func(t *testing.T, dir string) {
			image.SyncAlways(t)
			some(t, dir, even, true)
			image.Reboot(t)
		}, odd, ""},
		{"power lost", func(t *testing.T, dir string) {
			some(t, dir, even, true)
			ruin(t, filepath.Join(dir, "b/large"))
			ruin(t, filepath.Join(dir, "a/00"))
			image.Reboot(t)
		}, all, ""},
		{"synced in part, then power lost twice", func(t *testing.T, dir string) {
			some(t, dir, even, false)
			image.Reboot(t)
			some(t, dir, func(n int) bool { return !even(n) }, true)
			ruin(t, filepath.Join(dir, "b/large"), odd...)
			image.Reboot(t)
			some(t, dir, func(int) bool { return false }, true)
			image.Reboot(t)
		}, odd, ""},
		{"torn", func(t *testing.T, dir string) {
			some(t, dir, even, true)
			change(t, filepath.Join(dir, image.Unfinished), func(b []byte) []byte { return b[:len(b)-1] })
		}, append(slices.Clone(odd), all[len(all)-1-(len(all)-1)%2]), ""},
		{"died young", func(t *testing.T, dir string) {
			some(t, dir, even, true)
			change(t, filepath.Join(dir, image.Unfinished), func(b []byte) []byte { return b[:20] })
		}, all, ""},
		{"a file gone", func(t *testing.T, dir string) {
			some(t, dir, even, false)
			if err := os.Remove(filepath.Join(dir, "a/00")); err != nil {
				t.Fatal(err)
			}
		}, append([]int{0}, odd...), ""},
		{"a file written to", func(t *testing.T, dir string) {
			some(t, dir, even, false)
			change(t, filepath.Join(dir, "a/00"), func(b []byte) []byte { return bytes.Repeat([]byte("!"), len(b)) })
		}, append([]int{0}, odd...), ""},
		{"the large file gone, and killed again", func(t *testing.T, dir string) {
			some(t, dir, func(int) bool { return true }, false)
			if err := os.Remove(filepath.Join(dir, "b/large")); err != nil {
				t.Fatal(err)
			}
			some(t, dir, even, true) // makes it anew: what the first journal said of it is void
		}, nil, ""},
		{"other image", func(t *testing.T, dir string) {
			some(t, dir, even, false)
			change(t, filepath.Join(dir, image.Unfinished), func([]byte) []byte { return image.Journal() })
		}, nil, "is of another image"},
		{"no journal", func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, image.Unfinished), []byte("mine"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, nil, "is no journal"},
		{"symlink", func(t *testing.T, dir string) {
			if err := os.Symlink("/etc/passwd", filepath.Join(dir, image.Unfinished)); err != nil {
				t.Fatal(err)
			}
		}, nil, image.Unfinished + ": too many levels"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			t.Cleanup(func() { os.Chmod(filepath.Join(dir, "closed"), 0o755) })
			tt.make(t, dir)
			w := watch(t)
			err := w.extract(dir)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("%v, want %q", err, tt.err)
				}
				if _, err := os.Lstat(filepath.Join(dir, image.Unfinished)); err != nil {
					t.Fatal(err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(tt.read)
			if got := w.frames(); tt.read != nil && !slices.Equal(got, tt.read) {
				t.Errorf("frames read: %v, want %v", got, tt.read)
			}
			same(t, dir)
		})
	}
}

func change(t *testing.T, file string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, f(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// ruin does to a file what a crash may: size and time are right, the data is
// something else. Of the large file, only where these frames are.
func ruin(t *testing.T, file string, frames ...int) {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	change(t, file, func(b []byte) []byte {
		if frames == nil {
			return bytes.Repeat([]byte("stale!"), len(b)/6+1)[:len(b)]
		}
		x := watch(t).index
		e, _ := view(t, x).Find("b/large")
		for _, n := range frames {
			for at := max(x.Frames[n].Plain, e.Offset); at < min(x.Frames[n].Plain+x.Frames[n].PlainSize, e.Offset+e.Size); at++ {
				b[at-e.Offset] = '!'
			}
		}
		return b
	})
	if err := os.Chtimes(file, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
}

func TestOneAtATime(t *testing.T) {
	dir := t.TempDir()
	w := watch(t)
	opts := image.Options{Unprivileged: true, Journal: filepath.Join(dir, image.Unfinished)}
	e, err := image.NewExtractor(dir, view(t, w.index), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := w.extract(dir); err == nil || !strings.Contains(err.Error(), "another process is extracting") {
		t.Fatal(err)
	}
	own := imagetest.New().File(image.Unfinished, []byte("x"))
	_, x := index(t, own)
	opts.Journal = filepath.Join(t.TempDir(), image.Unfinished)
	if _, err := image.NewExtractor(t.TempDir(), view(t, x), opts); err == nil || !strings.Contains(err.Error(), "has an entry of that name") {
		t.Fatal(err)
	}
}

// A process is killed at many points of its work; what it said to be done is
// not read again, and the tree is as any other in the end.
func TestKilled(t *testing.T) {
	if dir := os.Getenv("IMAGE_TEST_EXTRACT"); dir != "" {
		child(t, dir)
		return
	}
	layer, _ := longLayer()
	file := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(file, layer, 0o644); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Cleanup(func() { os.Chmod(filepath.Join(dir, "closed"), 0o755) })
	done := make(map[int]bool)
	begun := false // a life may be over before there is a journal
	for life := 0; ; life++ {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), "IMAGE_TEST_EXTRACT="+dir, "IMAGE_TEST_LAYER="+file)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for left := rand.IntN(6); lines.Scan(); left-- {
			var n int
			if _, err := fmt.Sscanf(lines.Text(), "begun %d", &n); err == nil && done[n] {
				t.Fatalf("life %d: frame %d is written again", life, n)
			}
			if _, err := fmt.Sscanf(lines.Text(), "done %d", &n); err == nil {
				done[n] = true
			}
			if left == 0 {
				if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
					t.Fatal(err)
				}
			}
		}
		_, unfinished := os.Lstat(filepath.Join(dir, image.Unfinished))
		if cmd.Wait() == nil {
			if unfinished == nil {
				t.Fatal("the journal is still there")
			}
			break
		}
		begun = begun || unfinished == nil
		if unfinished != nil && begun {
			if _, err := os.Lstat(filepath.Join(dir, "link")); err == nil {
				if err := os.Chtimes(dir, imagetest.When, imagetest.When); err != nil { // the last thing it had to do
					t.Fatal(err)
				}
				break
			}
			t.Fatalf("life %d: looks finished: %v", life, unfinished)
		}
		if life > 100 {
			t.Fatal("comes to no end")
		}
	}
	same(t, dir)
}

func child(t *testing.T, dir string) {
	layer, err := os.ReadFile(os.Getenv("IMAGE_TEST_LAYER"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := image.Describe(bytes.NewReader(layer), int64(len(layer)))
	if err != nil {
		t.Fatal(err)
	}
	x, err := image.ParseIndex(layer[d.IndexOffset : d.IndexOffset+d.IndexSize])
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("alive")
	e, err := image.NewExtractor(dir, view(t, x), image.Options{Unprivileged: true, Journal: filepath.Join(dir, image.Unfinished)})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range e.Missing(0) {
		fmt.Println("begun", n)
		if err := e.Frame(0, n, frame(layer, x, n)); err != nil {
			t.Fatal(err)
		}
		fmt.Println("done", n)
	}
	if err := e.Finish(); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

func FuzzJournal(f *testing.F) {
	const frame, dropped, synced, boot = 'F', 'D', 'S', 'B'
	f.Add(image.Journal([3]uint64{boot, 0, 7}, [3]uint64{frame, 0, 1}, [3]uint64{frame, 1, 3}, [3]uint64{synced, 0, 2}, [3]uint64{dropped, 0, 1}), uint64(7))
	f.Add(image.Journal([3]uint64{boot, 0, 7}, [3]uint64{frame, 0, 1})[:50], uint64(8))
	f.Add([]byte{}, uint64(0))
	layers := image.JournalOf{4, 5}
	f.Fuzz(func(t *testing.T, b []byte, boot uint64) {
		done, length, err := layers.Parse(b, boot)
		if err != nil {
			return
		}
		if length < 0 || length > int64(len(b)) {
			t.Fatalf("%d of %d bytes", length, len(b))
		}
		for _, d := range done {
			if d[0] > 1 || d[1] >= layers[d[0]] {
				t.Fatalf("frame %d of layer %d", d[1], d[0])
			}
		}
		// What was cut off changes nothing.
		if again, _, err := layers.Parse(b[:length], boot); err != nil || len(again) != len(done) {
			t.Fatalf("%v, %v: then %v", err, done, again)
		}
	})
}

// The same past the checksums: records of the fuzzer's.
func FuzzJournalRecords(f *testing.F) {
	f.Add([]byte("B0F1F2S3B1F3D1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var records [][3]uint64
		for ; len(b) >= 2; b = b[2:] {
			records = append(records, [3]uint64{uint64("BFDS"[b[0]%4]), 0, uint64(b[1] % 8)})
		}
		done, _, err := image.JournalOf{8}.Parse(image.Journal(records...), 1)
		if err != nil {
			t.Fatal(err)
		}
		// Of each frame, the last word is that it was written, and either a
		// synced record covers that, or nobody has booted since.
		for _, d := range done {
			last := -1
			for i, r := range records {
				if (r[0] == 'F' || r[0] == 'D') && int(r[2]) == d[1] {
					last = i
				}
			}
			if last < 0 || records[last][0] != 'F' {
				t.Fatalf("frame %d: %v", d[1], records)
			}
			boot, covered := uint64(0), false
			for i, r := range records {
				switch {
				case r[0] == 'B' && i < last:
					boot = r[2]
				case r[0] == 'B' && r[2] != boot && !covered:
					t.Fatalf("frame %d outlives its boot: %v", d[1], records)
				case r[0] == 'S' && min(int(r[2]), i) > last:
					covered = true
				}
			}
			if boot != 1 && !covered {
				t.Fatalf("frame %d of another boot: %v", d[1], records)
			}
		}
	})
}
