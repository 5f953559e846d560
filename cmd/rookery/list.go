package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"rookery/image/oci"
	"rookery/image/store"
	"rookery/wire"
)

// imageView is what the commands show of a version.
type imageView struct {
	Name     string            `json:"name"`
	Tags     []string          `json:"tags"`
	Manifest wire.Digest       `json:"manifest"`
	Size     int64             `json:"size"` // bytes of the layers
	Own      int64             `json:"own"`  // bytes of those that no other version has
	Created  time.Time         `json:"created"`
	Source   string            `json:"source,omitempty"`
	Parent   string            `json:"parent,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Layers   []layerView       `json:"layers"`
	Error    string            `json:"error,omitempty"` // why nothing but its names is known
}

type layerView struct {
	Digest  wire.Digest `json:"digest"`
	DiffID  wire.Digest `json:"diffID"`
	Size    int64       `json:"size"`
	Blob    string      `json:"blob,omitempty"` // path of the file
	Torrent wire.Digest `json:"torrent,omitempty"`
	Index   indexView   `json:"index"`
}

// indexView says where in a layer its table of contents is.
type indexView struct {
	Offset int64       `json:"offset"`
	Size   int64       `json:"size"`
	Digest wire.Digest `json:"digest"`
}

// viewImages shows versions, which are all that a store has.
func viewImages(images *store.Store, all []store.Version) []imageView {
	views := []imageView{}
	users := map[wire.Digest]int{}
	for _, v := range all {
		for d := range layersOf(v) {
			users[d]++
		}
	}
	for _, v := range all {
		view := imageView{
			Name: v.Name, Tags: append([]string{}, v.Tags...), Manifest: v.Manifest, Size: v.Size, Created: v.Created,
			Source: v.Labels[oci.LabelSource], Parent: v.Labels[oci.LabelParent], Labels: v.Labels,
		}
		if v.Err != nil {
			view.Error = v.Err.Error()
		}
		for d, n := range layersOf(v) {
			if users[d] == 1 {
				view.Own += n
			}
		}
		for _, l := range v.Layers {
			view.Layers = append(view.Layers, layerView{
				Digest: l.Digest, DiffID: l.DiffID, Size: l.Size, Blob: images.Path(l.Digest), Torrent: l.Torrent,
				Index: indexView{l.IndexOffset, l.IndexSize, l.IndexDigest},
			})
		}
		views = append(views, view)
	}
	return views
}

// layersOf are the sizes of a version's layers, each once.
func layersOf(v store.Version) map[wire.Digest]int64 {
	sizes := map[wire.Digest]int64{}
	for _, l := range v.Layers {
		sizes[l.Digest] = l.Size
	}
	return sizes
}

func imageList(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "list [NAME...]",
		Short: "List versions: of all images, or of those named",
		Long: `List versions, in the order of their publication.

SIZE is what a machine fetches. OWN is what no other version shares: what removing
the version would give back.`,
		Example:           "  rookery image list\n  rookery image list debian12 -o json",
		ValidArgsFunction: completeImages(dir),
		RunE: func(cmd *cobra.Command, names []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			all, err := images.List(cmd.Context())
			if err != nil {
				return err
			}
			views := viewImages(images, all)
			if len(names) > 0 {
				if views, err = only(views, names); err != nil {
					return err
				}
			}
			return show(cmd.OutOrStdout(), format, views, func(w io.Writer) {
				fmt.Fprintln(w, "IMAGE\tTAGS\tSIZE\tOWN\tCREATED\tSOURCE")
				for _, v := range views {
					if v.Error != "" {
						fmt.Fprintf(w, "%s\t%s\t-\t-\t-\tcannot be read: %s\n", v.Name, strings.Join(v.Tags, ","), printable(v.Error))
						continue
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", v.Name, strings.Join(v.Tags, ","), size(v.Size), size(v.Own),
						v.Created.Local().Format(time.DateTime), printable(v.Source))
				}
			})
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

// only are the views of what is named: images, versions, tags.
func only(views []imageView, names []string) ([]imageView, error) {
	chosen := make([]bool, len(views))
	for _, name := range names {
		found := false
		for i, v := range views {
			repo, _, _ := strings.Cut(v.Name, ":")
			if name == repo || name == v.Name || slices.Contains(v.Tags, name) {
				chosen[i], found = true, true
			}
		}
		if !found {
			return nil, fmt.Errorf("image %q: %w", name, store.ErrNotFound)
		}
	}
	kept := []imageView{}
	for i, v := range views {
		if chosen[i] {
			kept = append(kept, v)
		}
	}
	return kept, nil
}

func imageShow(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:               "show NAME[:TAG]",
		Short:             "Show one version, where it comes from, and its layers; without TAG the newest",
		Example:           "  rookery image show debian12\n  rookery image show debian12:3 -o json",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: words(completeImages(dir)),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			v, err := images.Resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			all, err := images.List(cmd.Context())
			if err != nil {
				return err
			}
			views := viewImages(images, all)
			i := slices.IndexFunc(views, func(view imageView) bool { return view.Name == v.Name })
			if i < 0 {
				return fmt.Errorf("image %q: %w any more", v.Name, store.ErrNotFound)
			}
			return show(cmd.OutOrStdout(), format, views[i], func(w io.Writer) { describeImage(w, views[i]) })
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

func describeImage(w io.Writer, v imageView) {
	row := func(key, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", key, printable(fmt.Sprintf(format, args...)))
	}
	row("image", "%s", v.Name)
	if len(v.Tags) > 0 {
		row("tags", "%s", strings.Join(v.Tags, ", "))
	}
	row("manifest", "%s", v.Manifest)
	row("created", "%s", v.Created.Local().Format(time.DateTime))
	row("size", "%s, %s of it its own", size(v.Size), size(v.Own))
	for _, key := range slices.Sorted(maps.Keys(v.Labels)) {
		row(strings.TrimPrefix(key, "rookery."), "%s", v.Labels[key])
	}
	for _, l := range v.Layers {
		row("layer", "%s, %s", l.Digest, size(l.Size))
		if l.Blob != "" {
			row("  blob", "%s", l.Blob)
		}
	}
}
