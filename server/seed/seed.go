// Package seed offers the layers of the image store to the swarm.
package seed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"rookery/image/oci"
	"rookery/image/store"
	"rookery/server/fleet"
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
	Log     *slog.Logger

	changing sync.Mutex // held by who offers or withdraws, which takes its time
	mu       sync.Mutex
	offered  map[wire.Digest]*offer
}

// An offer is a layer that is served.
type offer struct {
	torrent *swarm.Torrent
	blob    store.Blob
	index   int64 // where it begins
}

func (o *offer) infohash() [20]byte { return o.torrent.Pieces().Info().InfoHash }

// All offers every version in the store, and withdraws what is not in it any
// more. A version that is damaged does not keep the others out; the error tells
// of each.
func (s *Seeder) All(ctx context.Context) error {
	versions, err := s.Store.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	listed := map[wire.Digest]bool{}
	for _, v := range versions {
		errs = append(errs, s.offer(ctx, v))
		for _, l := range v.Layers {
			listed[l.Digest] = true
		}
	}
	s.withdraw(ctx, listed)
	return errors.Join(errs...)
}

// keepUp is how often Run looks for what other processes did to the store.
const keepUp = time.Minute

// Run does as All does, again and again, until ctx ends.
func (s *Seeder) Run(ctx context.Context) error {
	said := fmt.Sprint(s.All(ctx)) // by whoever called All
	tick := time.NewTicker(keepUp)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := s.All(ctx)
		if text := fmt.Sprint(err); err != nil && ctx.Err() == nil && text != said {
			said = text
			s.Log.Error("not every image can be installed", "err", err)
		}
	}
}

// Image is fleet.Images, which offers the layers of what it finds. Versions
// that another process published are found too.
func (s *Seeder) Image(ctx context.Context, name string) (fleet.Image, error) {
	v, err := find(ctx, s.Store, name)
	if err != nil {
		return fleet.Image{}, err
	}
	return known(v), s.offer(ctx, v)
}

// Images finds versions for a fleet, and offers nothing.
func Images(images *store.Store) fleet.Images {
	return func(ctx context.Context, name string) (fleet.Image, error) {
		v, err := find(ctx, images, name)
		return known(v), err
	}
}

// missing is an error of the store that the fleet understands.
type missing struct{ error }

func (missing) Is(target error) bool { return target == fleet.ErrNotFound }
func (m missing) Unwrap() error      { return m.error }

func find(ctx context.Context, images *store.Store, name string) (store.Version, error) {
	v, err := images.Resolve(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		err = missing{err}
	}
	return v, err
}

func known(v store.Version) fleet.Image {
	return fleet.Image{Image: wire.Image{Name: v.Name, Manifest: v.Manifest}, Layout: v.Labels[oci.LabelLayout]}
}

// Known says whether a torrent is one of those that are offered.
func (s *Seeder) Known(infohash [20]byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.offered {
		if o.infohash() == infohash {
			return true
		}
	}
	return false
}

func (s *Seeder) offer(ctx context.Context, v store.Version) error {
	if v.Err != nil {
		return fmt.Errorf("seed %s: %w", v.Name, v.Err)
	}
	s.changing.Lock()
	defer s.changing.Unlock()
	for i, l := range v.Layers {
		if s.get(l.Digest) != nil {
			continue
		}
		o, err := s.open(ctx, l)
		if err != nil {
			return fmt.Errorf("seed %s: layer %d: %s: %w", v.Name, i, l.Digest, err)
		}
		s.set(l.Digest, o)
	}
	return nil
}

// Layer is a layer that is offered, the place of its index, and how to read it; or the
// torrent file of one.
func (s *Seeder) Layer(d wire.Digest) (info transport.Info, index int64, content io.ReaderAt, ok bool) {
	if o := s.get(d); o != nil {
		p := o.torrent.Pieces()
		return p.Info(), o.index, p, true
	}
	if t := s.described(d); t != nil {
		file := t.Pieces().Info().File
		return transport.InfoOf(d, int64(len(file))), 0, bytes.NewReader(file), true
	}
	return info, 0, nil, false
}

// Giver waits for a node that can pass a torrent file on; the zero value is this server.
func (s *Seeder) Giver(ctx context.Context, torrent wire.Digest) netip.AddrPort {
	if t := s.described(torrent); t != nil {
		return t.Giver(ctx)
	}
	return netip.AddrPort{}
}

// described is the torrent with a file, or nil.
func (s *Seeder) described(file wire.Digest) *swarm.Torrent {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range s.offered {
		if o.torrent.File() == file {
			return o.torrent
		}
	}
	return nil
}

// Quiet keeps a layer from being offered while nodes get it by multicast.
func (s *Seeder) Quiet(d wire.Digest, quiet bool) {
	if o := s.get(d); o != nil {
		o.torrent.Quiet(quiet)
	}
}

func (s *Seeder) get(layer wire.Digest) *offer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.offered[layer]
}

func (s *Seeder) set(layer wire.Digest, o *offer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.offered == nil {
		s.offered = map[wire.Digest]*offer{}
	}
	if s.offered[layer] = o; o == nil {
		delete(s.offered, layer)
	}
}

// withdraw stops offering the layers that the store has no more. Whoever is
// fetching one gets the rest: the file is open.
func (s *Seeder) withdraw(ctx context.Context, listed map[wire.Digest]bool) {
	s.changing.Lock()
	defer s.changing.Unlock()
	s.mu.Lock()
	all := maps.Clone(s.offered)
	s.mu.Unlock()
	for layer, o := range all {
		if listed[layer] || o.torrent.Incomplete() > 0 {
			continue
		}
		blob, err := s.Store.Blob(ctx, layer)
		if err == nil {
			blob.Close()
		}
		if !errors.Is(err, store.ErrNotFound) {
			continue
		}
		s.Peer.Remove(o.infohash())
		o.blob.Close()
		s.set(layer, nil)
	}
}

func (s *Seeder) open(ctx context.Context, l oci.Layer) (*offer, error) {
	torrent, err := s.Store.Blob(ctx, l.Torrent)
	if err != nil {
		return nil, fmt.Errorf("torrent: %w", err)
	}
	defer torrent.Close()
	b, err := io.ReadAll(io.NewSectionReader(torrent, 0, min(torrent.Size(), transport.MaxTorrent)))
	if err != nil {
		return nil, fmt.Errorf("torrent: %w", err)
	}
	info, err := transport.ParseTorrent(b)
	if err != nil {
		return nil, err
	}
	f, err := s.Store.Blob(context.WithoutCancel(ctx), l.Digest) // it is served long after
	if err != nil {
		return nil, err
	}
	if f.Size() != info.Length || info.Layer != l.Digest {
		f.Close()
		return nil, fmt.Errorf("torrent is of %d bytes of %s, the layer has %d", info.Length, info.Layer, f.Size())
	}
	pieces := transport.NewPieces(info, layer{f})
	pieces.AllDone()
	pieces.Prefer(l.IndexOffset, l.IndexSize) // nobody can begin without it
	return &offer{s.Peer.Add(pieces, swarm.Options{Seeder: true, Trackers: []string{s.Tracker}}), f, l.IndexOffset}, nil
}

// A layer is complete, so nothing is ever written to it.
type layer struct{ store.Blob }

func (layer) WriteAt([]byte, int64) (int, error) { return 0, os.ErrPermission }

// SyscallConn lets the kernel send what lies in a file.
func (l layer) SyscallConn() (syscall.RawConn, error) {
	if f, ok := l.Blob.(syscall.Conn); ok {
		return f.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
