package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"rookery/image"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/wire"
)

// A Source is an image that is somewhere else.
type Source struct {
	Manifest     wire.Digest // of a docker archive, which has none, the config's
	Created      time.Time   // zero where it does not say
	Architecture string      // as GOARCH writes it
	Labels       map[string]string
	Layers       []Layer // lowest first

	from   place
	config v1.Descriptor // zero in a docker archive
}

// Close lets go of the source and its layers.
func (s *Source) Close() error { return s.from.Close() }

// A place holds the blobs of a source. Their bytes are verified by nobody.
type place interface {
	Open(context.Context, store.Ref) (store.Blob, error)
	io.Closer
}

const (
	schemeLayout        = "oci:"
	schemeArchive       = "oci-archive:"
	schemeDockerArchive = "docker-archive:"
	schemeDocker        = "docker://"
)

// IsSource says whether a name is for Open: it begins with a scheme, or with
// the host of a registry and is no file.
func IsSource(source string) bool {
	for _, scheme := range []string{schemeLayout, schemeArchive, schemeDockerArchive, schemeDocker} {
		if strings.HasPrefix(source, scheme) {
			return true
		}
	}
	host, _, slash := strings.Cut(source, "/")
	if !slash || strings.Trim(host, ".") == "" || !strings.ContainsAny(host, ".:") && host != "localhost" {
		return false
	}
	_, err := os.Lstat(source)
	return errors.Is(err, fs.ErrNotExist)
}

