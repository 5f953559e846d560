package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"rookery/image"
	"rookery/image/store"
	"rookery/image/tree"
	"rookery/transport"
)

func imageCommand(dir func() stateDir) *cobra.Command {
	return group("image", "Import and list images", imageImport(dir), imageList(dir), imageShow(dir))
}

func imageImport(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "import NAME:TAG SOURCE",
		Short: "Publish a root filesystem as a version of an image",
		Long: `Publish a root filesystem as a version of an image.

SOURCE is a directory or a tarball (plain, .gz, .xz or .zst). A version never
changes: to publish something else, use another tag. What is in /proc, /sys, /dev,
/run and /tmp of the source stays out of the image.`,
		Example: "  rookery image import debian12:1 debian12.tar",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, source := args[0], args[1]
			if err := store.CheckName(name); err != nil {
				return err
			}
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			began := time.Now()
			t, err := capture(source, dir().images())
			if err != nil {
				return fmt.Errorf("import %s: %w", name, err)
			}
			defer t.Close()
			if len(t.Entries) <= 1 { // the root itself
				return fmt.Errorf("import %s: %s holds no files", name, source)
			}
			v, err := images.Publish(cmd.Context(), name, store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) {
				return image.Write(stoppable{cmd.Context(), w}, t.Entries, t.Open)
			}, Config: store.Config{Comment: "imported from " + filepath.Base(source)}})
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %d files, %s in %.1f s, manifest %s\n",
				v.Name, len(t.Entries), size(v.Size), time.Since(began).Seconds(), v.Manifest)
			return nil
		},
	}
}

// capture lists what source holds. A compressed tarball is unpacked beside the
// images, where there has to be room anyway.
func capture(source, temp string) (*tree.Tree, error) {
	info, err := os.Stat(source)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return tree.FromDir(source, tree.Builtin())
	}
	return tree.FromTar(source, temp, tree.Builtin())
}

func openImages(dir stateDir) (*store.Store, error) {
	images, err := store.Open(dir.images())
	if err != nil {
		return nil, err
	}
	images.Torrent = transport.NewTorrent
	return images, nil
}

// imageView is what the commands show of a version.
type imageView struct {
	Name     string      `json:"name"`
	Manifest string      `json:"manifest"`
	Size     int64       `json:"size"` // bytes of the layers
	Created  time.Time   `json:"created"`
	Layers   []layerView `json:"layers"`
}

type layerView struct {
	Digest  string `json:"digest"`
	Size    int64  `json:"size"`
	Blob    string `json:"blob"` // path of the file
	Torrent string `json:"torrent"`
}

func viewImage(images *store.Store, v store.Version) imageView {
	view := imageView{Name: v.Name, Manifest: string(v.Manifest), Size: v.Size, Created: v.Created}
	for _, l := range v.Layers {
		view.Layers = append(view.Layers, layerView{
			Digest: string(l.Digest), Size: l.Size, Blob: images.Path(l.Digest), Torrent: string(l.Torrent),
		})
	}
	return view
}

func imageList(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the versions of all images",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			versions, err := images.List(cmd.Context())
			if err != nil {
				return err
			}
			views := []imageView{}
			for _, v := range versions {
				views = append(views, viewImage(images, v))
			}
			return show(cmd.OutOrStdout(), format, views, func(w io.Writer) {
				fmt.Fprintln(w, "IMAGE\tSIZE\tCREATED\tMANIFEST")
				for _, v := range views {
					fmt.Fprintf(w, "%s\t%s\t%s\t%.19s\n", v.Name, size(v.Size), v.Created.Format(time.DateTime), v.Manifest)
				}
			})
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

func imageShow(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "show NAME[:TAG]",
		Short: "Show one version and its layers; without TAG the newest",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			v, err := images.Resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			view := viewImage(images, v)
			return show(cmd.OutOrStdout(), format, view, func(w io.Writer) {
				fmt.Fprintf(w, "image\t%s\nmanifest\t%s\ncreated\t%s\nsize\t%s\n",
					view.Name, view.Manifest, view.Created.Format(time.DateTime), size(view.Size))
				for _, l := range view.Layers {
					fmt.Fprintf(w, "layer\t%s\t%s\nblob\t%s\n", l.Digest, size(l.Size), l.Blob)
				}
			})
		},
	}
	outputFlag(cmd, &format)
	return cmd
}
