package registry

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"rookery/image/oci"
	"rookery/image/store"
	"rookery/wire"
)

// A backend keeps each image NAME in the repository PREFIX/NAME. A registry has
// no locks: of two who set the same name at once one wins.
type backend struct {
	*client
	registry name.Registry
	prefix   string // "" or "PREFIX/"
	names    []name.Option

	mu   sync.Mutex
	seen map[wire.Digest]name.Repository // where a blob was, to mount it from there
}

// New gives the store at HOST[:PORT]/PREFIX.
func New(place string, opts Options) (store.Backend, error) {
	host, prefix, _ := strings.Cut(strings.TrimSuffix(place, "/"), "/")
	b := &backend{names: opts.names(), seen: make(map[wire.Digest]name.Repository)}
	err := errors.New("want HOST[:PORT]/PREFIX")
	if host != "" {
		b.registry, err = name.NewRegistry(host, b.names...)
	}
	if prefix != "" && err == nil {
		b.prefix = prefix + "/"
		_, err = b.repository("name")
	}
	if err == nil {
		b.client, err = newClient(opts)
	}
	if err != nil {
		return nil, fmt.Errorf("registry %q: %w", place, err)
	}
	return b, nil
}

func (b *backend) String() string {
	return "registry " + strings.TrimSuffix(b.registry.Name()+"/"+b.prefix, "/")
}

func (b *backend) repository(repo string) (name.Repository, error) {
	return name.NewRepository(b.registry.Name()+"/"+b.prefix+repo, append([]name.Option{name.StrictValidation}, b.names...)...)
}

// askedAtOnce is how many manifests are asked for at a time.
const askedAtOnce = 8

func (b *backend) Names(ctx context.Context) ([]store.Name, error) {
	repos, err := b.puller.Catalog(ctx, b.registry)
	if err != nil {
		return nil, said(b.registry, err)
	}
	var names []store.Name
	var tags []name.Tag
	for _, full := range repos {
		repo, ours := strings.CutPrefix(full, b.prefix)
		if !ours || strings.Contains(repo, "/") {
			continue
		}
		r, err := b.repository(repo)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", b, err)
		}
		list, err := b.puller.List(ctx, r)
		if err = said(r, err); errors.Is(err, store.ErrNotFound) {
			continue // all its tags are gone
		}
		if err != nil {
			return nil, err
		}
		// Versions that were made in one second come in the order of their numbers.
		slices.SortFunc(list, func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) })
		for _, t := range list {
			tags = append(tags, r.Tag(t))
			names = append(names, store.Name{Name: repo + ":" + t})
		}
	}

	errs := make([]error, len(tags))
	next := make(chan int)
	var asking sync.WaitGroup
	for range min(askedAtOnce, len(tags)) {
		asking.Go(func() {
			for i := range next {
				d, err := b.puller.Head(ctx, tags[i])
				if errs[i] = said(tags[i].Context(), err); err == nil && d.MediaType == oci.TypeManifest {
					names[i].Manifest, names[i].Size = wire.Digest(d.Digest.String()), d.Size
				}
			}
		})
	}
	for i := range tags {
		next <- i
	}
	close(next)
	asking.Wait()
	for _, err := range errs {
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return nil, err
		}
	}
	// Others' images, names being removed, and what was removed meanwhile.
	return slices.DeleteFunc(names, func(n store.Name) bool { return n.Manifest == "" }), nil
}

func (b *backend) Open(ctx context.Context, r store.Ref) (store.Blob, error) {
	if err := r.Digest.Check(); err != nil {
		return nil, fmt.Errorf("%s: %w", b, err)
	}
	if r.Repo == "" {
		return nil, fmt.Errorf("%s: blob %s of no repository: %w", b, r.Digest, store.ErrNotFound)
	}
	repo, err := b.repository(r.Repo)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", b, err)
	}
	blob, err := repository{b.client, repo}.Open(ctx, r)
	if err != nil || r.Manifest {
		return blob, err
	}
	b.mu.Lock()
	b.seen[r.Digest] = repo
	b.mu.Unlock()
	return blob, nil
}

func (b *backend) Write(ctx context.Context, do func(store.Writer) error) error {
	pusher, err := remote.NewPusher(b.options()...)
	if err != nil {
		return fmt.Errorf("%s: %w", b, err)
	}
	return do(&writer{b, pusher})
}

// Sweep leaves it to the registry, which alone knows what it still needs.
func (b *backend) Sweep(context.Context, bool, func([]store.Name) (map[wire.Digest]bool, error)) ([]oci.Content, error) {
	return nil, nil
}

