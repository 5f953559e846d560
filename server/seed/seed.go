// Package seed offers the layers of the image store to the swarm.
package seed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"rookery/image/oci"
	"rookery/image/store"
	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/wire"
)

// A Seeder serves layers from where they lie in the store. It is safe for use
// by many goroutines.
type Seeder struct {
	Store   *store.Store
	Peer    *swarm.Peer
	Tracker string // announce URL

	mu      sync.Mutex
	offered map[wire.Digest]bool // layers
	hashes  map[[20]byte]bool
}

// All offers every version in the store. One that is damaged does not keep the
// others out; the error tells of each.
func (s *Seeder) All(ctx context.Context) error {
	versions, err := s.Store.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range versions {
		errs = append(errs, s.offer(ctx, v))
	}
	return errors.Join(errs...)
}

// Image finds a version by name and offers its layers. Versions that another
// process published since the last call are found too.
func (s *Seeder) Image(ctx context.Context, name string) (wire.Image, error) {
	v, err := s.Store.Resolve(ctx, name)
	if err != nil {
		return wire.Image{}, err
	}
	return Named(v), s.offer(ctx, v)
}

// Named is what a script says of a version.
func Named(v store.Version) wire.Image { return wire.Image{Name: v.Name, Manifest: v.Manifest} }

// Known says whether a torrent is one of the store's.
func (s *Seeder) Known(infohash [20]byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hashes[infohash]
}

func (s *Seeder) offer(ctx context.Context, v store.Version) error {
	if v.Err != nil {
		return fmt.Errorf("seed %s: %w", v.Name, v.Err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range v.Layers {
		if s.offered[l.Digest] {
			continue
		}
		if err := s.open(ctx, l); err != nil {
			return fmt.Errorf("seed %s: layer %s: %w", v.Name, l.Digest, err)
		}
	}
	return nil
}

func (s *Seeder) open(ctx context.Context, l oci.Layer) error {
	torrent, err := s.Store.Blob(ctx, l.Torrent)
	if err != nil {
		return fmt.Errorf("torrent: %w", err)
	}
	defer torrent.Close()
	b, err := io.ReadAll(io.NewSectionReader(torrent, 0, min(torrent.Size(), transport.MaxTorrent)))
	if err != nil {
		return fmt.Errorf("torrent: %w", err)
	}
	info, err := transport.ParseTorrent(b)
	if err != nil {
		return err
	}
	f, err := s.Store.Blob(context.WithoutCancel(ctx), l.Digest) // it is served long after
	if err != nil {
		return err
	}
	if f.Size() != info.Length || info.Layer != l.Digest {
		f.Close()
		return fmt.Errorf("torrent is of %d bytes of %s, the layer has %d", info.Length, info.Layer, f.Size())
	}
	pieces := transport.NewPieces(info, layer{f})
	pieces.AllDone()
	s.Peer.Add(pieces, swarm.Options{Seeder: true, Trackers: []string{s.Tracker}})
	if s.offered == nil {
		s.offered, s.hashes = map[wire.Digest]bool{}, map[[20]byte]bool{}
	}
	s.offered[l.Digest], s.hashes[info.InfoHash] = true, true
	return nil
}

// A layer is complete, so nothing is ever written to it.
type layer struct{ store.Blob }

func (layer) WriteAt([]byte, int64) (int, error) { return 0, os.ErrPermission }
