package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"

	"rookery/image"
	"rookery/image/oci"
	"rookery/wire"
)

// A Damage is something of a version that is not what was published.
type Damage struct {
	Images []string    // the versions that have it
	What   string      // "manifest", "config", "layer 1", "torrent of layer 1", "name"
	Digest wire.Digest // of all that, when it was whole
	Place  string      // within a layer: "frame 17 at 123+456"
	Files  []string    // that have content there
	Err    error
}

func (d Damage) String() string {
	s := d.What
	if d.Digest != "" {
		s += " " + string(d.Digest)
	}
	if d.Place != "" {
		s += ": " + d.Place
	}
	s += ": " + d.Err.Error()
	if len(d.Files) > 0 {
		s += ": " + strings.Join(d.Files, ", ")
	}
	return s
}

// Verify reads all that versions are made of, each blob once, and says what of
// it is damaged or missing. An error says why it could not be told. progress,
// when not nil, is told how many of the bytes of layers were read.
func (s *Store) Verify(ctx context.Context, progress func(done, total int64), versions ...Version) ([]Damage, error) {
	names, err := s.backend.Names(ctx)
	if err != nil {
		return nil, err
	}
	c := check{s: s, ctx: ctx, have: map[Ref][]Damage{}}
	sizes := map[Ref]int64{}
	for _, v := range versions {
		for _, l := range v.Layers {
			sizes[c.ref(v, l.Digest)] = l.Size
		}
	}
	var total, before int64
	for _, size := range sizes {
		total += size
	}
	c.progress = func(done int64) {
		if progress != nil {
			progress(min(before+done, total), total) // of what cannot be read the size is not known
		}
	}
	c.passed = func(size int64) { before += size; c.progress(0) }
	for _, v := range versions {
		if err := c.version(names, v); err != nil {
			return nil, fmt.Errorf("verify %s: %w", v.Name, err)
		}
	}
	return c.damages(), nil
}

// A check is one run of Verify.
type check struct {
	s        *Store
	ctx      context.Context
	progress func(done int64) // of the layer at hand
	passed   func(size int64) // a layer is done
	have     map[Ref][]Damage
	order    []Ref
}

// ref is where v has a blob. In a directory, all have the same.
func (c *check) ref(v Version, d wire.Digest) Ref {
	if _, one := c.s.backend.(directory); one {
		return Ref{Digest: d}
	}
	return Ref{Repo: repoOf(v.Name), Digest: d}
}

func (c *check) damages() (all []Damage) {
	for _, r := range c.order {
		all = append(all, c.have[r]...)
	}
	return all
}

// blob notes what look finds of a blob of v, unless another version had it.
func (c *check) blob(v Version, what string, r Ref, look func() ([]Damage, error)) error {
	found, known := c.have[r]
	if !known {
		var err error
		found, err = look()
		switch {
		case c.ctx.Err() != nil:
			return context.Cause(c.ctx)
		case errors.Is(err, ErrNotFound):
			found = []Damage{{Err: ErrNotFound}}
		case err != nil:
			found = []Damage{{Err: err}}
		}
		for i := range found {
			found[i].What, found[i].Digest = what, r.Digest
		}
		c.order = append(c.order, r)
	}
	for i := range found {
		found[i].Images = append(found[i].Images, v.Name)
	}
	c.have[r] = found
	return nil
}

func (c *check) version(names []Name, v Version) error {
	var layers []oci.Layer
	var config oci.Content
	manifest := c.ref(v, v.Manifest)
	manifest.Manifest = true
	err := c.blob(v, "manifest", manifest, func() ([]Damage, error) {
		n, ok := find(names, v.Name)
		if !ok || n.Manifest != v.Manifest {
			return nil, fmt.Errorf("%s no longer means it", v.Name)
		}
		if err := c.s.verifyBlob(c.ctx, manifest, n.Size); err != nil {
			return nil, err
		}
		for _, tag := range alike(names, n) {
			if tag.Size != n.Size {
				return nil, fmt.Errorf("the store's index says of %s that it has %d bytes, not %d", tag.Name, tag.Size, n.Size)
			}
		}
		m, l, err := c.s.readManifest(c.ctx, n)
		if err == nil && m.Annotations[oci.KeyVersion] != v.Name {
			err = fmt.Errorf("was published as %q, not as %s", m.Annotations[oci.KeyVersion], v.Name)
		}
		layers, config = l, m.Config
		return nil, err
	})
	if err != nil || layers == nil {
		return err
	}
	r := c.ref(v, config.Digest)
	err = c.blob(v, "config", r, func() ([]Damage, error) {
		if err := c.s.verifyBlob(c.ctx, r, config.Size); err != nil {
			return nil, err
		}
		_, err := c.s.readConfig(c.ctx, r, len(layers))
		return nil, err
	})
	for i, l := range layers {
		if err != nil {
			return err
		}
		what := fmt.Sprintf("layer %d", i)
		r := c.ref(v, l.Digest)
		if err = c.blob(v, what, r, func() ([]Damage, error) { return c.layer(r, l) }); err != nil || l.Torrent == "" {
			continue
		}
		torrent := c.ref(v, l.Torrent)
		err = c.blob(v, "torrent of "+what, torrent, func() ([]Damage, error) { return nil, c.s.verifyBlob(c.ctx, torrent, -1) })
	}
	return err
}

func (c *check) layer(r Ref, l oci.Layer) (damages []Damage, err error) {
	defer c.passed(l.Size)
	b, err := c.s.backend.Open(c.ctx, r)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	found, err := image.VerifyLayer(stoppableAt{c.ctx, b}, l.Descriptor, c.progress)
	for _, d := range found {
		damages = append(damages, Damage{Place: fmt.Sprintf("%s at %d+%d", d.Part, d.Offset, d.Size), Files: d.Files, Err: d.Err})
	}
	return damages, err
}

// verifyBlob reads a blob and says what is wrong with it. A negative size is not
// known.
func (s *Store) verifyBlob(ctx context.Context, r Ref, size int64) error {
	b, err := s.backend.Open(ctx, r)
	if err != nil {
		return err
	}
	defer b.Close()
	if size >= 0 && b.Size() != size {
		return fmt.Errorf("%d bytes, want %d", b.Size(), size)
	}
	return copyVerified(io.Discard, stoppableAt{ctx, b}, b.Size(), r.Digest)
}

// copyVerified fails when what it copied is not what the digest says.
func copyVerified(w io.Writer, r io.ReaderAt, size int64, d wire.Digest) error {
	h := sha256.New()
	if _, err := io.CopyBuffer(io.MultiWriter(w, h), io.NewSectionReader(r, 0, size), make([]byte, 1<<20)); err != nil {
		return err
	}
	if got := wire.DigestSum([32]byte(h.Sum(nil))); got != d {
		return fmt.Errorf("digest is %s", got)
	}
	return nil
}

// A stoppableAt is a ReaderAt until ctx ends.
type stoppableAt struct {
	ctx context.Context
	r   io.ReaderAt
}

func (s stoppableAt) ReadAt(b []byte, off int64) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.r.ReadAt(b, off)
}
