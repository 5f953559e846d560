package tree

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"iter"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"

	"rookery/image"
)

// In what two entries of one path can differ.
const (
	content = "content"
	kind    = "type"
	mode    = "mode"
	owner   = "owner"
	mtime   = "time"
	attrs   = "xattrs" // ACLs and capabilities among them
	target  = "target" // of a symlink
	device  = "device"
	links   = "names" // of a file that has several
)

// differ says what differs between two that are no hard links; contents of one
// size are the same to it.
func differ(a, b *image.Entry) (what []string) {
	if a.Type != b.Type {
		return []string{kind}
	}
	note := func(different bool, w string) {
		if different {
			what = append(what, w)
		}
	}
	note(a.Size != b.Size, content)
	note(a.Mode != b.Mode && a.Type != image.Symlink, mode) // Linux has one mode for symlinks
	note(a.UID != b.UID || a.GID != b.GID, owner)
	note(!a.MTime.Equal(b.MTime), mtime)
	note(!maps.Equal(a.Xattrs, b.Xattrs), attrs)
	note(a.Link != b.Link, target)
	note(a.Major != b.Major || a.Minor != b.Minor, device)
	return what
}

// A Count is how many names, and how many bytes of content they have.
type Count struct {
	Names int   `json:"names"`
	Bytes int64 `json:"bytes"`
}

func (c *Count) add(bytes int64) {
	c.Names++
	c.Bytes += bytes
}

// A Summary counts what differs between two trees.
type Summary struct {
	Added   Count `json:"added"`
	Changed Count `json:"changed"`
	Removed Count `json:"removed"`
}

// A Delta is a tree as what changed since its parent.
type Delta struct {
	Summary                 // a changed file counts with all its bytes, since the layer has them
	Entries   []image.Entry // of the layer to put on the parent's, for image.Write
	Unchanged bool          // there is nothing to put there
	Full      string        // why the tree is better written whole, "" when it is not
}

// Why a tree is written whole although a layer on top would do: what upper layers
// hide is stored, and moved where it shares a frame with what is seen. Then a
// whole layer costs at most 1/maxHidden of what the changes since the last one
// cost together, so a version still costs what changed, but for that factor.
const (
	maxHidden    = 0.6     // of the tree's bytes
	enoughHidden = 8 << 20 // bytes: one frame is not worth it
	maxLayers    = 64      // docker takes 127 (its layer store), and others build on top
)

// Changes compares t with parent, the version that it was made of. Contents are
// taken for equal when size, time and all else is; with checksum they are read,
// and compared with the hashes in parent.
func Changes(ctx context.Context, parent *image.View, t *Tree, checksum bool) (*Delta, error) {
	c := compare(parent.Entries, t.Entries)
	var rewritten map[int]bool
	if checksum {
		var err error
		if rewritten, err = c.rewritten(ctx, t); err != nil {
			return nil, err
		}
	}
	d := &Delta{}
	written, parents := c.written(rewritten), make([]bool, len(t.Entries))
	for a, b := range c.pairs() {
		switch {
		case b < 0:
			d.Removed.add(c.a.entries[a].Size)
			p := c.a.entries[a].Path
			dir, ok := c.b.place(dirOf(p))
			if !ok || c.b.entries[dir].Type != image.Dir {
				continue // what is above goes, or is replaced
			}
			const maxName = 255 - len(whiteout)
			if n := len(p) - strings.LastIndexByte(p, '/') - 1; n > maxName {
				d.Full = fmt.Sprintf("%q is gone: its name has %d bytes, a whiteout has room for %d", p, n, maxName)
			}
			d.Entries = append(d.Entries, image.Entry{Path: p, Type: image.Whiteout})
			c.b.markParents(parents, p)
		case a < 0:
			d.Added.add(c.b.entries[b].Size)
		case written[b] && (len(c.what(a, b)) > 0 || rewritten[c.b.file[b]]):
			d.Changed.add(c.b.entries[b].Size)
		}
	}
	for b := range t.Entries {
		if written[b] {
			c.b.markParents(parents, t.Entries[b].Path)
		}
	}
	var size, moved, stack int64
	for b := range t.Entries {
		size += t.Entries[b].Size
		if written[b] || parents[b] {
			d.Entries = append(d.Entries, t.Entries[b])
			moved += t.Entries[b].Size
		}
	}
	slices.SortFunc(d.Entries, func(a, b image.Entry) int { return image.Compare(a.Path, b.Path) })
	if len(d.Entries) == 0 {
		d.Unchanged = true
		return d, nil
	}
	for _, x := range parent.Layers {
		for i := range x.Entries {
			stack += x.Entries[i].Size
		}
	}
	hidden := stack + moved - size
	switch {
	case d.Full != "":
	case len(parent.Layers) >= maxLayers:
		d.Full = fmt.Sprintf("there are %d layers already", len(parent.Layers))
	case hidden > enoughHidden && float64(hidden) > maxHidden*float64(size):
		d.Full = fmt.Sprintf("%d bytes of the layers would be hidden, of the tree's %d", hidden, size)
	}
	return d, nil
}

