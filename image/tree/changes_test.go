package tree_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/tree"
)

// A modelFile has any number of names.
type modelFile struct {
	image.Entry
	content string
}

// A model is a tree that can be changed at random.
type model struct {
	r     *rand.Rand
	names map[string]*modelFile
	sly   bool // contents change without their time
}

func newModel(r *rand.Rand, sly bool) *model {
	m := &model{r: r, sly: sly, names: map[string]*modelFile{".": {Entry: image.Entry{Type: image.Dir, Mode: 0o755, MTime: imagetest.When}}}}
	m.change(30)
	return m
}

func (m *model) clone() *model {
	c := &model{r: m.r, sly: m.sly, names: make(map[string]*modelFile)}
	copies := make(map[*modelFile]*modelFile)
	for p, f := range m.names {
		if copies[f] == nil {
			one := *f
			one.Xattrs = maps.Clone(f.Xattrs)
			copies[f] = &one
		}
		c.names[p] = copies[f]
	}
	return c
}

func (m *model) pick(kind image.Type) string {
	var all []string
	for _, p := range slices.Sorted(maps.Keys(m.names)) {
		if t := m.names[p].Type; t == kind || kind == 0 && p != "." || kind == image.Hardlink && t != image.Dir {
			all = append(all, p)
		}
	}
	if len(all) == 0 {
		return ""
	}
	return all[m.r.IntN(len(all))]
}

func (m *model) remove(p string) {
	for q := range m.names {
		if q == p || strings.HasPrefix(q, p+"/") {
			delete(m.names, q)
		}
	}
}

func (m *model) free() string {
	return path.Join(m.pick(image.Dir), []string{"a", "b", "c", "a-", "a b", "é\xff", "…"}[m.r.IntN(7)])
}

func (m *model) change(times int) {
	r := m.r
	for range times {
		switch r.IntN(12) {
		case 0, 1, 2, 3:
			p := m.free()
			m.remove(p)
			f := &modelFile{Entry: image.Entry{Mode: 0o644, MTime: imagetest.When}}
			f.Type = []image.Type{image.Dir, image.Dir, image.Dir, image.Regular, image.Regular, image.Regular, image.Symlink, image.Char, image.Block, image.Fifo}[r.IntN(10)]
			m.names[p] = f
			m.fill(f)
		case 4, 5, 6:
			if p, q := m.pick(image.Hardlink), m.free(); p != "" {
				f := m.names[p]
				m.remove(q)
				m.names[q] = f
			}
		case 7, 8:
			if p := m.pick(0); p != "" && r.IntN(2) == 0 {
				m.remove(p)
			} else if p := m.pick(image.Hardlink); p != "" { // one name of several
				m.remove(p)
			}
		case 9:
			if p := m.pick(image.Hardlink); p != "" { // the same, but a file of its own
				one := *m.names[p]
				m.names[p] = &one
			}
		default:
			p := m.pick(0)
			if r.IntN(10) == 0 || p == "" {
				p = "."
			}
			m.fill(m.names[p])
		}
	}
}

// fill changes something about a file.
func (m *model) fill(f *modelFile) {
	r := m.r
	switch r.IntN(6) {
	case 0:
		f.Mode = uint32(r.IntN(0o10000))
	case 1:
		f.UID, f.GID = uint32(r.IntN(3)), uint32(r.IntN(3))
	case 2:
		f.MTime = f.MTime.Add(time.Duration(r.IntN(3)))
	case 3:
		if f.Type == image.Dir || f.Type == image.Regular {
			f.Xattrs = map[string]string{"user.x": fmt.Sprint(r.IntN(3))}
		}
	}
	switch f.Type {
	case image.Regular:
		n := r.IntN(4)
		content := strings.Repeat(string(byte('a'+r.IntN(3))), n*n)
		if content != f.content && !m.sly {
			f.MTime = f.MTime.Add(1)
		}
		f.content, f.Size = content, int64(len(content))
	case image.Symlink:
		f.Mode, f.Link = 0o777, fmt.Sprint(r.IntN(3))
	case image.Char, image.Block:
		f.Major, f.Minor = 1, uint32(3+2*r.IntN(2))
	}
}

