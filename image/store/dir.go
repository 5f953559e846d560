package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image/oci"
	"rookery/wire"
)

// A directory is an OCI layout (image-spec v1.1). Blobs and index.json are
// replaced, never changed, so reading takes no lock. Who writes holds a shared
// lock on lockWriters, Sweep an exclusive one; names change under lockNames.
type directory struct{ dir string }

const (
	lockWriters = ".lock"
	lockNames   = ".lock-names"
)

// Open opens the store in dir and makes it when there is none.
func Open(dir string) (*Store, error) {
	d := directory{dir}
	err := d.init()
	if err == nil {
		_, err = d.names()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	return New(d), nil
}

func (d directory) String() string            { return "image store " + d.dir }
func (d directory) path(name string) string   { return filepath.Join(d.dir, name) }
func (d directory) blobs() string             { return d.path("blobs/sha256") }
func (d directory) blob(b wire.Digest) string { return filepath.Join(d.blobs(), b.Hex()) }
func (d directory) wrap(err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", d, err)
	}
	return err
}

func (d directory) init() error {
	const layout = `{"imageLayoutVersion":"1.0.0"}`
	b, err := os.ReadFile(d.path("oci-layout"))
	if err == nil {
		var v struct {
			Version string `json:"imageLayoutVersion"`
		}
		if err := json.Unmarshal(b, &v); err != nil || v.Version != "1.0.0" {
			return fmt.Errorf("oci-layout is %.80q, want %s", b, layout)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// What is in an image, such as /etc/shadow, is not for everybody.
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return err
	}
	// oci-layout comes last: without it the store is made again.
	if err := os.MkdirAll(d.blobs(), 0o755); err != nil {
		return err
	}
	unlock, err := d.lock(context.Background(), lockWriters, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	for _, dir := range []string{filepath.Dir(d.dir), filepath.Dir(d.blobs())} { // d.dir itself comes with the files
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	if _, err := os.Stat(d.path("index.json")); errors.Is(err, fs.ErrNotExist) {
		if err := d.writeIndex(nil); err != nil {
			return err
		}
	}
	return d.replace(d.path("oci-layout"), []byte(layout))
}

func (d directory) Names(context.Context) ([]Name, error) {
	names, err := d.names()
	return names, d.wrap(err)
}

func (d directory) names() ([]Name, error) {
	f, err := os.Open(d.path("index.json"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, oci.MaxIndex+1))
	if err != nil {
		return nil, err
	}
	x, err := oci.ParseIndex(b)
	if err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	names := make([]Name, len(x.Manifests))
	for i, c := range x.Manifests {
		names[i] = Name{Name: c.Annotations[oci.KeyRefName], Manifest: c.Digest, Size: c.Size}
	}
	return names, nil
}

func (d directory) writeIndex(names []Name) error {
	x := oci.Index{SchemaVersion: 2, MediaType: oci.TypeIndex, Manifests: []oci.Content{}}
	for _, n := range names {
		x.Manifests = append(x.Manifests, oci.Content{
			MediaType: oci.TypeManifest, Digest: n.Manifest, Size: n.Size,
			Annotations: map[string]string{oci.KeyRefName: n.Name},
		})
	}
	b, err := json.Marshal(x)
	if err == nil && len(b) > oci.MaxIndex {
		err = fmt.Errorf("index.json: %d bytes for %d names, at most %d are read", len(b), len(names), oci.MaxIndex)
	}
	if err != nil {
		return err
	}
	return d.replace(d.path("index.json"), b)
}

type file struct {
	*os.File
	size int64
}

func (f file) Size() int64 { return f.size }

func (d directory) Open(_ context.Context, r Ref) (Blob, error) {
	if err := r.Digest.Check(); err != nil { // it becomes a path
		return nil, d.wrap(err)
	}
	f, err := os.Open(d.blob(r.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, d.wrap(fmt.Errorf("blob %s: %w", r.Digest, ErrNotFound))
	}
	if err != nil {
		return nil, d.wrap(err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, d.wrap(err)
	}
	return file{f, st.Size()}, nil
}

// missing is how many bytes of v's layers are not there.
func (d directory) missing(v Version) (n int64) {
	seen := map[wire.Digest]bool{}
	for _, l := range v.Layers {
		if _, err := os.Stat(d.blob(l.Digest)); errors.Is(err, fs.ErrNotExist) && !seen[l.Digest] {
			n += l.Size
		}
		seen[l.Digest] = true
	}
	return n
}

func (d directory) Write(ctx context.Context, do func(Writer) error) error {
	// Nobody else is writing: what is unfinished was left by someone who was killed.
	if unlock, err := d.tryLock(lockWriters, unix.LOCK_EX); err == nil {
		_, err = d.sweepUnfinished(false)
		unlock()
		if err != nil {
			return d.wrap(err)
		}
	}
	unlock, err := d.lock(ctx, lockWriters, unix.LOCK_SH)
	if err != nil {
		return d.wrap(err)
	}
	defer unlock()
	return do(d)
}

func (d directory) Add(_ context.Context, _ string, fill func(*os.File) (wire.Digest, error)) error {
	return d.write(func(f *os.File) (string, error) {
		b, err := fill(f)
		if err == nil {
			err = b.Check()
		}
		return d.blob(b), err
	})
}

func (d directory) SetNames(ctx context.Context, change func([]Name) ([]Name, error)) error {
	unlock, err := d.lock(ctx, lockNames, unix.LOCK_EX)
	if err != nil {
		return d.wrap(err)
	}
	defer unlock()
	old, err := d.Names(ctx)
	if err != nil {
		return err
	}
	names, err := change(slices.Clone(old))
	if err != nil {
		return err
	}
	written := map[wire.Digest]bool{}
	for _, n := range names {
		if n.Bytes == nil || written[n.Manifest] {
			continue
		}
		if err := d.replace(d.blob(n.Manifest), n.Bytes); err != nil {
			return err
		}
		written[n.Manifest] = true
	}
	return d.writeIndex(names)
}

func (d directory) Sweep(ctx context.Context, dry bool, used func([]Name) (map[wire.Digest]bool, error)) (swept []oci.Content, err error) {
	unlock, err := d.lock(ctx, lockWriters, unix.LOCK_EX)
	if err != nil {
		return nil, d.wrap(err)
	}
	defer unlock()
	names, err := d.Names(ctx)
	if err != nil {
		return nil, err
	}
	keep, err := used(names)
	if err != nil {
		return nil, err
	}
	if swept, err = d.sweepUnfinished(dry); err != nil {
		return nil, d.wrap(err)
	}
	blobs, err := os.ReadDir(d.blobs())
	if err != nil {
		return nil, d.wrap(err)
	}
	for _, e := range blobs {
		b := wire.Digest("sha256:" + e.Name())
		if b.Check() != nil || keep[b] { // what is not ours stays
			continue
		}
		c, err := sweep(d.blob(b), dry)
		if err != nil {
			return swept, d.wrap(err)
		}
		c.Digest = b
		swept = append(swept, c)
	}
	return swept, nil
}

func (d directory) sweepUnfinished(dry bool) (swept []oci.Content, err error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), unfinished) {
			continue
		}
		c, err := sweep(d.path(e.Name()), dry)
		if err != nil {
			return nil, err
		}
		swept = append(swept, c)
	}
	return swept, nil
}

func sweep(path string, dry bool) (c oci.Content, err error) {
	st, err := os.Lstat(path)
	if err == nil && !dry {
		step("remove", path)
		err = os.Remove(path)
	}
	if err != nil {
		return c, err
	}
	return oci.Content{Size: st.Size()}, nil
}

// unfinished begins the names of files that are being written.
const unfinished = ".unfinished-"

// step is called before each change of the directory. A test stops there.
var step = func(what, path string) {}

func (d directory) replace(path string, b []byte) error {
	return d.write(func(f *os.File) (string, error) {
		_, err := f.Write(b)
		return path, err
	})
}

// write makes a file appear at once and for good: written beside, synced,
// renamed to where fill says, and the name synced too.
func (d directory) write(fill func(*os.File) (path string, err error)) error {
	step("create", d.dir)
	f, err := os.CreateTemp(d.dir, unfinished)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // nothing, once it is renamed
	step("write", f.Name())
	path, err := fill(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		step("sync", f.Name())
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	step("rename", path)
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	step("sync directory", path)
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// lock waits for a lock until ctx ends.
func (d directory) lock(ctx context.Context, name string, how int) (unlock func() error, err error) {
	for {
		unlock, err := d.tryLock(name, how)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return unlock, err
		}
		select {
		case <-time.After(10 * time.Millisecond): // flock(2) itself cannot be told to give up
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: somebody else has it: %w", name, context.Cause(ctx))
		}
	}
}

func (d directory) tryLock(name string, how int) (unlock func() error, err error) {
	f, err := os.OpenFile(d.path(name), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return f.Close, nil
}