// A Change is one path in which two versions differ.
type Change struct {
	Path  string   `json:"path"`
	Kind  string   `json:"kind"`           // added, removed, changed
	What  []string `json:"what,omitempty"` // of changed: in what
	Bytes int64    `json:"bytes"`          // of content that is in only one of them: b's, or a's when removed
}

// Diff lists in what b differs from a, in the order of the paths.
func Diff(a, b *image.View) ([]Change, Summary) {
	c := compare(a.Entries, b.Entries)
	var changes []Change
	var sum Summary
	for a, b := range c.pairs() {
		var change Change
		var count *Count
		switch {
		case b < 0:
			e := &c.a.entries[a]
			change, count = Change{Path: e.Path, Kind: "removed", Bytes: e.Size}, &sum.Removed
		case a < 0:
			e := &c.b.entries[b]
			change, count = Change{Path: e.Path, Kind: "added", Bytes: e.Size}, &sum.Added
		default:
			e := &c.b.entries[b]
			what := c.what(a, b)
			if fa, fb := c.a.at(a), c.b.at(b); fa.Type == fb.Type && fa.Size == fb.Size && fa.SHA256 != fb.SHA256 {
				what = slices.Insert(what, 0, content)
			}
			if len(what) == 0 {
				continue
			}
			change, count = Change{Path: e.Path, Kind: "changed", What: what}, &sum.Changed
			if what[0] == content || what[0] == kind {
				change.Bytes = e.Size
			}
		}
		changes = append(changes, change)
		count.add(change.Bytes)
	}
	return changes, sum
}

// A side is one of two trees that are compared, by places in its entries.
type side struct {
	entries []image.Entry
	file    []int         // of each entry: the one that it is a name of
	names   map[int][]int // of each file that has several: its names
}

func newSide(entries []image.Entry) *side {
	s := &side{entries: entries, file: make([]int, len(entries)), names: make(map[int][]int)}
	for i := range entries {
		s.file[i] = i
		if entries[i].Type != image.Hardlink {
			continue
		}
		f, _ := s.place(entries[i].Link)
		s.file[i] = f
		if s.names[f] == nil {
			s.names[f] = []int{f}
		}
		s.names[f] = append(s.names[f], i)
	}
	return s
}

func (s *side) place(path string) (int, bool) {
	return slices.BinarySearchFunc(s.entries, path, func(e image.Entry, path string) int { return image.Compare(e.Path, path) })
}

// at is what the i-th entry is a name of.
func (s *side) at(i int) *image.Entry { return &s.entries[s.file[i]] }

// markParents marks the directories of a path. The parents of a marked one are
// marked.
func (s *side) markParents(marks []bool, path string) {
	for path != "." {
		path = dirOf(path)
		i, _ := s.place(path)
		if marks[i] {
			return
		}
		marks[i] = true
	}
}

// A comparison is two trees, and where the entry of b's path is in a.
type comparison struct {
	a, b *side
	inA  []int // -1: not there
}

func compare(a, b []image.Entry) *comparison {
	c := &comparison{newSide(a), newSide(b), make([]int, len(b))}
	for a, b := range c.pairs() {
		if b >= 0 {
			c.inA[b] = a
		}
	}
	return c
}