// tree lists the model.
func (m *model) tree() *imagetest.Tree {
	t := &imagetest.Tree{Contents: make(map[string][]byte)}
	first := make(map[*modelFile]string)
	for _, p := range slices.SortedFunc(maps.Keys(m.names), image.Compare) {
		f := m.names[p]
		e := f.Entry
		e.Path = p
		if to, ok := first[f]; ok {
			e = image.Entry{Path: p, Type: image.Hardlink, Link: to}
		} else {
			first[f] = p
			t.Contents[p] = []byte(f.content)
		}
		t.Entries = append(t.Entries, e)
	}
	return t
}

func view(t *testing.T, layers ...image.Layer) *image.View {
	t.Helper()
	v, err := image.ReadView(layers...)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func layer(t *testing.T, tr *imagetest.Tree) image.Layer {
	t.Helper()
	b, d := tr.Layer(t)
	return image.Layer{Descriptor: d, Bytes: bytes.NewReader(b)}
}

// plain are the entries of a view but for where their contents lie.
func plain(v *image.View) []image.Entry {
	es := slices.Clone(v.Entries)
	for i := range es {
		es[i].Offset, es[i].Layer = 0, 0
		if len(es[i].Xattrs) == 0 {
			es[i].Xattrs = nil
		}
	}
	return es
}

// A layer of what changed, on the layers of before, makes what is there now: three
// generations of trees with everything in them, one made of the other at random.
func TestChangesMakeTheTree(t *testing.T) {
	extract := os.Geteuid() == 0 // owners and devices
	for seed := range uint64(25) {
		r := rand.New(rand.NewPCG(seed, 5))
		sly := seed%3 == 0
		m := newModel(r, sly)
		stack := []image.Layer{layer(t, m.tree())}
		for generation := range 3 {
			m = m.clone()
			m.change(r.IntN(12))
			now := m.tree()
			parent := view(t, stack...)
			d, err := tree.Changes(t.Context(), parent, tree.New(now.Entries, now.Open), sly)
			if err != nil {
				t.Fatal(err)
			}
			whole := layer(t, now)
			want := view(t, whole)
			if changes, sum := tree.Diff(parent, want); (len(changes) == 0) != d.Unchanged || (sum == tree.Summary{}) != d.Unchanged ||
				sum.Added != d.Added || sum.Removed != d.Removed {
				t.Fatalf("seed %d: Diff says %v, %v, Changes %+v", seed, sum, changes, d)
			}
			if d.Unchanged {
				continue
			}
			if d.Full != "" {
				t.Fatalf("seed %d: %s", seed, d.Full)
			}
			stack = append(stack, layer(t, &imagetest.Tree{Entries: d.Entries, Contents: now.Contents}))
			got := view(t, stack...)
			if g, w := plain(got), plain(want); !reflect.DeepEqual(g, w) {
				for i := range min(len(g), len(w)) {
					if !reflect.DeepEqual(g[i], w[i]) {
						t.Fatalf("seed %d, generation %d: %d entries, want %d; got\n%+v, want\n%+v", seed, generation, len(g), len(w), g[i], w[i])
					}
				}
				t.Fatalf("seed %d, generation %d: %d entries, want %d", seed, generation, len(g), len(w))
			}
			if changes, _ := tree.Diff(got, want); len(changes) > 0 {
				t.Fatalf("seed %d: Diff of what is equal: %v", seed, changes)
			}
			if extract && seed < 10 {
				dir := t.TempDir()
				if _, err := image.Extract(t.Context(), dir, image.Options{}, stack...); err != nil {
					t.Fatal(err)
				}
				if g, w := imagetest.Snapshot(t, dir), now.Lines(); !slices.Equal(g, w) {
					t.Fatalf("seed %d: extracted\n%s\nwant\n%s", seed, strings.Join(g, "\n"), strings.Join(w, "\n"))
				}
				os.RemoveAll(dir)
			}
		}
	}
}

func TestChanges(t *testing.T) {
	base := func() *imagetest.Tree {
		return imagetest.New().Dir("d").File("d/x", []byte("x")).File("d/y", []byte("yy")).
			File("f", []byte("fff")).Link("g", "f").Link("h", "f").
			Add(image.Entry{Path: "s", Type: image.Symlink, Mode: 0o777, Link: "f"})
	}
	without := func(t *imagetest.Tree, paths ...string) *imagetest.Tree {
		t.Entries = slices.DeleteFunc(t.Entries, func(e image.Entry) bool { return slices.Contains(paths, e.Path) })
		return t
	}
	edit := func(t *imagetest.Tree, p string, f func(*image.Entry)) *imagetest.Tree {
		i := slices.IndexFunc(t.Entries, func(e image.Entry) bool { return e.Path == p })
		f(&t.Entries[i])
		return t
	}
	for _, tt := range []struct {
		name     string
		now      *imagetest.Tree
		checksum bool
		want     string // of the layer
		diff     string
	}{
		{name: "nothing", now: base()},
		{name: "a symlink's mode is none", now: edit(base(), "s", func(e *image.Entry) { e.Mode = 0o700 })},
		{name: "added", now: base().File("d/z", []byte("z")), want: ". d d/z", diff: "added d/z 1"},
		{name: "root", now: edit(base(), ".", func(e *image.Entry) { e.Mode = 0o700 }), want: ".", diff: "changed . [mode] 0"},
		{name: "removed", now: without(base(), "d/x"), want: ". d -d/x", diff: "removed d/x 1"},
		{name: "removed with all below", now: without(base(), "d", "d/x", "d/y"), want: ". -d", diff: "removed d 0, removed d/x 1, removed d/y 2"},
		{name: "directory to file", now: without(base(), "d", "d/x", "d/y").File("d", nil), want: ". d", diff: "changed d [type] 0, removed d/x 1, removed d/y 2"},
		{name: "file to directory", now: without(base(), "d/x").Dir("d/x").File("d/x/1", nil), want: ". d d/x d/x/1", diff: "changed d/x [type] 0, added d/x/1 0"},
		{name: "a name more", now: base().Link("d/f", "f"), want: ". d d/f f g h",
			diff: "added d/f 3, changed f [names] 0, changed g [names] 0, changed h [names] 0"},
		{name: "a name less", now: without(base(), "h"), want: ". -h", diff: "changed f [names] 0, changed g [names] 0, removed h 0"},
		{name: "a name on its own", now: without(base(), "h").FileEntry(image.Entry{Path: "h", Mode: 0o644}, []byte("fff")), want: ". h",
			diff: "changed f [names] 0, changed g [names] 0, changed h [names] 0"},
		{name: "attributes of a file with names", now: edit(base(), "f", func(e *image.Entry) { e.UID, e.Xattrs = 1, map[string]string{"user.x": ""} }), want: ". f g h",
			diff: "changed f [owner xattrs] 0, changed g [owner xattrs] 0, changed h [owner xattrs] 0"},
		{name: "sly, unseen", now: without(base(), "d/x").File("d/x", []byte("X")), diff: "changed d/x [content] 1"},
		{name: "sly, seen", now: without(base(), "d/x").File("d/x", []byte("X")), checksum: true, want: ". d d/x", diff: "changed d/x [content] 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			parent := view(t, layer(t, base()))
			slices.SortFunc(tt.now.Entries, func(a, b image.Entry) int { return image.Compare(a.Path, b.Path) })
			// The file is the first of its names.
			if i := slices.IndexFunc(tt.now.Entries, func(e image.Entry) bool { return e.Path == "d/f" }); i >= 0 {
				j := slices.IndexFunc(tt.now.Entries, func(e image.Entry) bool { return e.Path == "f" })
				tt.now.Entries[i], tt.now.Entries[j] = tt.now.Entries[j], tt.now.Entries[i]
				tt.now.Entries[i].Path, tt.now.Entries[j].Path, tt.now.Entries[j].Link = "d/f", "f", "d/f"
				for k := range tt.now.Entries {
					if tt.now.Entries[k].Link == "f" && tt.now.Entries[k].Type == image.Hardlink {
						tt.now.Entries[k].Link = "d/f"
					}
				}
				tt.now.Contents["d/f"] = tt.now.Contents["f"]
			}
			d, err := tree.Changes(t.Context(), parent, tree.New(tt.now.Entries, tt.now.Open), tt.checksum)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range d.Entries {
				if e.Type == image.Whiteout {
					e.Path = "-" + e.Path
				}
				got = append(got, e.Path)
			}
			if s := strings.Join(got, " "); s != tt.want || d.Unchanged != (tt.want == "") || d.Full != "" {
				t.Errorf("layer has %s, want %s (%+v)", s, tt.want, d)
			}
			changes, _ := tree.Diff(parent, view(t, layer(t, tt.now)))
			got = nil
			for _, c := range changes {
				s := c.Kind + " " + c.Path
				if c.What != nil {
					s += fmt.Sprint(" ", c.What)
				}
				got = append(got, s+fmt.Sprint(" ", c.Bytes))
			}
			if s := strings.Join(got, ", "); s != tt.diff {
				t.Errorf("diff is %s, want %s", s, tt.diff)
			}
		})
	}
}

