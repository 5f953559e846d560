// Package store keeps layers and versions of images in an OCI layout directory
// (image-spec v1.1), so that skopeo and podman read what it holds.
package store

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/oci"
	"rookery/wire"
)

var (
	// ErrNotFound is wrapped where a name or a blob is not in the store.
	ErrNotFound = errors.New("not found")
	// ErrExists is wrapped where a version would have to change.
	ErrExists = errors.New("exists with other content")
)

// A Store is an OCI layout directory. Several processes may use one at once:
// publishing locks it, and what is read never changes.
type Store struct {
	// Torrent makes the metainfo file of a layer. Nil makes none; layers
	// published so cannot be had from a swarm.
	Torrent func(layer io.Reader, size int64, digest wire.Digest) ([]byte, error)

	dir string
}

// A Version is an image as it was published.
type Version struct {
	Name     string // "debian12:1"
	Manifest wire.Digest
	Size     int64 // of the layers, bytes
	Created  time.Time
	Layers   []oci.Layer
}

// A Config is what the publisher says about a version. It is part of what the
// manifest's digest covers.
type Config struct {
	Created      time.Time // zero means now
	Architecture string    // as GOARCH writes it; "" means this machine's
	Comment      string
}

// Open opens the store in dir and makes it when there is none.
func Open(dir string) (*Store, error) {
	s := &Store{dir: dir}
	if err := s.init(); err != nil {
		return nil, fmt.Errorf("image store %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) init() error {
	if err := os.MkdirAll(s.blobs(), 0o755); err != nil {
		return err
	}
	const layout = `{"imageLayoutVersion":"1.0.0"}`
	b, err := os.ReadFile(s.path("oci-layout"))
	if err == nil {
		var v struct {
			Version string `json:"imageLayoutVersion"`
		}
		if err := json.Unmarshal(b, &v); err != nil || v.Version != "1.0.0" {
			return fmt.Errorf("oci-layout is %.80q, want %s", b, layout)
		}
		_, err := s.readIndex()
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// oci-layout comes last: without it the store is made again.
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(s.path("index.json")); errors.Is(err, fs.ErrNotExist) {
		if err := s.writeIndex(oci.Index{SchemaVersion: 2, MediaType: oci.TypeIndex, Manifests: []oci.Content{}}); err != nil {
			return err
		}
	}
	return s.replace("oci-layout", []byte(layout))
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }
func (s *Store) blobs() string           { return s.path("blobs/sha256") }

// Path is where a blob lies, whether it is there or not.
func (s *Store) Path(d wire.Digest) string { return filepath.Join(s.blobs(), d.Hex()) }

// Blob opens a blob of any kind: manifest, config, layer, torrent. The caller
// closes it.
func (s *Store) Blob(d wire.Digest) (*os.File, int64, error) {
	if err := d.Check(); err != nil {
		return nil, 0, fmt.Errorf("image store: %w", err)
	}
	f, err := os.Open(s.Path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("image store: blob %s: %w", d, ErrNotFound)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("image store: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("image store: %w", err)
	}
	return f, st.Size(), nil
}

// readBlob reads and verifies a small blob.
func (s *Store) readBlob(d wire.Digest) ([]byte, error) {
	f, _, err := s.Blob(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := oci.ReadBounded(f)
	if err == nil {
		err = d.Verify(b)
	}
	if err != nil {
		return nil, fmt.Errorf("image store: blob %s: %w", d, err)
	}
	return b, nil
}

// List gives all versions in the order of their publication.
func (s *Store) List() ([]Version, error) {
	x, err := s.readIndex()
	if err != nil {
		return nil, err
	}
	var versions []Version
	for _, c := range x.Manifests {
		if name := c.Annotations[oci.KeyRefName]; name == "" || strings.HasSuffix(name, ":"+latest) {
			continue
		}
		v, err := s.version(c)
		if err != nil {
			return nil, err
		}
		versions = append(versions, v)
	}
	return versions, nil
}

// Resolve finds a version by name: "debian12:1", or "debian12" and
// "debian12:latest" for the one published last. The Version has its own name.
func (s *Store) Resolve(name string) (Version, error) {
	repo, tag, tagged := strings.Cut(name, ":")
	if !tagged {
		tag = latest
	}
	x, err := s.readIndex()
	if err != nil {
		return Version{}, err
	}
	c := find(x, repo+":"+tag)
	if c == nil {
		return Version{}, fmt.Errorf("image %q: %w", name, ErrNotFound)
	}
	if own := find(x, c.Annotations[oci.KeyVersion]); own != nil {
		c = own
	}
	return s.version(*c)
}

func find(x oci.Index, name string) *oci.Content {
	for i := range x.Manifests {
		if name != "" && x.Manifests[i].Annotations[oci.KeyRefName] == name {
			return &x.Manifests[i]
		}
	}
	return nil
}

// version reads what c, an entry of index.json, stands for.
func (s *Store) version(c oci.Content) (Version, error) {
	v := Version{Name: c.Annotations[oci.KeyRefName], Manifest: c.Digest}
	b, err := s.readBlob(c.Digest)
	if err != nil {
		return v, fmt.Errorf("image %q: %w", v.Name, err)
	}
	m, layers, err := oci.ParseManifest(b)
	if err != nil {
		return v, fmt.Errorf("image %q: %w", v.Name, err)
	}
	v.Layers = layers
	if b, err = s.readBlob(m.Config.Digest); err != nil {
		return v, fmt.Errorf("image %q: config: %w", v.Name, err)
	}
	var cfg oci.Config
	if err := json.Unmarshal(b, &cfg); err != nil {
		return v, fmt.Errorf("image %q: config: %w", v.Name, err)
	}
	if len(cfg.RootFS.DiffIDs) != len(v.Layers) {
		return v, fmt.Errorf("image %q: config has %d diff IDs, manifest %d layers", v.Name, len(cfg.RootFS.DiffIDs), len(v.Layers))
	}
	v.Created = cfg.Created
	for i := range v.Layers {
		v.Layers[i].DiffID = cfg.RootFS.DiffIDs[i]
		v.Size += v.Layers[i].Size
	}
	return v, nil
}

// latest is the tag that moves along.
const latest = "latest"

// A tag is what OCI allows; a name leaves out registries and slashes.
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,127}:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)

// CheckName says what keeps name from naming a version, or nil.
func CheckName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("image name %.80q: want NAME:TAG, of letters, digits, '.', '_' and '-'", name)
	}
	if strings.HasSuffix(name, ":"+latest) {
		return fmt.Errorf("image name %q: the tag %q follows the versions by itself", name, latest)
	}
	return nil
}

// Publish makes a new version of one layer, which layer writes; image.Write
// does. It is in the store completely or not at all. Publishing the same
// layer under the same name again gives the version that is there; another one
// is refused with ErrExists.
func (s *Store) Publish(name string, layer func(io.Writer) (image.Descriptor, error), cfg Config) (Version, error) {
	v, err := s.publish(name, layer, cfg)
	if err != nil {
		return Version{}, fmt.Errorf("publish %s: %w", name, err)
	}
	return v, nil
}

func (s *Store) publish(name string, layer func(io.Writer) (image.Descriptor, error), cfg Config) (Version, error) {
	if err := CheckName(name); err != nil {
		return Version{}, err
	}
	unlock, err := s.lock()
	if err != nil {
		return Version{}, err
	}
	defer unlock()
	if err := s.sweep(); err != nil {
		return Version{}, err
	}

	d, err := s.addLayer(layer)
	if err != nil {
		return Version{}, err
	}
	x, err := s.readIndex()
	if err != nil {
		return Version{}, err
	}
	if c := find(x, name); c != nil {
		old, err := s.version(*c)
		if err != nil {
			return Version{}, err
		}
		if have := old.Layers[0].Digest; have != d.Digest {
			s.dropUnused(x, d.Digest)
			return Version{}, fmt.Errorf("layer is %s, the version has %s: %w", d.Digest, have, ErrExists)
		}
		return old, nil
	}
	l := oci.Layer{Descriptor: d}
	if l.Torrent, err = s.addTorrent(d); err != nil {
		return Version{}, fmt.Errorf("torrent: %w", err)
	}
	return s.addVersion(x, name, l, cfg)
}

// dropUnused removes a layer that no version has.
func (s *Store) dropUnused(x oci.Index, d wire.Digest) {
	for _, c := range x.Manifests {
		v, err := s.version(c)
		if err != nil || slices.ContainsFunc(v.Layers, func(l oci.Layer) bool { return l.Digest == d }) {
			return // rather too much than too little is kept
		}
	}
	os.Remove(s.Path(d))
}

func (s *Store) addLayer(write func(io.Writer) (image.Descriptor, error)) (image.Descriptor, error) {
	var d image.Descriptor
	err := s.write(func(f *os.File) (string, error) {
		w := bufio.NewWriterSize(f, 1<<20)
		var err error
		if d, err = write(w); err != nil {
			return "", err
		}
		if err := w.Flush(); err != nil {
			return "", err
		}
		st, err := f.Stat()
		if err != nil {
			return "", err
		}
		if err := d.Check(); err != nil {
			return "", err
		}
		if st.Size() != d.Size {
			return "", fmt.Errorf("layer says %d bytes, wrote %d", d.Size, st.Size())
		}
		return s.Path(d.Digest), nil
	})
	return d, err
}

func (s *Store) addTorrent(d image.Descriptor) (wire.Digest, error) {
	if s.Torrent == nil {
		return "", nil
	}
	f, size, err := s.Blob(d.Digest)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := s.Torrent(f, size, d.Digest)
	if err != nil {
		return "", err
	}
	return s.addBlob(b)
}

func (s *Store) addVersion(x oci.Index, name string, l oci.Layer, cfg Config) (Version, error) {
	if cfg.Created.IsZero() {
		cfg.Created = time.Now()
	}
	created := cfg.Created.UTC().Truncate(time.Second)
	if cfg.Architecture == "" {
		cfg.Architecture = runtime.GOARCH
	}
	c := oci.Config{
		Created: created, Architecture: cfg.Architecture, OS: "linux",
		History: []oci.History{{Created: created, CreatedBy: "rookery", Comment: cfg.Comment}},
	}
	c.RootFS.Type = "layers"
	c.RootFS.DiffIDs = []wire.Digest{l.DiffID}
	configContent, err := s.addJSON(oci.TypeConfig, c)
	if err != nil {
		return Version{}, err
	}
	stamp := created.Format(time.RFC3339)
	entry, err := s.addJSON(oci.TypeManifest, oci.Manifest{
		SchemaVersion: 2, MediaType: oci.TypeManifest,
		Config: configContent, Layers: []oci.Content{l.Content()},
		Annotations: map[string]string{oci.KeyCreated: stamp},
	})
	if err != nil {
		return Version{}, err
	}
	entry.Annotations = map[string]string{oci.KeyRefName: name, oci.KeyCreated: stamp}
	repo, _, _ := strings.Cut(name, ":")
	alias := entry
	alias.Annotations = map[string]string{oci.KeyRefName: repo + ":" + latest, oci.KeyCreated: stamp, oci.KeyVersion: name}
	x.Manifests = slices.DeleteFunc(x.Manifests, func(c oci.Content) bool {
		return c.Annotations[oci.KeyRefName] == alias.Annotations[oci.KeyRefName]
	})
	x.Manifests = append(x.Manifests, entry, alias)
	if err := s.writeIndex(x); err != nil {
		return Version{}, err
	}
	return s.version(entry)
}

func (s *Store) addJSON(mediaType string, v any) (oci.Content, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return oci.Content{}, err
	}
	d, err := s.addBlob(b)
	return oci.Content{MediaType: mediaType, Digest: d, Size: int64(len(b))}, err
}