// pairs are the places of each path in a and b, in order; -1 where it is not there.
func (c *comparison) pairs() iter.Seq2[int, int] {
	return func(yield func(int, int) bool) {
		as, bs := c.a.entries, c.b.entries
		for a, b := 0, 0; a < len(as) || b < len(bs); {
			order := -1
			switch {
			case a == len(as):
				order = 1
			case b < len(bs):
				order = image.Compare(as[a].Path, bs[b].Path)
			}
			pa, pb := a, b
			if order > 0 {
				pa = -1
			} else {
				a++
			}
			if order < 0 {
				pb = -1
			} else {
				b++
			}
			if !yield(pa, pb) {
				return
			}
		}
	}
}

// what says in what a pair differs, contents of one size apart.
func (c *comparison) what(a, b int) []string {
	what := differ(c.a.at(a), c.b.at(b))
	as, bs := c.a.names[c.a.file[a]], c.b.names[c.b.file[b]]
	if !slices.EqualFunc(as, bs, func(a, b int) bool { return c.a.entries[a].Path == c.b.entries[b].Path }) {
		what = append(what, links)
	}
	return what
}

// written marks what of b a layer on a must have. A file keeps its place in a
// when all its names were names of one file there and no other file of b has
// taken that already; what names the old file has besides are removed or
// replaced. A file in a layer is there with all its names, since a hard link
// cannot lead out of the layer.
func (c *comparison) written(rewritten map[int]bool) []bool {
	marks := make([]bool, len(c.b.entries))
	taken := make(map[int]bool)
	for b := range c.b.entries {
		if c.b.file[b] != b {
			continue
		}
		a := c.inA[b]
		same := a >= 0 && !rewritten[b]
		if same {
			a = c.a.file[a]
			same = !taken[a] && len(differ(&c.a.entries[a], &c.b.entries[b])) == 0
		}
		names := c.b.names[b]
		if names == nil {
			names = []int{b}
		}
		for _, n := range names {
			same = same && c.inA[n] >= 0 && c.a.file[c.inA[n]] == a
		}
		if same {
			if len(c.a.names[a]) > 1 {
				taken[a] = true
			}
			continue
		}
		for _, n := range names {
			marks[n] = true
		}
	}
	return marks
}

// rewritten are the files of b whose content is another one than a's, although
// all else is the same.
func (c *comparison) rewritten(ctx context.Context, t *Tree) (map[int]bool, error) {
	var mu sync.Mutex
	found := make(map[int]bool)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	jobs := make(chan int)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for b := range jobs {
				sum, err := hash(ctx, t, c.b.entries[b])
				if err != nil {
					cancel(fmt.Errorf("%q: %w", c.b.entries[b].Path, err))
					return
				}
				if sum != c.a.at(c.inA[b]).SHA256 {
					mu.Lock()
					found[b] = true
					mu.Unlock()
				}
			}
		})
	}
	for b := range c.b.entries {
		e := &c.b.entries[b]
		if e.Size == 0 || c.inA[b] < 0 || len(differ(c.a.at(c.inA[b]), e)) > 0 {
			continue
		}
		select {
		case jobs <- b:
		case <-ctx.Done():
		}
	}
	close(jobs)
	workers.Wait()
	return found, context.Cause(ctx)
}

func hash(ctx context.Context, t *Tree, e image.Entry) (sum [32]byte, err error) {
	r, err := t.Open(e)
	if err != nil {
		return sum, err
	}
	defer r.Close()
	h := sha256.New()
	n, err := io.Copy(h, stoppable{ctx, r})
	if err != nil {
		return sum, err
	}
	if n != e.Size {
		return sum, fmt.Errorf("has %d bytes, had %d when it was listed", n, e.Size)
	}
	return [32]byte(h.Sum(nil)), nil
}

// stoppable reads until its context ends.
type stoppable struct {
	ctx context.Context
	io.Reader
}

func (s stoppable) Read(p []byte) (int, error) {
	if err := context.Cause(s.ctx); err != nil {
		return 0, err
	}
	return s.Reader.Read(p)
}
