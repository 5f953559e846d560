package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"rookery/image"
	"rookery/image/oci"
	"rookery/image/registry"
	"rookery/image/store"
	"rookery/image/tree"
)

func imageImport(dir func() stateDir) *cobra.Command {
	var from importer
	cmd := &cobra.Command{
		Use:   "import NAME[:TAG] SOURCE",
		Short: "Make a version of a directory, a tarball or a container image",
		Long: `Make a version of a directory, a tarball or a container image. SOURCE is

  DIR                        a directory that holds a root filesystem
  FILE                       a tarball: plain, .gz, .xz or .zst; also tar:FILE
  oci:DIR[:REF]              an image in an OCI layout
  oci-archive:FILE[:REF]     the same in a tar file
  docker-archive:FILE[:REF]  what docker save and podman save write
  docker://HOST/REPO:TAG     an image in a registry; docker:// may be left out

What Rookery wrote itself is copied as it is; a container image becomes one layer.
A registry's password is the one that 'podman login' or 'docker login' left.
` + excludesHelp,
		Example: `  rookery image import debian12 debian12.tar.zst
  rookery image import debian12:2026-07 /srv/debian12 --exclude '/home/*'
  rookery image import debian12 docker://docker.io/library/debian:12`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: words(completeImages(dir), cobra.NoFileCompletions),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, source := args[0], args[1]
			if err := checkNewName(name); err != nil {
				return err
			}
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			from.cmd, from.images, from.dir = cmd, images, dir()
			if err := from.run(name, source); err != nil {
				return fmt.Errorf("import %s: %w", name, err)
			}
			return nil
		},
	}
	from.excludes.add(cmd)
	cmd.Flags().StringVar(&from.arch, "arch", "", "architecture as Go writes it: amd64, arm64 (default the source's, or this machine's)")
	insecureFlag(cmd, &from.registry)
	return cmd
}

// insecureFlag lets cmd speak to registries without TLS.
func insecureFlag(cmd *cobra.Command, opts *registry.Options) {
	cmd.Flags().BoolVar(&opts.Insecure, "insecure", false, "speak to registries on other machines in plain HTTP")
}

// An importer makes a version of something that is not in the store yet.
type importer struct {
	excludes excludeFlags
	arch     string
	registry registry.Options

	cmd    *cobra.Command
	images *store.Store
	dir    stateDir
}

func (i *importer) run(name, source string) error {
	excludes, err := i.excludes.of(i.dir, name)
	if err != nil {
		return err
	}
	source = strings.TrimPrefix(source, "tar:") // as export has it
	ctx, config := i.cmd.Context(), store.Config{Architecture: i.arch}
	if !registry.IsSource(source) {
		abs, err := filepath.Abs(source)
		if err != nil {
			return err
		}
		config.Labels = map[string]string{oci.LabelSource: abs}
		t, err := i.local(source, excludes)
		if err != nil {
			return err
		}
		if scheme := packed(source, t.Entries); scheme != "" {
			t.Close()
			return fmt.Errorf("%s holds a container image, which is %s%s", source, scheme, source)
		}
		return i.publish(name, source, t, config)
	}
	if scheme, _, ok := strings.Cut(source, "://"); ok && scheme != "docker" {
		return fmt.Errorf("%s: an image in a registry is docker://HOST/REPO:TAG", source)
	}
	src, err := registry.Open(ctx, source, i.arch, i.registry)
	if err != nil {
		return err
	}
	defer src.Close()
	if i.excludes.none() {
		from, v, err := src.Own(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", source, err)
		}
		if from != nil {
			made, err := copyVersion(i.cmd, i.images, from, v, name)
			if err != nil {
				return err
			}
			// It may be older than others of its name, and is the one that is wanted now.
			repo, _, _ := strings.Cut(made.Name, ":")
			return i.images.Tag(ctx, made.Name, repo+":latest")
		}
	}
	t, err := i.foreign(source, src, excludes)
	if err != nil {
		return err
	}
	config.Architecture = src.Architecture
	config.Labels = maps.Clone(src.Labels)
	if config.Labels == nil {
		config.Labels = map[string]string{}
	}
	config.Labels[oci.LabelSource] = source
	return i.publish(name, source, t, config)
}

