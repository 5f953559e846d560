// Package store keeps the fleet's records: JSON values under a kind and a name,
// changed only by those who have seen the latest revision. Open keeps them in
// one bbolt file, Memory in memory; storetest.Run says what both promise.
package store

import (
	"context"
	"errors"
	"fmt"
)

// ErrNotFound says that there is no record of that kind and name.
var ErrNotFound = errors.New("not found")

// ErrConflict says that a record was changed by someone else since it was read.
var ErrConflict = errors.New("changed by someone else meanwhile")

// A Record is one value of the store.
type Record struct {
	Kind, Name string // neither is empty
	Value      []byte // JSON
	Revision   uint64 // of the Put that wrote it; 0: there is no such record yet
}

// A Store keeps records. It is safe for use by many goroutines.
type Store interface {
	// Get returns one record, or ErrNotFound.
	Get(ctx context.Context, kind, name string) (Record, error)

	// List returns all records of one kind, sorted by name.
	List(ctx context.Context, kind string) ([]Record, error)

	// Put writes all of the records or none. Each must carry the revision that
	// the store has for it, 0 when it has none; otherwise the error is
	// ErrConflict. A record without a Value is deleted. When Put returns, the
	// records are on the disk; it returns their new revision, which is greater
	// than all before.
	Put(ctx context.Context, records ...Record) (revision uint64, err error)

	// Delete deletes one record that has the given revision: ErrNotFound,
	// ErrConflict.
	Delete(ctx context.Context, kind, name string, revision uint64) error

	// Close lets go of the file. Nothing else may be called afterwards.
	Close() error
}

func missing(kind, name string) error {
	return fmt.Errorf("store: %s %q: %w", kind, name, ErrNotFound)
}

// verify says whether r may be written over a record of revision now.
func verify(r Record, now uint64) error {
	if r.Kind == "" || r.Name == "" {
		return fmt.Errorf("store: record %q %q needs a kind and a name", r.Kind, r.Name)
	}
	if r.Revision != now {
		return fmt.Errorf("store: %s %q: revision is %d, not %d: %w", r.Kind, r.Name, now, r.Revision, ErrConflict)
	}
	return nil
}
