package seed_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rookery/image"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/image/tree"
	"rookery/server/fleet"
	"rookery/server/seed"
	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/transporttest"
	"rookery/wire"
)

func publish(t *testing.T, images *store.Store, name string) store.Version {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte(name), 0o644); err != nil {
		t.Fatal(err)
	}
	tr, err := tree.FromDir(dir, tree.Excludes{})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	v, err := images.Publish(t.Context(), name, store.Publication{Config: store.Config{Labels: map[string]string{oci.LabelLayout: `{"partitions":[]}`}}, Layer: func(w io.Writer) (image.Descriptor, error) { return image.Write(w, tr.Entries, tr.Open) }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func infohash(t *testing.T, images *store.Store, d wire.Digest) [20]byte {
	t.Helper()
	b, err := os.ReadFile(images.Path(d))
	if err != nil {
		t.Fatal(err)
	}
	info, err := transport.ParseTorrent(b)
	if err != nil {
		t.Fatal(err)
	}
	return info.InfoHash
}

func TestADamagedImageDoesNotKeepTheOthersOut(t *testing.T) {
	images, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	images.Torrent = transport.NewTorrent
	damaged, good := publish(t, images, "damaged:1"), publish(t, images, "good:1")
	if err := os.Remove(images.Path(damaged.Layers[0].Digest)); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s := &seed.Seeder{Store: images, Peer: swarm.NewPeer(ln, slog.New(slog.DiscardHandler))}
	if err := s.All(t.Context()); err == nil || !strings.Contains(err.Error(), "seed damaged:1: layer ") {
		t.Errorf("All: %v, want the damaged image named", err)
	}
	if !s.Known(infohash(t, images, good.Layers[0].Torrent)) {
		t.Error("the good image is not offered")
	}
	if s.Known(infohash(t, images, damaged.Layers[0].Torrent)) {
		t.Error("the damaged image is offered")
	}

	// Published by another process since.
	late := publish(t, images, "late:1")
	if s.Known(infohash(t, images, late.Layers[0].Torrent)) {
		t.Error("an image that nobody asked for is offered")
	}
	if i, err := s.Image(t.Context(), "late"); err != nil || i.Name != "late:1" {
		t.Errorf("Image: %+v, %v", i, err)
	}
	if !s.Known(infohash(t, images, late.Layers[0].Torrent)) {
		t.Error("an image that was asked for is not offered")
	}

	for _, d := range []wire.Digest{late.Layers[0].Digest, late.Layers[0].Torrent} {
		info, _, content, ok := s.Layer(d)
		if !ok {
			t.Fatalf("%s: not there", d)
		}
		b := make([]byte, info.Length)
		if _, err := content.ReadAt(b, 0); err != nil || d.Verify(b) != nil {
			t.Errorf("%s: %d bytes, %v", d, info.Length, err)
		}
	}
	if _, _, _, ok := s.Layer(damaged.Layers[0].Torrent); ok {
		t.Error("the torrent file of what is not offered is")
	}
}

// Pieces of anything else than the layer would have every node ban the server.
func TestATorrentOfSomethingElseIsNotOffered(t *testing.T) {
	images, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	images.Torrent = func(_ io.Reader, _ int64, d wire.Digest) ([]byte, error) {
		return transport.NewTorrent(strings.NewReader("other"), int64(len("other")), d)
	}
	v := publish(t, images, "wrong:1")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s := &seed.Seeder{Store: images, Peer: swarm.NewPeer(ln, slog.New(slog.DiscardHandler))}
	if _, err := s.Image(t.Context(), "wrong"); err == nil || !strings.Contains(err.Error(), "torrent is of 5 bytes") {
		t.Errorf("Image: %v, want both sizes", err)
	}
	if s.Known(infohash(t, images, v.Layers[0].Torrent)) {
		t.Error("the torrent is offered")
	}
}

// What the store has no more is offered to nobody new; who fetches it gets the
// rest.
func TestARemovedLayerIsWithdrawn(t *testing.T) {
	images, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	images.Torrent = transport.NewTorrent
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	peer := func() (*swarm.Peer, netip.AddrPort) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p := swarm.NewPeer(ln, slog.New(slog.DiscardHandler))
		running.Go(func() { _ = p.Run(ctx) })
		return p, netip.MustParseAddrPort(ln.Addr().String())
	}
	seeds, at := peer()
	track := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { // says where the server is
		compact := binary.BigEndian.AppendUint16(at.Addr().AsSlice(), at.Port())
		fmt.Fprintf(w, "d8:intervali1e5:peers6:%se", compact)
	}))
	defer track.Close()
	s := &seed.Seeder{Store: images, Peer: seeds, Tracker: track.URL}
	v, other := publish(t, images, "gone:1"), publish(t, images, "stays:1")
	if err := s.All(ctx); err != nil {
		t.Fatal(err)
	}
	torrent, err := os.ReadFile(images.Path(v.Layers[0].Torrent))
	if err != nil {
		t.Fatal(err)
	}
	info, err := transport.ParseTorrent(torrent)
	if err != nil {
		t.Fatal(err)
	}

	node, _ := peer()
	pieces := transport.NewPieces(info, transporttest.NewMemory(nil))
	pieces.Hold()
	joined := node.Add(pieces, swarm.Options{Trackers: []string{s.Tracker}})
	torrents := seeds.Torrents()
	served := torrents[slices.IndexFunc(torrents, func(t *swarm.Torrent) bool { return t.Pieces().Info().InfoHash == info.InfoHash })]
	transporttest.Until(t, func() bool { return joined.Peers() == 1 && served.Incomplete() == 1 })
	if _, err := images.Remove(ctx, "gone:1"); err != nil {
		t.Fatal(err)
	}
	if err := s.All(ctx); err != nil || !s.Known(info.InfoHash) {
		t.Errorf("All: %v; a node that is fetching is left alone: %v", err, !s.Known(info.InfoHash))
	}
	pieces.Want(transport.Range{Size: info.Length})
	<-pieces.Done()
	transporttest.Until(t, func() bool { return served.Incomplete() == 0 })
	if err := s.All(ctx); err != nil || s.Known(info.InfoHash) || len(seeds.Torrents()) != 1 {
		t.Errorf("All: %v; what is gone is still offered: %v", err, s.Known(info.InfoHash))
	}
	if !s.Known(infohash(t, images, other.Layers[0].Torrent)) {
		t.Error("what stays is withdrawn")
	}
}

