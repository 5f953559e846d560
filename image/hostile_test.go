package image_test

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
)

// A maker makes trees, and what lies in the target, of a fuzzer's bytes.
type maker struct{ b []byte }

func (m *maker) next(n int) int {
	if len(m.b) == 0 {
		return 0
	}
	c := int(m.b[0])
	m.b = m.b[1:]
	return c % n
}

func (m *maker) path() string {
	names := []string{"a", "b", "c", "a\nb", "\xff", "..", ".", "", ".wh.a", "canary", "f", "/"}
	var p []string
	for range 1 + m.next(3) {
		p = append(p, names[m.next(2+m.next(len(names)-1))])
	}
	return strings.Join(p, "/")
}

var links = []string{"a", "a/b", "..", "../canary", "../canary/f", "/", "/etc/passwd", "../../x", ".", "b/../../canary"}

// layer is an index of the fuzzer's and the frames that it tells of: three, of
// which a file may have a part.
func (m *maker) layer() (*image.Index, [][]byte) {
	x := &image.Index{Entries: imagetest.New().Entries}
	for range m.next(12) {
		e := image.Entry{Path: m.path(), Type: image.Type(m.next(9)), Mode: 0o644, MTime: imagetest.When}
		switch e.Type {
		case image.Symlink:
			e.Link = links[m.next(len(links))]
		case image.Hardlink:
			e.Link = m.path()
		case image.Dir:
			e.Mode = 0o755
		case image.Regular:
			e.Size = int64(m.next(100))
		}
		x.Entries = append(x.Entries, e)
	}
	if m.next(8) > 0 { // mostly something that a well-meant tree could be
		slices.SortStableFunc(x.Entries, func(a, b image.Entry) int { return image.Compare(a.Path, b.Path) })
		x.Entries = slices.CompactFunc(x.Entries, func(a, b image.Entry) bool { return a.Path == b.Path })
	}
	end := int64(0)
	for i := range x.Entries {
		e := &x.Entries[i]
		if e.Size > 0 {
			e.Offset = end + int64(m.next(3)) - int64(m.next(20)/19)
			end = e.Offset + e.Size
		}
	}
	var frames [][]byte
	at := int64(0)
	for n := range 3 {
		plain := bytes.Repeat([]byte("bad!"), int(end/8)+1+m.next(4))
		b := image.FrameOf(plain)
		frames = append(frames, b)
		f := image.Frame{Offset: at, Size: int64(len(b)), SHA256: sha256.Sum256(b)}
		f.PlainSize = int64(len(plain)) + int64(m.next(30)/29)
		if n > 0 {
			f.Plain = x.PlainSize()
		}
		at += f.Size
		x.Frames = append(x.Frames, f)
	}
	return x, frames
}

// FuzzExtract stacks and extracts two layers of the fuzzer's into a directory
// that holds traps. Nothing beside it may change.
func FuzzExtract(f *testing.F) {
	// A directory a with a file f; where a is a symlink to the canary, and
	// where f is another name of its file.
	tree := []byte("\x02\x00\x00\x00\x01\x01\x00\x00\x09\x0a\x02\x07\x01\x00\x00\x03\x00\x03\x00\x03\x00")
	f.Add(tree, []byte("\x00\x00\x00\x03"))
	f.Add(tree, []byte("\x00\x00\x00\x02\x01\x00\x00\x09\x0a\x01"))
	f.Fuzz(func(t *testing.T, layers, traps []byte) {
		top := t.TempDir()
		target, canary := filepath.Join(top, "target"), filepath.Join(top, "canary")
		victim := filepath.Join(canary, "f")
		for _, dir := range []string{target, canary} {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(victim, []byte("precious"), 0o644); err != nil {
			t.Fatal(err)
		}
		for m := (&maker{traps}); len(m.b) > 0; {
			at := filepath.Join(target, filepath.Clean("/"+m.path()))
			switch m.next(4) { // some cannot be made: so be it
			case 0:
				os.Symlink(links[m.next(len(links))], at)
			case 1:
				os.Link(victim, at)
			case 2:
				os.Mkdir(at, 0o755)
			case 3:
				os.Symlink(canary, at)
			}
		}
		before, beside := outside(t, canary), names(t, top) // traps may lie there too, through others
		m := &maker{layers}
		lower, lowerFrames := m.layer()
		upper, upperFrames := m.layer()
		v, err := image.Flatten(lower, upper)
		if err != nil {
			return
		}
		x, err := image.NewExtractor(target, v, image.Options{Unprivileged: true})
		if err == nil {
			for n := range 3 {
				x.Frame(1, n, upperFrames[n])
				x.Frame(0, n, lowerFrames[n])
			}
			x.Finish()
			x.Close()
		}
		if after := outside(t, canary); after != before {
			t.Fatalf("was %s\nis  %s", before, after)
		}
		if after := names(t, top); after != beside {
			t.Fatalf("beside the target was %s\nis %s", beside, after)
		}
	})
}

// names lists a directory.
func names(t *testing.T, dir string) string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(list)
}

// outside describes the canary, but for how many names its file has.
func outside(t *testing.T, dir string) string {
	t.Helper()
	var s []string
	for _, name := range []string{".", "f"} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		s = append(s, fmt.Sprint(st.Mode, st.Uid, st.Size, st.Mtim))
	}
	b, err := os.ReadFile(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%v %q", s, b)
}

