package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"rookery/image"
	"rookery/image/chroot"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/image/tree"
)

func imageCheckout(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "checkout NAME[:TAG] [TREE]",
		Short: "Lay a version out as a tree, to look into it and to change it",
		Long: `Lay a version out as a tree, to look into it and to change it.

TREE is the name of a tree in the directory trees of --state, by default the image's,
or a path with a slash in it. It is there when it is complete; an interrupted checkout
goes on where it stopped when the same is checked out again.`,
		Example:           "  rookery image checkout debian12\n  rookery image checkout debian12:3 ./look",
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: words(completeImages(dir), completeTrees(dir)),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			v, err := images.Resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			name, _, _ := strings.Cut(v.Name, ":")
			if len(args) == 2 {
				name = args[1]
			}
			if err := checkout(cmd, images, v, dir().tree(name)); err != nil {
				return fmt.Errorf("checkout %s: %w", v.Name, err)
			}
			return nil
		},
	}
}

// checkout makes the tree beside its place, where it comes when it is complete.
func checkout(cmd *cobra.Command, images *store.Store, v store.Version, path string) error {
	if err := vacant(path); err != nil {
		return err
	}
	unfinished := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".checkout-")
	beside := unfinished + v.Manifest.Hex()[:12]
	if err := os.MkdirAll(beside, 0o700); err != nil {
		return err
	}
	lock, err := chroot.Lock(beside)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := forget(unfinished, beside); err != nil {
		return err
	}
	sum, err := extract(cmd, images, v, beside)
	if err != nil {
		return err
	}
	if err := vacant(path); err != nil {
		return err
	}
	if err := tree.WriteOrigin(path, tree.Origin{Image: v.Name, Manifest: v.Manifest}); err != nil {
		return err
	}
	if err := os.Rename(beside, path); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: is in %s: %s\n", v.Name, path, sum)
	return nil
}

// forget removes what interrupted checkouts of a tree left, but for what keep, which
// is ours, can go on with.
func forget(unfinished, keep string) error {
	dirs, err := os.ReadDir(filepath.Dir(unfinished))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		dir := filepath.Join(filepath.Dir(unfinished), d.Name())
		if !strings.HasPrefix(dir, unfinished) || dir == keep {
			continue
		}
		lock, err := chroot.Lock(dir)
		if errors.Is(err, chroot.ErrBusy) {
			continue
		}
		if err != nil {
			return err
		}
		err = os.RemoveAll(dir)
		lock.Close()
		if err != nil {
			return err
		}
	}
	if _, err := os.Lstat(filepath.Join(keep, image.Unfinished)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Without a journal nobody knows what is there: it was the last moment.
	inside, err := os.ReadDir(keep)
	for _, d := range inside {
		err = errors.Join(err, os.RemoveAll(filepath.Join(keep, d.Name())))
	}
	return err
}

// vacant says what is in a tree's place already.
func vacant(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	from := ""
	if o, err := tree.ReadOrigin(path); err == nil {
		from = ", checked out from or published as " + o.Image
	}
	return fmt.Errorf("%s is there already%s: publish what it holds, remove it, or name another tree", path, from)
}

type publisher struct {
	parent           string
	squash, checksum bool
	dry              bool
	excludes         excludeFlags

	comment string            // "" says where the tree lies
	labels  map[string]string // over those of the parent
}