func TestImages(t *testing.T) {
	images, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	v := publish(t, images, "debian12:1")
	find := seed.Images(images)
	if i, err := find(t.Context(), "debian12"); err != nil || i.Name != v.Name || i.Manifest != v.Manifest || i.Layout != `{"partitions":[]}` {
		t.Errorf("found %+v, %v, want %s with its layout", i, err, v.Name)
	}
	if _, err := find(t.Context(), "debian13"); !errors.Is(err, fleet.ErrNotFound) || !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v, want %v", err, fleet.ErrNotFound)
	}
	if err := os.Remove(images.Path(v.Manifest)); err != nil {
		t.Fatal(err)
	}
	again, err := store.Open(filepath.Dir(filepath.Dir(filepath.Dir(images.Path(v.Manifest)))))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := seed.Images(again)(t.Context(), "debian12"); err == nil || errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("%v: a damaged version is there", err)
	}
}

// What another process publishes is offered before anybody asks for it.
func TestRunKeepsUpWithTheStore(t *testing.T) {
	images, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	images.Torrent = transport.NewTorrent
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	synctest.Test(t, func(t *testing.T) {
		s := &seed.Seeder{Store: images, Peer: swarm.NewPeer(ln, slog.New(slog.DiscardHandler)), Log: slog.New(slog.DiscardHandler)}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Run(ctx) }()
		synctest.Wait()
		v := publish(t, images, "late:1")
		time.Sleep(2 * time.Minute) // of the bubble
		synctest.Wait()
		if !s.Known(infohash(t, images, v.Layers[0].Torrent)) {
			t.Error("what was published since is not offered")
		}
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}