// local lists a directory or a tarball.
func (i *importer) local(source string, excludes tree.Excludes) (*tree.Tree, error) {
	info, err := os.Stat(source)
	if err != nil {
		return nil, err
	}
	m := startMeter(i.cmd, "read "+filepath.Base(source), 0)
	defer m.stop()
	if info.IsDir() {
		if err := finished(source); err != nil {
			return nil, err
		}
		return tree.FromDir(source, excludes)
	}
	temp, err := i.dir.temp()
	if err != nil {
		return nil, err
	}
	m.set(0, info.Size())
	return tree.FromTar(i.cmd.Context(), source, temp, excludes, m.read)
}

// foreign unpacks the layers of a container image.
func (i *importer) foreign(source string, src *registry.Source, excludes tree.Excludes) (*tree.Tree, error) {
	temp, err := i.dir.temp()
	if err != nil {
		return nil, err
	}
	m := startMeter(i.cmd, "fetch "+source, 0)
	defer m.stop()
	var layers []tree.Stream
	for n, l := range src.Layers {
		layers = append(layers, tree.Stream{Name: fmt.Sprint(n), Open: func() (io.ReadCloser, error) {
			r, err := l.Open(i.cmd.Context())
			if err != nil {
				return nil, err
			}
			return m.reader(r), nil
		}})
	}
	return tree.FromLayers(temp, excludes, layers...)
}

// publish makes a version of t and closes it.
func (i *importer) publish(name, source string, t *tree.Tree, config store.Config) error {
	defer t.Close()
	if len(t.Entries) <= 1 { // the root itself
		return fmt.Errorf("%s holds no files", source)
	}
	if slices.ContainsFunc(t.Entries, func(e image.Entry) bool { return e.Path == image.Unfinished }) {
		return unfinished(source)
	}
	config.Comment = "imported from " + source
	began := time.Now()
	v, err := publishEntries(i.cmd, i.images, name, t, t.Entries, nil, config)
	if err != nil {
		return err
	}
	fmt.Fprintf(i.cmd.OutOrStdout(), "%s: %d files, %s of content; layer %s, in %.1f s\n",
		v.Name, len(t.Entries), size(contentOf(t.Entries)), size(v.Size), time.Since(began).Seconds())
	return nil
}

// packed is the scheme to import a source by whose files are not those of a root
// filesystem, but what container tools keep one in.
func packed(source string, entries []image.Entry) string {
	has := func(name string) bool {
		return slices.ContainsFunc(entries, func(e image.Entry) bool { return e.Path == name })
	}
	info, err := os.Stat(source)
	dir := err == nil && info.IsDir()
	switch layout := has("oci-layout") && has("index.json"); {
	case has("etc"), has("usr"), has("bin"):
		return ""
	case layout && dir:
		return "oci:"
	case has("manifest.json") && !dir: // newer docker save writes a layout, too
		return "docker-archive:"
	case layout:
		return "oci-archive:"
	}
	return ""
}

// publishEntries makes a version whose topmost layer, on the lower ones, holds
// these entries of t.
func publishEntries(cmd *cobra.Command, images *store.Store, name string, t *tree.Tree, entries []image.Entry, lower []oci.Layer, config store.Config) (store.Version, error) {
	m := startMeter(cmd, "publish "+name, contentOf(entries))
	defer m.stop()
	return numbered(cmd.Context(), images, name, func(name string) (store.Version, error) {
		m.set(0, contentOf(entries))
		return images.Publish(cmd.Context(), name, store.Publication{
			Lower: lower,
			Layer: func(w io.Writer) (image.Descriptor, error) {
				return image.Write(w, entries, func(e image.Entry) (io.ReadCloser, error) {
					m.add(e.Size) // whole files: around a file image.Write would not see its holes
					return t.Open(e)
				})
			},
			Config: config,
		})
	})
}

// contentOf is how many bytes the files of a tree hold.
func contentOf(entries []image.Entry) (n int64) {
	for i := range entries {
		n += entries[i].Size
	}
	return n
}