func imagePublish(dir func() stateDir) *cobra.Command {
	var p publisher
	cmd := &cobra.Command{
		Use:   "publish TREE NAME[:TAG]",
		Short: "Make a version of a tree; only what changed since its parent is stored again",
		Long: `Make a version of a tree; only what changed since its parent is stored again.

The parent is the version that the tree was checked out from or published as last.
What changed is seen by size, time, owner, mode and attributes; --checksum reads the
contents too. A tree of which no parent is known is stored whole, and so is one of
which so much changed that one more layer would waste room.
` + excludesHelp,
		Example: `  rookery image publish debian12 debian12
  rookery image publish debian12 debian12:2026-07 --squash
  rookery image publish ./tree lab --parent debian12:4`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: words(completeTrees(dir), completeImages(dir)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkNewName(args[1]); err != nil {
				return err
			}
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			if err := p.publish(cmd, images, dir(), dir().tree(args[0]), args[1]); err != nil {
				return fmt.Errorf("publish %s: %w", args[1], err)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&p.parent, "parent", "", "version to store the difference to (default where the tree comes from)")
	f.BoolVar(&p.squash, "squash", false, "store the tree whole, in one layer")
	f.BoolVar(&p.checksum, "checksum", false, "compare contents too, not only sizes and times")
	f.BoolVar(&p.dry, "dry-run", false, "only say what changed")
	p.excludes.add(cmd)
	cmd.RegisterFlagCompletionFunc("parent", completeImages(dir))
	return cmd
}

func (p publisher) publish(cmd *cobra.Command, images *store.Store, dir stateDir, path, name string) error {
	began := time.Now()
	excludes, err := p.excludes.of(dir, name)
	if err != nil {
		return err
	}
	lock, err := chroot.Lock(path)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := finished(path); err != nil {
		return err
	}
	parent, why, err := p.findParent(cmd.Context(), images, path)
	if err != nil {
		return err
	}
	m := startMeter(cmd, "compare "+filepath.Base(path), 0)
	defer m.stop()
	t, err := tree.FromDir(path, excludes)
	if err != nil {
		return err
	}
	defer t.Close()
	if len(t.Entries) <= 1 {
		return fmt.Errorf("%s holds no files", path)
	}
	delta := &tree.Delta{Entries: t.Entries, Full: why}
	abs, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	config := store.Config{Comment: "published from " + abs, Labels: map[string]string{oci.LabelSource: abs}}
	if parent != nil {
		config.Architecture, config.Labels = parent.Architecture, maps.Clone(parent.Labels)
		if config.Labels == nil {
			config.Labels = map[string]string{}
		}
		config.Labels[oci.LabelParent] = parent.Name
		view, closeAll, err := openView(cmd.Context(), images, *parent)
		if err != nil {
			return err
		}
		defer closeAll()
		if delta, err = tree.Changes(cmd.Context(), view, t, p.checksum); err != nil {
			return err
		}
	}
	if p.comment != "" {
		config.Comment = p.comment
	}
	maps.Copy(config.Labels, p.labels)
	maps.DeleteFunc(config.Labels, func(_, value string) bool { return value == "" })
	m.stop()
	var lower []oci.Layer
	switch {
	case p.squash && (parent == nil || len(parent.Layers) > 1 || !delta.Unchanged):
		delta.Full, delta.Unchanged = "--squash", false
	case parent != nil && delta.Full == "":
		lower = parent.Layers
	}
	if delta.Full != "" {
		delta.Entries = t.Entries
	}
	changed := delta.Summary
	if parent == nil {
		changed = tree.Summary{Added: tree.Count{Names: len(t.Entries), Bytes: contentOf(t.Entries)}}
	}
	if p.dry {
		what := fmt.Sprintf("a layer with %s of content on %s", size(contentOf(delta.Entries)), size(sizeOf(lower)))
		if delta.Full != "" {
			what = fmt.Sprintf("one layer with all %s of content (%s)", size(contentOf(t.Entries)), delta.Full)
		} else if delta.Unchanged {
			what = "no new layer"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s would have: %s; %s\n", name, told(changed), what)
		return nil
	}
	var v store.Version
	if delta.Unchanged {
		v, err = numbered(cmd.Context(), images, name, func(name string) (store.Version, error) {
			return images.Publish(cmd.Context(), name, store.Publication{Lower: lower, Config: config})
		})
	} else {
		v, err = publishEntries(cmd, images, name, t, delta.Entries, lower, config)
	}
	if err != nil {
		return err
	}
	if err := tree.WriteOrigin(path, tree.Origin{Image: v.Name, Manifest: v.Manifest}); err != nil {
		return fmt.Errorf("%s is published, but not noted beside the tree: %w", v.Name, err)
	}
	what := fmt.Sprintf("%s; layer %s on %s shared", told(changed), size(v.Size-sizeOf(lower)), size(sizeOf(lower)))
	if delta.Unchanged {
		what = fmt.Sprintf("unchanged since %s, the same layers", parent.Name)
	} else if delta.Full != "" {
		what = fmt.Sprintf("%s; layer %s with everything (%s)", told(changed), size(v.Size), delta.Full)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %s, in %.1f s\n", v.Name, what, time.Since(began).Seconds())
	return nil
}

// sizeOf is how many bytes layers have.
func sizeOf(layers []oci.Layer) (n int64) {
	for _, l := range layers {
		n += l.Size
	}
	return n
}

// findParent is the version that the tree began as; where there is none it says why.
func (p publisher) findParent(ctx context.Context, images *store.Store, path string) (_ *store.Version, why string, err error) {
	name := p.parent
	o, err := tree.ReadOrigin(path)
	switch {
	case name != "":
	case errors.Is(err, fs.ErrNotExist):
		return nil, "no parent is known", nil
	case err != nil:
		return nil, "", err
	default:
		name = o.Image
	}
	v, err := images.Resolve(ctx, name)
	switch {
	case p.parent == "" && (errors.Is(err, store.ErrNotFound) || err == nil && v.Manifest != o.Manifest):
		return nil, fmt.Sprintf("its parent %s is gone", name), nil
	case err != nil:
		return nil, "", fmt.Errorf("parent: %w", err)
	}
	return &v, "", nil
}
