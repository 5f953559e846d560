package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// lockPatience is how long Open waits for another process to let go of the
// file: a server that is being restarted takes less.
const lockPatience = 3 * time.Second

// Values lie in one bucket per kind, under their name: eight bytes of revision,
// then the JSON. One more bucket, whose name is no kind, counts the revisions.
var counter = []byte("\x00revision")

const revisionSize = 8

type bolt struct{ db *bbolt.DB }

// Open opens the store in file and makes it when there is none. One process
// can hold it at a time.
func Open(file string) (Store, error) {
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{Timeout: lockPatience})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fmt.Errorf("store: %s: another rookery holds it", file)
	}
	if err != nil {
		return nil, fmt.Errorf("store: %s: %w", file, err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(counter)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("store: %s: %w", file, err), db.Close())
	}
	return &bolt{db}, nil
}

func (b *bolt) Get(_ context.Context, kind, name string) (r Record, err error) {
	err = b.db.View(func(tx *bbolt.Tx) error {
		r, err = get(tx, kind, name)
		return err
	})
	return r, err
}

func get(tx *bbolt.Tx, kind, name string) (Record, error) {
	bucket := tx.Bucket([]byte(kind))
	if bucket == nil {
		return Record{}, missing(kind, name)
	}
	v := bucket.Get([]byte(name))
	if v == nil {
		return Record{}, missing(kind, name)
	}
	return decode(kind, name, v)
}

func decode(kind, name string, v []byte) (Record, error) {
	if len(v) < revisionSize {
		return Record{}, fmt.Errorf("store: %s %q: value has %d bytes, want at least %d", kind, name, len(v), revisionSize)
	}
	return Record{
		Kind: kind, Name: name,
		Revision: binary.BigEndian.Uint64(v),
		Value:    bytes.Clone(v[revisionSize:]), // v is the file's own memory
	}, nil
}

func (b *bolt) List(_ context.Context, kind string) (all []Record, err error) {
	err = b.db.View(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket([]byte(kind))
		if bucket == nil {
			return nil
		}
		return bucket.ForEach(func(name, v []byte) error {
			r, err := decode(kind, string(name), v)
			all = append(all, r)
			return err
		})
	})
	return all, err
}

func (b *bolt) Put(_ context.Context, records ...Record) (revision uint64, err error) {
	err = b.db.Update(func(tx *bbolt.Tx) error {
		for _, r := range records {
			was, err := get(tx, r.Kind, r.Name)
			if err != nil && !errors.Is(err, ErrNotFound) {
				return err
			}
			if err := verify(r, was.Revision); err != nil {
				return err
			}
		}
		if revision, err = tx.Bucket(counter).NextSequence(); err != nil {
			return err
		}
		for _, r := range records {
			if err := put(tx, r, revision); err != nil {
				return fmt.Errorf("store: %s %q: %w", r.Kind, r.Name, err)
			}
		}
		return nil
	})
	return revision, err
}

func put(tx *bbolt.Tx, r Record, revision uint64) error {
	bucket, err := tx.CreateBucketIfNotExists([]byte(r.Kind))
	if err != nil {
		return err
	}
	if r.Value == nil {
		return bucket.Delete([]byte(r.Name))
	}
	v := binary.BigEndian.AppendUint64(nil, revision)
	return bucket.Put([]byte(r.Name), append(v, r.Value...))
}

func (b *bolt) Delete(ctx context.Context, kind, name string, revision uint64) error {
	if _, err := b.Get(ctx, kind, name); err != nil {
		return err
	}
	_, err := b.Put(ctx, Record{Kind: kind, Name: name, Revision: revision})
	return err
}

func (b *bolt) Close() error { return b.db.Close() }
