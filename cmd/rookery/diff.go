package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"rookery/image"
	"rookery/image/store"
	"rookery/image/tree"
)

func imageDiff(dir func() stateDir) *cobra.Command {
	var format string
	var checksum bool
	var excludes excludeFlags
	cmd := &cobra.Command{
		Use:   "diff A [B]",
		Short: "List the paths in which two versions or trees differ",
		Long: `List the paths in which two versions or trees differ: + is new in B, - is gone, ~ is
changed, with the bytes of content and in what it differs.

A and B are versions, NAME[:TAG], or trees: a path with a slash, or the name of a tree
that no image has. A tree alone, by name or path, is compared with the version it was
checked out from or published as last. Of files in a tree that have the size and the time of the other side
the content is taken for the same, unless --checksum has it read.`,
		Example: `  rookery image diff debian12:3 debian12:4
  rookery image diff debian12
  rookery image diff debian12:3 ./tree --checksum`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: words(completeImages(dir), completeTrees(dir)),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			d := differ{cmd.Context(), images, dir(), excludes, checksum}
			changes, sum, err := d.diff(args)
			if err != nil {
				return fmt.Errorf("diff: %w", err)
			}
			view := diffView{sum, append([]tree.Change{}, changes...)}
			return show(cmd.OutOrStdout(), format, view, func(w io.Writer) {
				signs := map[string]string{"added": "+", "removed": "-", "changed": "~"}
				for _, c := range changes {
					fmt.Fprintf(w, "%s %s\t%s", signs[c.Kind], printable(c.Path), size(c.Bytes))
					for i, what := range c.What {
						fmt.Fprint(w, [...]string{"\t", ", "}[min(i, 1)], what)
					}
					fmt.Fprintln(w)
				}
				fmt.Fprintln(w, told(sum))
			})
		},
	}
	cmd.Flags().BoolVar(&checksum, "checksum", false, "compare contents too, not only sizes and times")
	excludes.add(cmd)
	outputFlag(cmd, &format)
	return cmd
}

type diffView struct {
	tree.Summary
	Changes []tree.Change `json:"changes"`
}

// told is a summary for people.
func told(s tree.Summary) string {
	return fmt.Sprintf("%d files added, %d changed, %d removed", s.Added.Names, s.Changed.Names, s.Removed.Names)
}

// A differ compares versions and trees.
type differ struct {
	ctx      context.Context
	images   *store.Store
	dir      stateDir
	excludes excludeFlags
	checksum bool
}

// A side is one of the two that are compared.
type side struct {
	entries []image.Entry
	tree    *tree.Tree // nil: a version, of which the index knows the contents
	close   func() error
}

func (d differ) diff(args []string) ([]tree.Change, tree.Summary, error) {
	var none tree.Summary
	if len(args) == 1 {
		path, err := filepath.Abs(d.dir.tree(args[0]))
		if err != nil {
			return nil, none, err
		}
		o, err := tree.ReadOrigin(path)
		if err != nil {
			return nil, none, fmt.Errorf("nothing says which version %s comes from, name one: %w", path, err)
		}
		args = []string{o.Image, path}
	}
	var sides [2]side
	for i, name := range args {
		s, err := d.open(name)
		if err != nil {
			return nil, none, err
		}
		defer s.close()
		sides[i] = s
	}
	for i := range sides {
		if err := d.contents(sides[i], sides[1-i]); err != nil {
			return nil, none, err
		}
	}
	changes, sum := tree.Diff(&image.View{Entries: sides[0].entries}, &image.View{Entries: sides[1].entries})
	return changes, sum, nil
}

// treeAt is the directory of the tree that is meant by a name, if one is.
func (d differ) treeAt(name string) (path string, ok bool, err error) {
	if strings.Contains(name, "/") {
		return d.dir.tree(name), true, nil
	}
	_, err = d.images.Resolve(d.ctx, name)
	if !errors.Is(err, store.ErrNotFound) || strings.Contains(name, ":") {
		return "", false, err
	}
	path = d.dir.tree(name)
	if _, missing := os.Stat(path); missing != nil {
		return "", false, err
	}
	return path, true, nil
}

func (d differ) open(name string) (side, error) {
	path, ok, err := d.treeAt(name)
	if err != nil {
		return side{}, err
	}
	if ok {
		repo := name
		if o, err := tree.ReadOrigin(path); err == nil {
			repo = o.Image
		}
		excludes, err := d.excludes.of(d.dir, repo)
		if err != nil {
			return side{}, err
		}
		t, err := tree.FromDir(path, excludes)
		if err != nil {
			return side{}, err
		}
		return side{t.Entries, t, t.Close}, nil
	}
	v, err := d.images.Resolve(d.ctx, name)
	if err != nil {
		return side{}, err
	}
	view, closeAll, err := openView(d.ctx, d.images, v)
	if err != nil {
		return side{}, err
	}
	return side{view.Entries, nil, closeAll}, nil
}

// openView reads what a version's tree is.
func openView(ctx context.Context, images *store.Store, v store.Version) (view *image.View, closeAll func() error, err error) {
	layers, closeAll, err := images.Layers(ctx, v)
	if err != nil {
		return nil, nil, err
	}
	view, err = image.ReadView(layers...)
	if err != nil {
		closeAll()
		return nil, nil, fmt.Errorf("image %q: %w", v.Name, err)
	}
	return view, closeAll, nil
}

// contents notes the hashes of a tree's files where they decide something.
func (d differ) contents(s, other side) error {
	if s.tree == nil {
		return nil
	}
	theirs := make(map[string]*image.Entry, len(other.entries))
	for i := range other.entries {
		theirs[other.entries[i].Path] = &other.entries[i]
	}
	for i := range s.entries {
		e := &s.entries[i]
		o := theirs[e.Path]
		if o != nil && o.Type == image.Hardlink {
			o = theirs[o.Link]
		}
		if e.Size == 0 || o == nil || o.Size != e.Size {
			continue
		}
		if !d.checksum && o.MTime.Equal(e.MTime) {
			e.SHA256 = o.SHA256
			continue
		}
		var err error
		if e.SHA256, err = d.hash(s.tree, *e); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	return nil
}

func (d differ) hash(t *tree.Tree, e image.Entry) (sum [32]byte, err error) {
	if err := context.Cause(d.ctx); err != nil {
		return sum, err
	}
	r, err := t.Open(e)
	if err != nil {
		return sum, err
	}
	defer r.Close()
	h := sha256.New()
	_, err = io.Copy(h, r)
	return [32]byte(h.Sum(nil)), err
}