func TestWhenToWriteWhole(t *testing.T) {
	long := strings.Repeat("n", 252)
	mb := func(seed uint64, n int) []byte { return imagetest.Noise(seed, n<<20) }
	changes := func(now *imagetest.Tree, before ...*imagetest.Tree) *tree.Delta {
		t.Helper()
		var layers []image.Layer
		for _, tr := range before {
			layers = append(layers, layer(t, tr))
		}
		d, err := tree.Changes(t.Context(), view(t, layers...), tree.New(now.Entries, now.Open), false)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	later := func(p string, content []byte) image.Entry {
		return image.Entry{Path: p, Mode: 0o600}
	}
	for _, tt := range []struct {
		name string
		d    *tree.Delta
		want string
	}{
		{"name too long for a whiteout", changes(imagetest.New(), imagetest.New().File(long, nil)), "has 252 bytes, a whiteout has room for 251"},
		{"such a name below what goes", changes(imagetest.New(), imagetest.New().Dir("d").File("d/"+long, nil)), ""},
		{"small", changes(imagetest.New().FileEntry(later("a", nil), []byte("b")), imagetest.New().File("a", []byte("a"))), ""},
		{"nothing changed", changes(imagetest.New().File("a", mb(1, 8)), imagetest.New().File("a", mb(1, 8))), ""},
		{"half", changes(imagetest.New().File("a", mb(1, 8)).FileEntry(later("b", nil), mb(3, 8)), imagetest.New().File("a", mb(1, 8)).File("b", mb(2, 8))), ""},
		{"more", changes(imagetest.New().File("a", mb(1, 6)).FileEntry(later("b", nil), mb(3, 10)), imagetest.New().File("a", mb(1, 6)).File("b", mb(2, 10))), "10485760 bytes of the layers would be hidden, of the tree's 16777216"},
		{"much that is new", changes(imagetest.New().File("a", mb(1, 1)).File("b", mb(3, 10)), imagetest.New().File("a", mb(1, 1))), ""},
		{"many layers", changes(imagetest.New(), append(slices.Repeat([]*imagetest.Tree{imagetest.New()}, 63), imagetest.New().File("a", nil))...), "there are 64 layers"},
	} {
		if tt.d.Full == "" != (tt.want == "") || !strings.Contains(tt.d.Full, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, tt.d.Full, tt.want)
		}
	}
}

