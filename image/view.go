package image

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
)

// A View is the tree that a stack of layers makes, and what of each layer is
// still to be seen in it.
type View struct {
	Layers  []*Index // lowest first
	Entries []Entry  // as in an Index, with Layer set and without whiteouts
}

// Flatten stacks layers, the lowest first: an entry replaces what lies below
// its path, but for a directory on a directory, and a whiteout removes it.
func Flatten(layers ...*Index) (*View, error) {
	v := &View{Layers: layers}
	for n, x := range layers {
		if !x.parsed {
			if err := x.check(); err != nil {
				return nil, fmt.Errorf("layer %d: %w", n, err)
			}
		}
		if len(layers) == 1 && !slices.ContainsFunc(x.Entries, func(e Entry) bool { return e.Type == Whiteout }) {
			v.Entries = x.Entries // most often; copies of them take longer than reading them
			return v, nil
		}
		upper := slices.Clone(x.Entries)
		for i := range upper {
			upper[i].Layer = n
		}
		v.Entries = stack(v.Entries, upper)
	}
	if len(layers) == 1 { // and so checked
		return v, nil
	}
	v.relink()
	if err := checkEntries(v.Entries); err != nil {
		return nil, err
	}
	return v, nil
}

// stack merges two sorted lists. gone is the path whose lower tree is hidden.
func stack(lower, upper []Entry) []Entry {
	merged := make([]Entry, 0, len(lower)+len(upper))
	gone := ""
	hidden := func(p string) bool {
		return gone != "" && len(p) > len(gone) && p[len(gone)] == '/' && strings.HasPrefix(p, gone)
	}
	for len(lower) > 0 || len(upper) > 0 {
		order := -1
		switch {
		case len(lower) == 0:
			order = 1
		case len(upper) > 0:
			order = Compare(lower[0].Path, upper[0].Path)
		}
		if order < 0 {
			if !hidden(lower[0].Path) {
				merged = append(merged, lower[0])
			}
			lower = lower[1:]
			continue
		}
		if order == 0 {
			lower = lower[1:]
		}
		e := upper[0]
		upper = upper[1:]
		if e.Type != Dir {
			gone = e.Path
		}
		if e.Type != Whiteout {
			merged = append(merged, e)
		}
	}
	return merged
}

// relink lets hard links name what is still there: of the names that a layer
// gives a file, the first that is to be seen becomes the file.
func (v *View) relink() {
	type file struct {
		layer int
		path  string // in that layer
	}
	names := make(map[file]string)
	for i := range v.Entries {
		e := &v.Entries[i]
		switch e.Type {
		case Dir:
		case Hardlink:
			f := file{e.Layer, e.Link}
			if first, ok := names[f]; ok {
				e.Link = first
				continue
			}
			names[f] = e.Path
			origin, _ := v.Layers[e.Layer].entry(e.Link)
			origin.Path, origin.Layer = e.Path, e.Layer
			*e = origin
		default:
			names[file{e.Layer, e.Path}] = e.Path
		}
	}
}

// Size is how many bytes the files of the tree hold together.
func (v *View) Size() (n int64) {
	for i := range v.Entries {
		n += v.Entries[i].Size
	}
	return n
}

// Needed are the frames of a layer that hold something of what is to be seen,
// in order.
func (v *View) Needed(layer int) []int {
	var needed []int
	for _, i := range v.files(layer) {
		first, last := v.Layers[layer].span(&v.Entries[i])
		if len(needed) > 0 {
			first = max(first, needed[len(needed)-1]+1)
		}
		for n := first; n <= last; n++ {
			needed = append(needed, n)
		}
	}
	return needed
}

// files are the places in Entries of what has its content in that layer, in the
// order of the layer's stream.
func (v *View) files(layer int) []int {
	var files []int
	for i := range v.Entries {
		if e := &v.Entries[i]; e.Layer == layer && e.Size > 0 {
			files = append(files, i)
		}
	}
	// What relink made has an earlier content than its place says.
	slices.SortFunc(files, func(a, b int) int { return cmp.Compare(v.Entries[a].Offset, v.Entries[b].Offset) })
	return files
}

// span are the first and the last frame that hold e's content.
func (x *Index) span(e *Entry) (first, last int) {
	return x.frameAt(e.Offset), x.frameAt(e.Offset + e.Size - 1)
}

// frameAt is the frame that holds this place of the stream.
func (x *Index) frameAt(off int64) int {
	n, _ := slices.BinarySearchFunc(x.Frames, off, func(f Frame, off int64) int {
		switch {
		case f.Plain+f.PlainSize <= off:
			return -1
		case f.Plain > off:
			return 1
		}
		return 0
	})
	return n
}

// maxLinks is how many symlinks one path may lead through, as in the kernel.
const maxLinks = 40

// Find is the entry that a clean relative path leads to. Symlinks are followed
// as os.Root does, for which those with an absolute target lead nowhere.
func (v *View) Find(name string) (e Entry, ok bool) {
	at, rest := ".", strings.Split(name, "/")
	e, ok = v.entry(at)
	for links := 0; ok && len(rest) > 0; {
		switch next := rest[0]; next {
		case "", ".":
			rest = rest[1:]
			continue
		case "..":
			if at == "." {
				return Entry{}, false
			}
			at, _ = split(at)
			rest = rest[1:]
			e, ok = v.entry(at)
			continue
		}
		beyond := path.Join(at, rest[0])
		if e, ok = v.entry(beyond); !ok || e.Type != Symlink {
			at, rest = beyond, rest[1:]
			continue
		}
		if links++; links > maxLinks || path.IsAbs(e.Link) {
			return Entry{}, false
		}
		rest = append(strings.Split(e.Link, "/"), rest[1:]...)
		e, ok = v.entry(at)
	}
	return e, ok
}

// Names are the names in a directory, none when there is no such directory.
func (v *View) Names(dir string) (names []string) {
	d, _ := v.Find(dir)
	if d.Type != Dir {
		return nil
	}
	first, _ := place(v.Entries, d.Path)
	for i := first + 1; i < len(v.Entries); i++ {
		p := v.Entries[i].Path
		if parent, name := split(p); parent == d.Path {
			names = append(names, name)
		} else if d.Path != "." && !strings.HasPrefix(p, d.Path+"/") {
			break
		}
	}
	return names
}

func (v *View) entry(path string) (Entry, bool) { return find(v.Entries, path) }

// place is where the entry of exactly this path is, or would be.
func place(entries []Entry, path string) (int, bool) {
	return slices.BinarySearchFunc(entries, path, func(e Entry, path string) int { return Compare(e.Path, path) })
}

func find(entries []Entry, path string) (Entry, bool) {
	i, ok := place(entries, path)
	if !ok {
		return Entry{}, false
	}
	return entries[i], true
}