func (s *Store) addBlob(b []byte) (wire.Digest, error) {
	d := wire.DigestOf(b)
	return d, s.write(func(f *os.File) (string, error) {
		_, err := f.Write(b)
		return s.Path(d), err
	})
}

func (s *Store) readIndex() (x oci.Index, err error) {
	f, err := os.Open(s.path("index.json"))
	if err != nil {
		return x, err
	}
	defer f.Close()
	b, err := oci.ReadBounded(f)
	if err == nil {
		err = json.Unmarshal(b, &x)
	}
	if err == nil && x.SchemaVersion != 2 {
		err = fmt.Errorf("version %d, want 2", x.SchemaVersion)
	}
	if err != nil {
		return x, fmt.Errorf("image store %s: index.json: %w", s.dir, err)
	}
	return x, nil
}

func (s *Store) writeIndex(x oci.Index) error {
	b, err := json.Marshal(x)
	if err != nil {
		return err
	}
	return s.replace("index.json", b)
}

func (s *Store) replace(name string, b []byte) error {
	return s.write(func(f *os.File) (string, error) {
		_, err := f.Write(b)
		return s.path(name), err
	})
}

// unfinished begins the names of files that are being written.
const unfinished = ".unfinished-"

// write makes a file appear at once and for good: written beside, synced,
// renamed to where fill says, and the name synced too.
func (s *Store) write(fill func(*os.File) (path string, err error)) error {
	f, err := os.CreateTemp(s.dir, unfinished)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // nothing, once it is renamed
	path, err := fill(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// lock waits until nobody else publishes.
func (s *Store) lock() (unlock func() error, err error) {
	f, err := os.OpenFile(s.path(".lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
	return f.Close, nil
}

// sweep removes what a publisher that was killed left behind. The lock is held:
// nobody else is writing.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), unfinished) {
			if err := os.Remove(s.path(e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
