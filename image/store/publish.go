package store

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"time"

	"rookery/image"
	"rookery/image/oci"
	"rookery/wire"
)

// A Config is what the publisher says about a version. It is part of what the
// manifest's digest covers.
type Config struct {
	Created      time.Time         // zero means now
	Architecture string            // as GOARCH writes it; "" means this machine's
	Comment      string            // where the topmost layer comes from
	Labels       map[string]string // see oci.LabelSource and its neighbours
}

// A Publication is what a version is made of.
type Publication struct {
	// Lower are layers that are in the store, of Version.Layers, the lowest first.
	Lower []oci.Layer
	// Layer writes one more, above them; image.Write does. Nil writes none.
	Layer  func(io.Writer) (image.Descriptor, error)
	Config Config
}

// Publish makes a new version, which NAME:latest then means. It is in the store
// completely or not at all. Publishing the same layers under the same name again
// gives the version that is there; others are refused with ErrExists.
func (s *Store) Publish(ctx context.Context, name string, p Publication) (Version, error) {
	v, err := s.publish(ctx, name, p)
	if err != nil {
		return Version{}, fmt.Errorf("publish %s: %w", name, err)
	}
	return v, nil
}

func (s *Store) publish(ctx context.Context, name string, p Publication) (v Version, err error) {
	if err := CheckName(name); err != nil {
		return v, err
	}
	if len(p.Lower) == 0 && p.Layer == nil {
		return v, errors.New("a version of no layers")
	}
	err = s.backend.Write(ctx, func(w Writer) error {
		repo := repoOf(name)
		var layers []oci.Layer
		for i, l := range p.Lower {
			l, err := s.carry(ctx, w, repo, s, l, false)
			if err != nil {
				return fmt.Errorf("lower layer %d: %w", i, err)
			}
			layers = append(layers, l)
		}
		if p.Layer != nil {
			fits := func(d image.Descriptor) error {
				_, err := s.published(ctx, name, append(layers, oci.Layer{Descriptor: d}))
				return err
			}
			top, err := s.addLayer(ctx, w, repo, p.Layer, fits)
			if err != nil {
				return err
			}
			layers = append(layers, top)
		}
		if v, err = s.published(ctx, name, layers); err != nil {
			return err
		}
		if v.Name != "" {
			v, err = s.again(ctx, w, v)
			return err
		}
		config, err := addJSON(ctx, w, repo, oci.TypeConfig, config(layers, p.Config))
		if err != nil {
			return fmt.Errorf("config: %w", err)
		}
		m := oci.Manifest{
			SchemaVersion: 2, MediaType: oci.TypeManifest, Config: config,
			Annotations: map[string]string{oci.KeyVersion: name},
		}
		for _, l := range layers {
			m.Layers = append(m.Layers, l.Content())
		}
		b, err := json.Marshal(m)
		if err != nil {
			return err
		}
		v, err = s.addVersion(ctx, w, name, b, time.Time{})
		return err
	})
	return v, err
}

// published is the version of that name, if there is one. With other layers it
// is an error.
func (s *Store) published(ctx context.Context, name string, layers []oci.Layer) (Version, error) {
	names, err := s.backend.Names(ctx)
	if err != nil {
		return Version{}, err
	}
	if _, ok := find(names, name); !ok {
		return Version{}, nil
	}
	v, err := s.resolve(ctx, names, name)
	switch {
	case err != nil:
		return v, fmt.Errorf("the version there cannot be read; remove it first: %w", err)
	case v.Name != name:
		return v, fmt.Errorf("is a tag of %s: %w", v.Name, ErrExists)
	case len(v.Layers) != len(layers):
		return v, fmt.Errorf("%d layers, the version has %d: %w", len(layers), len(v.Layers), ErrExists)
	}
	for i, l := range layers {
		if have := v.Layers[i].Digest; have != l.Digest {
			return v, fmt.Errorf("layer %d is %s, the version has %s: %w", i, l.Digest, have, ErrExists)
		}
	}
	return v, nil
}

// addLayer adds what write writes, with its torrent, if fits has no objection.
func (s *Store) addLayer(ctx context.Context, w Writer, repo string, write func(io.Writer) (image.Descriptor, error), fits func(image.Descriptor) error) (l oci.Layer, err error) {
	var torrent []byte
	err = w.Add(ctx, repo, func(f *os.File) (wire.Digest, error) {
		b := bufio.NewWriterSize(stoppable{ctx, f}, 1<<20)
		var err error
		if l.Descriptor, err = write(b); err != nil {
			return "", err
		}
		if err := b.Flush(); err != nil {
			return "", err
		}
		size, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return "", err
		}
		if err := errors.Join(l.Check(), l.DiffID.Check()); err != nil {
			return "", err
		}
		if size != l.Size {
			return "", fmt.Errorf("layer says %d bytes, wrote %d", l.Size, size)
		}
		if err := fits(l.Descriptor); err != nil {
			return "", err
		}
		torrent, err = s.torrent(f, l)
		return l.Digest, err
	})
	if err != nil || torrent == nil {
		return l, err
	}
	l.Torrent, err = addBytes(ctx, w, repo, torrent)
	return l, err
}

