// Package store keeps layers and versions of images: in an OCI layout directory
// (image-spec v1.1), so that skopeo and podman read what it holds, or wherever
// else a Backend keeps blobs and names.
package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"rookery/image"
	"rookery/image/oci"
	"rookery/wire"
)

// A Store keeps versions, which never change, and tags, names of versions that
// may come to mean others. It is safe for use by many goroutines, and so is
// what it lies in by many processes.
type Store struct {
	// Torrent makes the metainfo file of a layer. Nil makes none; layers
	// published so cannot be had from a swarm.
	Torrent func(layer io.Reader, size int64, digest wire.Digest) ([]byte, error)

	// Read, when not nil, is told how many bytes were read of what Blob and Layers
	// opened, by any goroutine.
	Read func(n int)

	backend Backend

	mu    sync.Mutex
	known map[wire.Digest]Version // by manifest: what manifest and config say
	where map[wire.Digest]Ref     // each blob of what is known
}

// New is the store that b holds.
func New(b Backend) *Store {
	return &Store{backend: b, known: map[wire.Digest]Version{}, where: map[wire.Digest]Ref{}}
}

// A Version is an image as it was published.
type Version struct {
	Name         string   // "debian12:1"
	Tags         []string // other names it has now, "debian12:latest"
	Manifest     wire.Digest
	Size         int64 // of the layers, bytes
	Created      time.Time
	Architecture string // as GOARCH writes it
	Comment      string
	Labels       map[string]string
	Layers       []oci.Layer // lowest first

	// Err is why a version that List found cannot be read. Of such a version
	// there are only Name, Tags and Manifest.
	Err error
}

// latest is the tag that moves along.
const latest = "latest"