// Open opens one of these:
//
//	oci:DIR[:REF]              an OCI layout
//	oci-archive:FILE[:REF]     a tar file of one
//	docker-archive:FILE[:REF]  what docker save or podman save wrote
//	[docker://]HOST[:PORT]/REPO[:TAG|@DIGEST]  in a registry
//
// Where there are several architectures, arch is taken, by default this
// machine's. Where there is one it is taken, unless arch says otherwise.
func Open(ctx context.Context, source, arch string, opts Options) (*Source, error) {
	s, err := open(ctx, source, arch, opts)
	if err == nil && arch != "" && s.Architecture != arch {
		err = fmt.Errorf("is for %s, not for %s", s.Architecture, arch)
		s.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	return s, nil
}

func open(ctx context.Context, source, arch string, opts Options) (*Source, error) {
	if rest, ok := strings.CutPrefix(source, schemeLayout); ok {
		dir, ref := splitRef(rest)
		index, err := os.ReadFile(filepath.Join(dir, "index.json"))
		if err != nil {
			return nil, err
		}
		return openLayout(ctx, layout(dir), index, ref, arch)
	}
	if rest, ok := strings.CutPrefix(source, schemeArchive); ok {
		file, ref := splitRef(rest)
		a, err := openArchive(file)
		if err != nil {
			return nil, err
		}
		index, err := a.read("index.json")
		if err != nil {
			a.Close()
			return nil, err
		}
		return openLayout(ctx, a, index, ref, arch)
	}
	if rest, ok := strings.CutPrefix(source, schemeDockerArchive); ok {
		file, ref := splitRef(rest)
		a, err := openArchive(file)
		if err != nil {
			return nil, err
		}
		s, err := openDocker(a, ref)
		if err != nil {
			a.Close()
		}
		return s, err
	}
	return openRemote(ctx, strings.TrimPrefix(source, schemeDocker), arch, opts)
}

// splitRef splits PATH[:REF], either of which may have colons in it.
func splitRef(s string) (file, ref string) {
	if _, err := os.Lstat(s); err == nil {
		return s, ""
	}
	for i := range len(s) {
		if s[i] != ':' {
			continue
		}
		if _, err := os.Lstat(s[:i]); err == nil {
			return s[:i], s[i+1:]
		}
	}
	file, ref, _ = strings.Cut(s, ":")
	return file, ref
}

// A layout is an OCI layout directory.
type layout string

func (layout) Close() error { return nil }

func (l layout) Open(_ context.Context, r store.Ref) (store.Blob, error) {
	f, err := os.Open(filepath.Join(string(l), blobPath(r.Digest)))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", store.ErrNotFound, err)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return file{f, st.Size()}, nil
}

type file struct {
	*os.File
	size int64
}

func (f file) Size() int64 { return f.size }

// blobPath is where a layout has a blob. The digest is checked.
func blobPath(d wire.Digest) string { return path.Join("blobs/sha256", d.Hex()) }

// Open makes an archive of a layout a place.
func (a *archive) Open(_ context.Context, r store.Ref) (store.Blob, error) {
	s, err := a.member(blobPath(r.Digest))
	if err != nil {
		return nil, err
	}
	return opened{s}, nil
}

func (a *archive) read(name string) ([]byte, error) {
	s, err := a.member(name)
	if err != nil {
		return nil, err
	}
	return read(opened{s})
}

// A sized is what bytes.Reader and io.SectionReader are.
type sized interface {
	io.ReaderAt
	Size() int64
}

// opened is what needs no closing.
type opened struct{ sized }

func (opened) Close() error { return nil }

// read reads a document.
func read(b store.Blob) ([]byte, error) {
	defer b.Close()
	if b.Size() > oci.MaxManifest {
		return nil, fmt.Errorf("%d bytes, at most %d are read", b.Size(), oci.MaxManifest)
	}
	doc := make([]byte, b.Size())
	if n, err := b.ReadAt(doc, 0); n < len(doc) {
		return nil, err
	}
	return doc, nil
}

// A repository is a place in a registry.
type repository struct {
	*client
	name.Repository
}

func (repository) Close() error { return nil }

func (r repository) Open(ctx context.Context, ref store.Ref) (store.Blob, error) {
	if !ref.Manifest {
		return r.open(ctx, r.Repository, ref.Digest)
	}
	d, err := r.puller.Get(ctx, r.Digest(string(ref.Digest)))
	if err != nil {
		return nil, said(r, err)
	}
	return opened{bytes.NewReader(d.Manifest)}, nil
}

func openRemote(ctx context.Context, ref, arch string, opts Options) (*Source, error) {
	n, err := name.ParseReference(ref, opts.names()...)
	if err != nil {
		return nil, err
	}
	c, err := newClient(opts)
	if err != nil {
		return nil, err
	}
	p := repository{c, n.Context()}
	d, err := c.puller.Get(ctx, n)
	if err != nil {
		return nil, said(p, err)
	}
	return openManifest(ctx, p, d.Descriptor, arch)
}

// openLayout opens what ref means in an index.json.
func openLayout(ctx context.Context, p place, index []byte, ref, arch string) (*Source, error) {
	d, err := chosen(index, ref, arch)
	if err == nil {
		var s *Source
		if s, err = openManifest(ctx, p, d, arch); err == nil {
			return s, nil
		}
	}
	p.Close()
	return nil, err
}

func chosen(index []byte, ref, arch string) (d v1.Descriptor, err error) {
	x, err := v1.ParseIndexManifest(bytes.NewReader(index))
	if err != nil {
		return d, fmt.Errorf("index.json: %w", err)
	}
	var found []v1.Descriptor
	var names []string
	for _, m := range x.Manifests {
		name := m.Annotations[oci.KeyRefName]
		if name != "" {
			names = append(names, name)
		}
		same := func(d v1.Descriptor) bool { return d.Digest == m.Digest }
		if (ref == "" || ref == name) && !slices.ContainsFunc(found, same) {
			found = append(found, m)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0 && ref != "":
		return d, fmt.Errorf("no image %q: there are %q", ref, names)
	case len(found) > 1 && ref == "" && len(names) > 0:
		return d, fmt.Errorf("holds %d images: say which after a colon, of %q", len(found), names)
	}
	return pick(found, arch)
}

// pick takes the image for an architecture, of those that run Linux.
func pick(manifests []v1.Descriptor, arch string) (d v1.Descriptor, err error) {
	if len(manifests) == 1 {
		return manifests[0], nil
	}
	if arch == "" {
		arch = runtime.GOARCH
	}
	var there []string
	for _, d := range manifests {
		if d.Platform == nil || d.Platform.OS == "unknown" { // a build's attestation
			continue
		}
		if d.Platform.OS == "linux" && d.Platform.Architecture == arch {
			return d, nil
		}
		there = append(there, d.Platform.String())
	}
	return d, fmt.Errorf("holds nothing for linux/%s: there are %q", arch, there)
}

// maxNesting is how many indexes may lead to a manifest.
const maxNesting = 4

func openManifest(ctx context.Context, p place, d v1.Descriptor, arch string) (*Source, error) {
	for range maxNesting {
		b, err := document(ctx, p, "manifest", d)
		if err != nil {
			return nil, err
		}
		if d.MediaType.IsIndex() {
			x, err := v1.ParseIndexManifest(bytes.NewReader(b))
			if err != nil {
				return nil, fmt.Errorf("index %s: %w", d.Digest, err)
			}
			if d, err = pick(x.Manifests, arch); err != nil {
				return nil, err
			}
			continue
		}
		if !d.MediaType.IsImage() {
			return nil, fmt.Errorf("manifest %s: is %.80q, no image", d.Digest, d.MediaType)
		}
		m, err := v1.ParseManifest(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
		return openImage(ctx, p, wire.Digest(d.Digest.String()), m)
	}
	return nil, fmt.Errorf("index in an index, %d deep", maxNesting)
}

// document reads a manifest or a config, and verifies it.
func document(ctx context.Context, p place, what string, d v1.Descriptor) ([]byte, error) {
	r := store.Ref{Digest: wire.Digest(d.Digest.String()), Manifest: what == "manifest"}
	err := r.Digest.Check()
	var b []byte
	if err == nil {
		var blob store.Blob
		if blob, err = p.Open(ctx, r); err == nil {
			if b, err = read(blob); err == nil {
				err = r.Digest.Verify(b)
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, d.Digest, err)
	}
	return b, nil
}

func openImage(ctx context.Context, p place, digest wire.Digest, m *v1.Manifest) (*Source, error) {
	b, err := document(ctx, p, "config", m.Config)
	if err != nil {
		return nil, err
	}
	s, err := described(b, len(m.Layers))
	if err != nil {
		return nil, err
	}
	s.Manifest, s.config, s.from = digest, m.Config, p
	for i, d := range m.Layers {
		if t := string(d.MediaType); !strings.Contains(t, "tar") || strings.Contains(t, "encrypted") {
			return nil, fmt.Errorf("layer %d: is %.80q, no layer of files", i, t)
		}
		l := &s.Layers[i]
		l.Digest, l.Size = wire.Digest(d.Digest.String()), d.Size
		if err := l.Digest.Check(); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		l.open = func(ctx context.Context) (store.Blob, error) { return p.Open(ctx, store.Ref{Digest: l.Digest}) }
	}
	return s, nil
}

// described is what a config says of an image, and of its layers.
func described(config []byte, layers int) (*Source, error) {
	c, err := v1.ParseConfigFile(bytes.NewReader(config))
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != layers || layers == 0 {
		return nil, fmt.Errorf("config: %d diff IDs for %d layers: no image of files", len(c.RootFS.DiffIDs), layers)
	}
	s := &Source{Created: c.Created.Time, Architecture: c.Architecture, Labels: c.Config.Labels}
	for i, d := range c.RootFS.DiffIDs {
		l := Layer{DiffID: wire.Digest(d.String()), n: i}
		if err := l.DiffID.Check(); err != nil {
			return nil, fmt.Errorf("config: diff ID %d: %w", i, err)
		}
		s.Layers = append(s.Layers, l)
	}
	return s, nil
}

// saved is an image in the manifest.json of a docker archive.
type saved struct {
	Config   string
	RepoTags []string
	Layers   []string // plain ones
}

func openDocker(a *archive, ref string) (*Source, error) {
	b, err := a.read("manifest.json")
	if err != nil {
		return nil, err
	}
	var all []saved
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("manifest.json: %w", err)
	}
	var found []saved
	var names []string
	for _, m := range all {
		// podman writes localhost/NAME:TAG, skopeo docker.io/library/NAME:TAG
		called := func(tag string) bool { return tag == ref || strings.HasSuffix(tag, "/"+ref) }
		if ref == "" || slices.ContainsFunc(m.RepoTags, called) {
			found = append(found, m)
		}
		names = append(names, m.RepoTags...)
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("holds %d images %q: say which after a colon, of %q", len(found), ref, names)
	}
	m := found[0]
	if b, err = a.read(m.Config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	s, err := described(b, len(m.Layers))
	if err != nil {
		return nil, err
	}
	s.Manifest, s.from = wire.DigestOf(b), a
	named := "sha256:" + strings.TrimSuffix(path.Base(m.Config), ".json")
	if d := wire.Digest(named); d.Check() == nil && d != s.Manifest {
		return nil, fmt.Errorf("config: digest is %s, want %s", s.Manifest, d)
	}
	for i, name := range m.Layers {
		r, err := a.member(name)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		s.Layers[i].Size = r.Size()
		s.Layers[i].open = func(context.Context) (store.Blob, error) { return opened{r}, nil }
	}
	return s, nil
}

// Own gives the image as a version of a store, to be copied as it is, when all
// of its layers were written by Rookery; otherwise nil. What manifests say of
// them is not needed: other tools drop it.
func (s *Source) Own(ctx context.Context) (*store.Store, store.Version, error) {
	m := oci.Manifest{
		SchemaVersion: 2, MediaType: oci.TypeManifest,
		Config:      oci.Content{MediaType: oci.TypeConfig, Digest: wire.Digest(s.config.Digest.String()), Size: s.config.Size},
		Annotations: map[string]string{oci.KeyVersion: ownName},
	}
	for i, l := range s.Layers {
		if l.Digest == "" {
			return nil, store.Version{}, nil
		}
		blob, err := l.open(ctx)
		if err != nil {
			return nil, store.Version{}, fmt.Errorf("layer %d: %w", i, err)
		}
		d, err := image.Describe(blob, l.Size)
		blob.Close()
		if errors.Is(err, image.ErrForeign) {
			return nil, store.Version{}, nil
		}
		if err != nil {
			return nil, store.Version{}, fmt.Errorf("layer %d: %w", i, err)
		}
		d.Digest, d.DiffID = l.Digest, l.DiffID
		m.Layers = append(m.Layers, oci.Layer{Descriptor: d}.Content())
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, store.Version{}, err
	}
	from := store.New(own{s.from, b})
	v, err := from.Resolve(ctx, ownName)
	return from, v, err
}

// ownName is what the only version of an own is called.
const ownName = "image:1"

// An own is a store of one version, to be read only.
type own struct {
	place
	manifest []byte
}

func (own) String() string { return "source" }

func (o own) Names(context.Context) ([]store.Name, error) {
	return []store.Name{{Name: ownName, Manifest: wire.DigestOf(o.manifest), Size: int64(len(o.manifest))}}, nil
}

func (o own) Open(ctx context.Context, r store.Ref) (store.Blob, error) {
	if r.Manifest {
		return opened{bytes.NewReader(o.manifest)}, nil
	}
	return o.place.Open(ctx, r)
}

func (own) Write(context.Context, func(store.Writer) error) error { return errors.ErrUnsupported }

func (own) Sweep(context.Context, bool, func([]store.Name) (map[wire.Digest]bool, error)) ([]oci.Content, error) {
	return nil, errors.ErrUnsupported
}