// A frame is not believed when it holds more, or less, than its index says.
func TestFramesLie(t *testing.T) {
	plain := bytes.Repeat([]byte("0123456789abcdef"), 1<<10)
	bomb := image.FrameOf(make([]byte, 200<<20))
	for _, tt := range []struct {
		name  string
		frame []byte
		size  int64 // that the index says
		want  string
	}{
		{"bomb", bomb, int64(len(plain)), "decompressed size exceeds"},
		{"one byte more", image.FrameOf(append(slices.Clone(plain), 'x')), int64(len(plain)), "decompressed size exceeds"},
		{"one byte less", image.FrameOf(plain[1:]), int64(len(plain)), "decompresses to 16383 bytes, want 16384"},
		{"no zstd", []byte("not compressed at all"), int64(len(plain)), "magic"},
		{"cut", image.FrameOf(plain)[:20], int64(len(plain)), "unexpected EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x := &image.Index{
				Entries: imagetest.New().File("f", plain).Entries,
				Frames:  []image.Frame{{Size: int64(len(tt.frame)), PlainSize: tt.size, SHA256: sha256.Sum256(tt.frame)}},
			}
			dir := t.TempDir()
			e, err := image.NewExtractor(dir, view(t, x), image.Options{Unprivileged: true})
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			err = e.Frame(0, 0, tt.frame)
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("layer 0: frame 0 at 0+%d: ", len(tt.frame))) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if err := e.Finish(); err == nil {
				t.Error("finished")
			}
			if _, err := os.Lstat(filepath.Join(dir, "f")); err == nil {
				t.Error("there is a file")
			}
		})
	}
}

// Two entries with one content, frames that overlap, an index that reaches
// beyond its stream.
func TestHostileIndex(t *testing.T) {
	file := func(p string, off, size int64) image.Entry {
		return image.Entry{Path: p, Type: image.Regular, Offset: off, Size: size}
	}
	frames := []image.Frame{{Offset: 0, Size: 10, Plain: 0, PlainSize: 100}, {Offset: 10, Size: 10, Plain: 100, PlainSize: 100}}
	for _, tt := range []struct {
		name    string
		entries []image.Entry
		frames  []image.Frame
		want    string
	}{
		{"shared content", []image.Entry{file("a", 0, 100), file("b", 50, 100)}, frames, `"b": content at 50+100`},
		{"beyond the stream", []image.Entry{file("a", 150, 51)}, frames, `"a": content at 150+51`},
		{"far beyond", []image.Entry{file("a", 1<<62, 1<<49)}, frames, `"a": content at`},
		{"before the stream", []image.Entry{file("a", -1, 10)}, frames, `"a": content at -1+10`},
		{"frames overlap", nil, []image.Frame{frames[0], {Offset: 5, Size: 10, Plain: 100, PlainSize: 100}}, "frame 1: 10 bytes at 5"},
		{"plain overlaps", nil, []image.Frame{frames[0], {Offset: 10, Size: 10, Plain: 50, PlainSize: 100}}, "frame 1: "},
		{"a gap", nil, []image.Frame{frames[0], {Offset: 11, Size: 10, Plain: 100, PlainSize: 100}}, "frame 1: "},
		{"large frame", nil, []image.Frame{{Size: 10, PlainSize: image.MaxPlain + 1}}, "frame 0: "},
		{"empty frame", nil, []image.Frame{{Size: 10}}, "frame 0: "},
		{"content of a directory", []image.Entry{{Path: "a", Type: image.Dir, Size: 5}}, frames, `"a": directory of size 5`},
		{"long path", deep(70 << 10), frames, "path of "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			entries := append(imagetest.New().Entries, tt.entries...)
			_, err := image.Flatten(&image.Index{Entries: entries, Frames: tt.frames})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Flatten: %v, want %q", err, tt.want)
			}
		})
	}
}

func deep(n int) (es []image.Entry) {
	p := strings.Repeat("x", 250)
	for len(p) < n {
		es = append(es, image.Entry{Path: p, Type: image.Dir})
		p += "/" + strings.Repeat("x", 250)
	}
	return es
}

// A layer that is damaged anywhere leaves nothing that looks finished, with a
// journal or without.
func TestDamagedLooksUnfinished(t *testing.T) {
	layer, d := longLayer()
	x := readIndex(t, layer, d)
	for n, f := range x.Frames {
		bad := bytes.Clone(layer)
		bad[f.Offset+f.Size/2] ^= 1
		for _, journal := range []string{"", image.Unfinished} {
			dir := t.TempDir()
			opts := image.Options{Unprivileged: true}
			if journal != "" {
				opts.Journal = filepath.Join(dir, journal)
			}
			_, err := image.Extract(t.Context(), dir, opts, image.Layer{Descriptor: d, Bytes: bytes.NewReader(bad)})
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("layer 0: frame %d at %d+%d: sha256", n, f.Offset, f.Size)) {
				t.Fatal(err)
			}
			if _, err := os.Lstat(filepath.Join(dir, cmp.Or(journal, "."))); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{".", "a", "b"} { // nobody else gets in, and the link is made at the end
				if info, err := os.Lstat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o700 {
					t.Fatalf("%s: %v, %v", name, info.Mode(), err)
				}
			}
			if _, err := os.Lstat(filepath.Join(dir, "link")); err == nil {
				t.Fatal("the hard link is there")
			}
		}
	}
}

// Bytes between the last frame and the index belong to nobody.
func TestIndexFollowsItsFrames(t *testing.T) {
	layer, d := imagetest.New().File("f", []byte("x")).Layer(t)
	layer = slices.Insert(layer, int(d.IndexOffset), make([]byte, 10)...)
	d.IndexOffset += 10
	d.Size += 10
	want := fmt.Sprintf("index: its 1 frames end at %d, the index begins at %d", d.IndexOffset-10, d.IndexOffset)
	if _, err := image.ReadIndex(bytes.NewReader(layer), d); fmt.Sprint(err) != want {
		t.Errorf("ReadIndex: %v, want %s", err, want)
	}
}