// torrent makes the torrent of a layer, or nil when none is wanted.
func (s *Store) torrent(layer io.ReaderAt, l oci.Layer) ([]byte, error) {
	if s.Torrent == nil {
		return nil, nil
	}
	b, err := s.Torrent(io.NewSectionReader(layer, 0, l.Size), l.Size, l.Digest)
	if err != nil {
		return nil, fmt.Errorf("torrent: %w", err)
	}
	return b, nil
}

// A stoppable is a Writer until ctx ends.
type stoppable struct {
	ctx context.Context
	w   io.Writer
}

func (s stoppable) Write(b []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.w.Write(b)
}

// carry has repo hold a layer, and its torrent, that from has.
func (s *Store) carry(ctx context.Context, w Writer, repo string, from *Store, l oci.Layer, mend bool) (oci.Layer, error) {
	if err := errors.Join(l.Check(), l.DiffID.Check()); err != nil {
		return l, err
	}
	if err := s.carryBlob(ctx, w, repo, from, l.Digest, l.Size, mend); err != nil {
		return l, err
	}
	if l.Torrent != "" {
		err := s.carryBlob(ctx, w, repo, from, l.Torrent, -1, mend)
		if s.Torrent == nil || !errors.Is(err, ErrNotFound) {
			return l, err
		}
	} else if s.Torrent == nil || mend {
		return l, nil
	}
	b, err := s.backend.Open(ctx, Ref{Repo: repo, Digest: l.Digest})
	if err != nil {
		return l, err
	}
	defer b.Close()
	torrent, err := s.torrent(b, l)
	if err != nil {
		return l, err
	}
	l.Torrent, err = addBytes(ctx, w, repo, torrent)
	return l, err
}

// carryBlob copies a blob and verifies it on its way. One that is there is left;
// with mend, only when it is whole. A negative size is not known.
func (s *Store) carryBlob(ctx context.Context, w Writer, repo string, from *Store, d wire.Digest, size int64, mend bool) error {
	there := Ref{Repo: repo, Digest: d}
	if mend {
		if err := s.verifyBlob(ctx, there, size); err == nil || ctx.Err() != nil {
			return err
		}
	} else if have, err := s.backend.Open(ctx, there); err == nil {
		got := have.Size()
		have.Close()
		if size < 0 || got == size {
			return nil
		}
	} else if !errors.Is(err, ErrNotFound) {
		return err
	}
	b, err := from.Blob(ctx, d)
	if err != nil {
		return err
	}
	defer b.Close()
	if size >= 0 && b.Size() != size {
		return fmt.Errorf("blob %s: %d bytes, want %d", d, b.Size(), size)
	}
	return w.Add(ctx, repo, func(f *os.File) (wire.Digest, error) {
		if err := copyVerified(f, stoppableAt{ctx, b}, b.Size(), d); err != nil {
			return "", fmt.Errorf("blob %s: %w", d, err)
		}
		return d, nil
	})
}

// Copy makes a version of from one of this store, under the same name or
// another, with the very same layers. Under the same name it is the same
// manifest, unless torrents are made that it had not. Where a directory has that
// version already, what of it is damaged is mended.
func (s *Store) Copy(ctx context.Context, from *Store, v Version, name string) (Version, error) {
	c, err := s.copy(ctx, from, v, name)
	if err != nil {
		return Version{}, fmt.Errorf("copy %s to %s: %w", v.Name, name, err)
	}
	return c, nil
}