// What is unchanged is not read.
func TestUnchangedIsNotRead(t *testing.T) {
	dir := t.TempDir()
	for i := range 50 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tr, err := tree.FromDir(dir, tree.Excludes{})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	var b bytes.Buffer
	desc, err := image.Write(&b, tr.Entries, tr.Open)
	if err != nil {
		t.Fatal(err)
	}
	parent := view(t, image.Layer{Descriptor: desc, Bytes: bytes.NewReader(b.Bytes())})
	none := tree.New(tr.Entries, nil) // would panic
	if d, err := tree.Changes(t.Context(), parent, none, false); err != nil || !d.Unchanged {
		t.Fatalf("%+v, %v", d, err)
	}
	if d, err := tree.Changes(t.Context(), parent, tr, true); err != nil || !d.Unchanged {
		t.Fatalf("with checksum: %+v, %v", d, err)
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	if _, err := tree.Changes(stopped, parent, tr, true); err == nil {
		t.Error("nothing stops it")
	}
	if err := os.Remove(filepath.Join(dir, "7")); err != nil {
		t.Fatal(err)
	}
	if _, err := tree.Changes(t.Context(), parent, tr, true); err == nil || !strings.Contains(err.Error(), `"7"`) {
		t.Errorf("a file that vanished: %v", err)
	}
}