// Names are what both an OCI layout and a registry can hold: a repository of
// distribution-spec v1.1 without slashes, and a tag.
var (
	validRepo = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$`)
	validTag  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
)

// CheckName says what keeps name from naming a version, or nil.
func CheckName(name string) error {
	if err := checkTag(name); err != nil {
		return err
	}
	if strings.HasSuffix(name, ":"+latest) {
		return fmt.Errorf("image name %q: the tag %q follows the versions by itself", name, latest)
	}
	return nil
}

func checkTag(name string) error {
	repo, tag, _ := strings.Cut(name, ":")
	if len(repo) > 128 || !validRepo.MatchString(repo) || !validTag.MatchString(tag) {
		return fmt.Errorf("image name %.80q: want NAME:TAG, both of letters and digits, with '.', '_' and '-' between them, NAME in lower case", name)
	}
	return nil
}

func repoOf(name string) string {
	repo, _, _ := strings.Cut(name, ":")
	return repo
}

// List gives all versions, the oldest first. One that cannot be read has an Err.
func (s *Store) List(ctx context.Context) ([]Version, error) {
	names, err := s.backend.Names(ctx)
	if err != nil {
		return nil, err
	}
	versions, err := s.versions(ctx, names)
	if err != nil {
		return nil, err
	}
	s.forget(versions)
	return versions, nil
}

// Resolve finds a version by name: "debian12:1", or a tag of it; "debian12" is
// "debian12:latest", the one published last if nobody moved that tag.
func (s *Store) Resolve(ctx context.Context, name string) (Version, error) {
	names, err := s.backend.Names(ctx)
	if err != nil {
		return Version{}, err
	}
	v, err := s.resolve(ctx, names, name)
	if err != nil {
		return Version{}, fmt.Errorf("image %q: %w", name, err)
	}
	return v, nil
}

func (s *Store) resolve(ctx context.Context, names []Name, name string) (Version, error) {
	if !strings.Contains(name, ":") {
		name += ":" + latest
	}
	n, ok := find(names, name)
	if !ok {
		return Version{}, ErrNotFound
	}
	v, err := s.version(ctx, n)
	if errors.Is(err, ErrNotFound) { // the name is there
		err = errors.New(err.Error())
	}
	if err != nil {
		return Version{}, err
	}
	return named(v, alike(names, n)), nil
}

func find(names []Name, name string) (Name, bool) {
	i := slices.IndexFunc(names, func(n Name) bool { return n.Name == name })
	if i < 0 {
		return Name{}, false
	}
	return names[i], true
}

// alike are the names that mean what n means.
func alike(names []Name, n Name) (same []Name) {
	for _, m := range names {
		if m.Manifest == n.Manifest && repoOf(m.Name) == repoOf(n.Name) {
			same = append(same, m)
		}
	}
	return same
}

// named gives v its names: its own is the one it was published under, or the
// first of them if somebody else gave it others.
func named(v Version, names []Name) Version {
	if _, ok := find(names, v.Name); !ok {
		v.Name = names[0].Name
	}
	v.Tags = nil
	for _, n := range names {
		if n.Name != v.Name {
			v.Tags = append(v.Tags, n.Name)
		}
	}
	return v
}

// versions reads what names mean, the oldest first. Images that are none of ours, in a
// registry say, are left out.
func (s *Store) versions(ctx context.Context, names []Name) ([]Version, error) {
	type key struct {
		repo     string
		manifest wire.Digest
	}
	same := map[key][]Name{}
	var order []key
	for _, n := range names {
		k := key{repoOf(n.Name), n.Manifest}
		if same[k] == nil {
			order = append(order, k)
		}
		same[k] = append(same[k], n)
	}
	versions := make([]Version, len(order))
	each(len(order), func(i int) {
		group := same[order[i]]
		v, err := s.version(ctx, group[0])
		if err != nil {
			v = Version{Manifest: group[0].Manifest, Err: err}
		}
		versions[i] = named(v, group)
	})
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	versions = slices.DeleteFunc(versions, func(v Version) bool { return errors.Is(v.Err, errForeign) })
	slices.SortStableFunc(versions, func(a, b Version) int { return a.Created.Compare(b.Created) })
	return versions, nil
}

// each calls do for every i below n, several at a time: in a registry each is a
// request or two.
func each(n int, do func(i int)) {
	var all sync.WaitGroup
	next := make(chan int)
	for range min(n, 16) {
		all.Go(func() {
			for i := range next {
				do(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	all.Wait()
}

// errForeign is what a manifest is that Rookery did not write.
var errForeign = errors.New("not published by Rookery")

// version reads what n means. Name is what the manifest says.
func (s *Store) version(ctx context.Context, n Name) (Version, error) {
	s.mu.Lock()
	v, ok := s.known[n.Manifest]
	s.mu.Unlock()
	if ok {
		return v, nil
	}
	v, config, err := s.read(ctx, n)
	if err != nil {
		return Version{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[n.Manifest] = v
	repo := repoOf(n.Name)
	s.where[n.Manifest] = Ref{Repo: repo, Digest: n.Manifest, Manifest: true}
	s.where[config] = Ref{Repo: repo, Digest: config}
	for _, l := range v.Layers {
		s.where[l.Digest] = Ref{Repo: repo, Digest: l.Digest}
		s.where[l.Torrent] = Ref{Repo: repo, Digest: l.Torrent}
	}
	return v, nil
}

// read reads and verifies what says what n means.
func (s *Store) read(ctx context.Context, n Name) (v Version, config wire.Digest, err error) {
	m, layers, err := s.readManifest(ctx, n)
	if err != nil {
		return v, "", err
	}
	config = m.Config.Digest
	c, err := s.readConfig(ctx, Ref{Repo: repoOf(n.Name), Digest: config}, len(layers))
	if err != nil {
		return v, "", err
	}
	v.Name, v.Manifest, v.Layers = m.Annotations[oci.KeyVersion], n.Manifest, layers
	v.Created, v.Architecture, v.Labels = c.Created, c.Architecture, c.Config.Labels
	if len(c.History) > 0 {
		v.Comment = c.History[len(c.History)-1].Comment
	}
	for i := range v.Layers {
		v.Layers[i].DiffID = c.RootFS.DiffIDs[i]
		v.Size += v.Layers[i].Size
	}
	return v, config, nil
}

func (s *Store) readManifest(ctx context.Context, n Name) (m oci.Manifest, layers []oci.Layer, err error) {
	b, err := s.readBlob(ctx, Ref{Repo: repoOf(n.Name), Digest: n.Manifest, Manifest: true})
	if err != nil {
		return m, nil, fmt.Errorf("manifest: %w", err)
	}
	if int64(len(b)) != n.Size {
		return m, nil, fmt.Errorf("manifest: %d bytes, the store's index says %d", len(b), n.Size)
	}
	if m, layers, err = oci.ParseManifest(b); err != nil {
		return m, nil, fmt.Errorf("%w: %w", err, errForeign)
	}
	if CheckName(m.Annotations[oci.KeyVersion]) != nil {
		return m, nil, fmt.Errorf("manifest: %s is %.200q: %w", oci.KeyVersion, m.Annotations[oci.KeyVersion], errForeign)
	}
	return m, layers, nil
}

func (s *Store) readConfig(ctx context.Context, r Ref, layers int) (oci.Config, error) {
	b, err := s.readBlob(ctx, r)
	if err != nil {
		return oci.Config{}, fmt.Errorf("config: %w", err)
	}
	c, err := oci.ParseConfig(b, layers)
	if err != nil {
		err = fmt.Errorf("%w: %w", err, errForeign)
	}
	return c, err
}

// forget lets go of what is known of versions that are gone.
func (s *Store) forget(versions []Version) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) <= 2*len(versions)+100 {
		return
	}
	clear(s.known)
	clear(s.where)
}

// readBlob reads and verifies a small blob.
func (s *Store) readBlob(ctx context.Context, r Ref) ([]byte, error) {
	f, err := s.backend.Open(ctx, r)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > oci.MaxManifest {
		return nil, fmt.Errorf("blob %s: %d bytes, at most %d are read", r.Digest, f.Size(), oci.MaxManifest)
	}
	b := make([]byte, f.Size())
	n, err := f.ReadAt(b, 0)
	if n == len(b) {
		err = r.Digest.Verify(b)
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", r.Digest, err)
	}
	return b, nil
}

// Blob opens a blob of any kind: manifest, config, layer, torrent. The caller
// closes it, and ends ctx no earlier.
func (s *Store) Blob(ctx context.Context, d wire.Digest) (Blob, error) {
	b, err := s.open(ctx, s.ref(d))
	if _, all := s.backend.(directory); all || !errors.Is(err, ErrNotFound) {
		return b, err
	}
	// In which repository it is by now, the names tell.
	s.mu.Lock()
	clear(s.known)
	clear(s.where)
	s.mu.Unlock()
	if _, err := s.List(ctx); err != nil {
		return nil, err
	}
	r := s.ref(d)
	if r.Repo == "" {
		return nil, err
	}
	return s.open(ctx, r)
}

func (s *Store) open(ctx context.Context, r Ref) (Blob, error) {
	b, err := s.backend.Open(ctx, r)
	if err == nil && s.Read != nil {
		b = counted{b, s.Read}
	}
	return b, err
}

type counted struct {
	Blob
	read func(n int)
}

func (c counted) ReadAt(b []byte, off int64) (int, error) {
	n, err := c.Blob.ReadAt(b, off)
	c.read(n)
	return n, err
}

// ref is where a blob was seen last. Of one never seen there is no Repo.
func (s *Store) ref(d wire.Digest) Ref {
	s.mu.Lock()
	defer s.mu.Unlock()
	return cmp.Or(s.where[d], Ref{Digest: d})
}

// Path is where the file of a blob lies, whether it is there or not; "" when the
// store is no directory.
func (s *Store) Path(d wire.Digest) string {
	if dir, ok := s.backend.(directory); ok {
		return dir.blob(d)
	}
	return ""
}

// Layers opens the layers of a version, for image.ReadView or image.Extract.
// The caller closes them, and ends ctx no earlier.
func (s *Store) Layers(ctx context.Context, v Version) (layers []image.Layer, closeAll func() error, err error) {
	var blobs []Blob
	closeAll = func() error {
		var errs []error
		for _, b := range blobs {
			errs = append(errs, b.Close())
		}
		return errors.Join(errs...)
	}
	for i, l := range v.Layers {
		b, err := s.open(ctx, Ref{Repo: repoOf(v.Name), Digest: l.Digest})
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("image %q: layer %d: %w", v.Name, i, err)
		}
		blobs = append(blobs, b)
		layers = append(layers, image.Layer{Descriptor: l.Descriptor, Bytes: b})
	}
	return layers, closeAll, nil
}

// Next is the name that the next version of an image has when nobody gives it
// another: one more than the highest number there is.
func (s *Store) Next(ctx context.Context, repo string) (name string, err error) {
	names, err := s.backend.Names(ctx)
	if err != nil {
		return "", err
	}
	highest := 0
	for _, n := range names {
		tag, ok := strings.CutPrefix(n.Name, repo+":")
		if v, err := strconv.Atoi(tag); ok && err == nil {
			highest = max(highest, v)
		}
	}
	name = fmt.Sprintf("%s:%d", repo, highest+1)
	return name, CheckName(name)
}