func (s *Store) copy(ctx context.Context, from *Store, v Version, name string) (c Version, err error) {
	if err := CheckName(name); err != nil {
		return c, err
	}
	b, err := from.readBlob(ctx, Ref{Repo: repoOf(v.Name), Digest: v.Manifest, Manifest: true})
	if err != nil {
		return c, fmt.Errorf("manifest: %w", err)
	}
	m, _, err := oci.ParseManifest(b)
	if err != nil {
		return c, err
	}
	names, err := s.backend.Names(ctx)
	if err != nil {
		return c, err
	}
	old, exists := find(names, name)
	if exists && old.Manifest != v.Manifest {
		if c, err = s.published(ctx, name, v.Layers); err != nil {
			return c, err
		}
	}
	d, rots := s.backend.(directory) // a registry looks after its blobs
	if rots {
		if err := image.CheckFree(d.dir, d.missing(v)); err != nil {
			return c, err
		}
	}
	err = s.backend.Write(ctx, func(w Writer) error {
		repo := repoOf(name)
		if err := s.carryBlob(ctx, w, repo, from, m.Config.Digest, m.Config.Size, exists && rots); err != nil {
			return fmt.Errorf("config: %w", err)
		}
		same := m.Annotations[oci.KeyVersion] == name
		for i, l := range v.Layers {
			carried, err := s.carry(ctx, w, repo, from, l, exists && rots)
			if err != nil {
				return fmt.Errorf("layer %d: %w", i, err)
			}
			if carried.Torrent != l.Torrent {
				m.Layers[i], same = carried.Content(), false
			}
		}
		if c.Name != "" {
			c, err = s.again(ctx, w, c)
			return err
		}
		if !same {
			m.Annotations[oci.KeyVersion] = name
			if b, err = json.Marshal(m); err != nil {
				return err
			}
		}
		c, err = s.addVersion(ctx, w, name, b, v.Created)
		return err
	})
	return c, err
}

// config is what containers, and those who ask where the version comes from,
// read of it.
func config(layers []oci.Layer, cfg Config) oci.Config {
	if cfg.Created.IsZero() {
		cfg.Created = time.Now()
	}
	if cfg.Architecture == "" {
		cfg.Architecture = runtime.GOARCH
	}
	c := oci.Config{Created: cfg.Created.UTC().Truncate(time.Second), Architecture: cfg.Architecture, OS: "linux"}
	c.Config = oci.Run{
		Env:    []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Cmd:    []string{"/bin/sh"},
		Labels: cfg.Labels,
	}
	c.RootFS.Type = "layers"
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, l.DiffID)
		c.History = append(c.History, oci.History{Created: c.Created, CreatedBy: "rookery"})
	}
	c.History[len(layers)-1].Comment = cfg.Comment
	return c
}

// again does what is left to do for a version that is there: whoever published it
// may have been killed between its name and NAME:latest.
func (s *Store) again(ctx context.Context, w Writer, v Version) (Version, error) {
	b, err := s.readBlob(ctx, Ref{Repo: repoOf(v.Name), Digest: v.Manifest, Manifest: true})
	if err != nil {
		return v, fmt.Errorf("manifest: %w", err)
	}
	return s.addVersion(ctx, w, v.Name, b, v.Created)
}

// addVersion gives a manifest its name; its blobs are there. NAME:latest means it
// from now on, unless that is newer than created, when it is not zero.
func (s *Store) addVersion(ctx context.Context, w Writer, name string, b []byte, created time.Time) (v Version, err error) {
	if _, _, err := oci.ParseManifest(b); err != nil { // too many layers, say
		return v, err
	}
	n := Name{Name: name, Manifest: wire.DigestOf(b), Size: int64(len(b)), Bytes: b}
	var all []Name
	err = w.SetNames(ctx, func(names []Name) ([]Name, error) {
		if old, ok := find(names, name); ok && old.Manifest != n.Manifest {
			return nil, fmt.Errorf("published by somebody else meanwhile: %w", ErrExists)
		}
		tag := repoOf(name) + ":" + latest
		now, ok := find(names, tag)
		all = set(names, n)
		if ok && !created.IsZero() {
			if newer, err := s.version(ctx, now); err == nil && newer.Created.After(created) {
				return all, nil
			}
		}
		all = set(all, Name{Name: tag, Manifest: n.Manifest, Size: n.Size, Bytes: b})
		return all, nil
	})
	if err != nil {
		return v, err
	}
	return s.resolve(ctx, all, name)
}

// set gives a name a meaning. A new one comes last.
func set(names []Name, n Name) []Name {
	i := slices.IndexFunc(names, func(m Name) bool { return m.Name == n.Name && m.Manifest == n.Manifest })
	if i < 0 {
		return append(without(names, n.Name), n)
	}
	names[i] = n
	return names
}

func without(names []Name, name string) []Name {
	return slices.DeleteFunc(names, func(n Name) bool { return n.Name == name })
}

func addJSON(ctx context.Context, w Writer, repo, mediaType string, v any) (oci.Content, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return oci.Content{}, err
	}
	d, err := addBytes(ctx, w, repo, b)
	return oci.Content{MediaType: mediaType, Digest: d, Size: int64(len(b))}, err
}

func addBytes(ctx context.Context, w Writer, repo string, b []byte) (wire.Digest, error) {
	d := wire.DigestOf(b)
	return d, w.Add(ctx, repo, func(f *os.File) (wire.Digest, error) {
		_, err := f.Write(b)
		return d, err
	})
}
