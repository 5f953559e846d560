package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"rookery/image/oci"
	"rookery/wire"
)

var (
	// ErrNotFound is wrapped where a name or a blob is not in the store.
	ErrNotFound = errors.New("not found")
	// ErrExists is wrapped where a version would have to change.
	ErrExists = errors.New("exists with other content")
)

// A Backend keeps blobs, and names that mean manifests. It knows nothing of
// what is in them. It may be shared by several processes; storetest.Run says
// what it promises.
type Backend interface {
	// Names lists all names, in the order in which they were set or, where
	// that is not known, in any.
	Names(ctx context.Context) ([]Name, error)

	// Open opens a blob, or ErrNotFound. Its bytes are verified by nobody. What
	// is read later on is read under the same ctx. It may ignore r.Repo, or
	// answer ErrNotFound where that is "".
	Open(ctx context.Context, r Ref) (Blob, error)

	// Write calls do with what it needs to add blobs and to change names. No
	// Sweep takes a blob away that do added or found, until it returns.
	Write(ctx context.Context, do func(Writer) error) error

	// Sweep removes every blob that used does not have, with what killed
	// writers left behind, and tells their digests and sizes. With dry it only
	// tells. used is given the names that there are at that moment. A backend
	// that collects its garbage by itself tells nothing.
	Sweep(ctx context.Context, dry bool, used func([]Name) (map[wire.Digest]bool, error)) ([]oci.Content, error)

	fmt.Stringer // "image store /var/lib/rookery/images"
}

// A Writer is what changes a Backend. All that it did is on the disk when it
// returns.
type Writer interface {
	// Add makes a blob of repo of what fill writes to f and names. It is there
	// completely or not at all; one that is there is replaced, or left when the
	// backend has verified it. fill may read f, and give an error to have it
	// forgotten.
	Add(ctx context.Context, repo string, fill func(f *os.File) (wire.Digest, error)) error

	// SetNames replaces the names by those that change makes of them: at once
	// where that is possible, else in their order, the removed ones last.
	// Where a Name of change is new or has moved, its Bytes are the manifest.
	SetNames(ctx context.Context, change func([]Name) ([]Name, error)) error
}

// A Name is what a store calls a manifest.
type Name struct {
	Name     string // NAME:TAG
	Manifest wire.Digest
	Size     int64  // of the manifest, in bytes
	Bytes    []byte // of the manifest: for SetNames only
}

// A Ref says which blob. A registry keeps each in a repository, and manifests
// apart from the others.
type Ref struct {
	Repo     string // the NAME of NAME:TAG
	Digest   wire.Digest
	Manifest bool
}

// A Blob is what a digest stands for: a layer, a torrent, a config, a manifest.
// It is read at any place by any number of goroutines, for the most part onward
// from where it was read last.
type Blob interface {
	io.ReaderAt
	io.Closer
	Size() int64
}
