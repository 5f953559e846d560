package seed_test

import (
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"rookery/image"
	"rookery/image/store"
	"rookery/image/tree"
	"rookery/server/seed"
	"rookery/transport"
	"rookery/transport/swarm"
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
	v, err := images.Publish(t.Context(), name, store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) { return image.Write(w, tr.Entries, tr.Open) }})
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