type writer struct {
	*backend
	pusher *remote.Pusher
}

func (w *writer) Add(ctx context.Context, repo string, fill func(*os.File) (wire.Digest, error)) error {
	r, err := w.repository(repo)
	if err != nil {
		return fmt.Errorf("%s: %w", w, err)
	}
	f, err := nameless()
	if err != nil {
		return err
	}
	defer f.Close()
	d, err := fill(f)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	w.mu.Lock()
	from, elsewhere := w.seen[d]
	w.seen[d] = r
	w.mu.Unlock()
	var layer v1.Layer = upload{d, f, st.Size()}
	if elsewhere && from.Name() != r.Name() {
		layer = &remote.MountableLayer{Layer: layer, Reference: from.Digest(string(d))}
	}
	return said(r, w.pusher.Upload(ctx, r, layer))
}

// An upload is a blob as the library wants it.
type upload struct {
	digest wire.Digest
	bytes  io.ReaderAt
	size   int64
}

func (u upload) Digest() (v1.Hash, error)             { return v1.NewHash(string(u.digest)) }
func (u upload) DiffID() (v1.Hash, error)             { return v1.Hash{}, errors.ErrUnsupported }
func (u upload) Size() (int64, error)                 { return u.size, nil }
func (u upload) MediaType() (types.MediaType, error)  { return oci.TypeLayer, nil }
func (u upload) Uncompressed() (io.ReadCloser, error) { return nil, errors.ErrUnsupported }
func (u upload) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(u.bytes, 0, u.size)), nil
}

func (w *writer) SetNames(ctx context.Context, change func([]store.Name) ([]store.Name, error)) error {
	old, err := w.Names(ctx)
	if err != nil {
		return err
	}
	names, err := change(slices.Clone(old))
	if err != nil {
		return err
	}
	was := make(map[string]wire.Digest)
	for _, n := range old {
		was[n.Name] = n.Manifest
	}
	is := make(map[string]bool)
	needed := make(map[string]bool) // NAME@DIGEST
	for _, n := range names {
		repo, _, _ := strings.Cut(n.Name, ":")
		is[n.Name], needed[repo+"@"+string(n.Manifest)] = true, true
		if was[n.Name] == n.Manifest {
			continue
		}
		t, err := w.tag(n.Name)
		if err != nil {
			return err
		}
		if err := w.put(ctx, t, oci.TypeManifest, n.Bytes); err != nil {
			return err
		}
	}
	for _, n := range old {
		if is[n.Name] {
			continue
		}
		t, err := w.tag(n.Name)
		if err != nil {
			return err
		}
		repo, _, _ := strings.Cut(n.Name, ":")
		if d := repo + "@" + string(n.Manifest); needed[d] {
			err = w.untag(ctx, t)
		} else { // with all of its names
			needed[d] = true
			err = w.remove(ctx, t.Context().Digest(string(n.Manifest)))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) tag(full string) (name.Tag, error) {
	repo, tag, _ := strings.Cut(full, ":")
	r, err := w.repository(repo)
	if err != nil {
		return name.Tag{}, fmt.Errorf("%s: %w", w, err)
	}
	return r.Tag(tag), nil
}

func (w *writer) put(ctx context.Context, ref name.Reference, mediaType string, b []byte) error {
	return said(ref.Context(), w.pusher.Put(ctx, ref, raw{b, types.MediaType(mediaType)}))
}

type raw struct {
	bytes     []byte
	mediaType types.MediaType
}

func (r raw) RawManifest() ([]byte, error)        { return r.bytes, nil }
func (r raw) MediaType() (types.MediaType, error) { return r.mediaType, nil }

func (w *writer) remove(ctx context.Context, ref name.Reference) error {
	err := said(ref.Context(), w.pusher.Delete(ctx, ref))
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return err
}

// untag takes a tag off a manifest that others still name. Distribution before
// 3.0 deletes no tags, only manifests with all their tags; so the tag is first
// put on a manifest that nothing else names.
func (w *writer) untag(ctx context.Context, t name.Tag) error {
	err := w.remove(ctx, t)
	var refused *transport.Error
	if !errors.As(err, &refused) || refused.StatusCode != http.StatusBadRequest && refused.StatusCode != http.StatusMethodNotAllowed {
		return err
	}
	empty := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[],"annotations":{"rookery.removed":%q}}`, oci.TypeIndex, t.TagStr()+" "+rand.Text())
	if err := w.put(ctx, t, oci.TypeIndex, empty); err != nil {
		return err
	}
	return w.remove(ctx, t.Context().Digest(string(wire.DigestOf(empty))))
}
