package install_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rookery/agent/install"
	"rookery/agent/install/installtest"
	"rookery/disklayout"
	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/store"
	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/tracker"
	"rookery/wire"
)

// sameAs checks that the root is what image.Extract makes of the version.
func (w *world) sameAs(t *testing.T, images *store.Store, version store.Version) {
	t.Helper()
	layers, done, err := images.Layers(t.Context(), version)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	dir := t.TempDir()
	if _, err := image.Extract(t.Context(), dir, w.in.Extract, layers...); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(w.machine.Root, "var")); err != nil { // our log
		t.Fatal(err)
	}
	imagetest.Same(t, imagetest.Snapshot(t, w.machine.Root)[1:], imagetest.Snapshot(t, dir)[1:]) // but the time of the root
}

func sum(sizes []int64) (total int64) {
	for _, n := range sizes {
		total += n
	}
	return total
}

// Of stacked layers only what is to be seen is fetched, and the root is the same
// as if all of them had been.
func TestStackOfLayers(t *testing.T) {
	images, versions := installtest.Stack(t, t.TempDir())
	for _, version := range versions {
		t.Run(version.Name, func(t *testing.T) {
			needed := installtest.Needed(t, images, version)
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, images, version)
				w.in.Memory = 1 << 20 // of all layers together
				if _, err := w.in.Run(t.Context()); err != nil {
					t.Fatal(err)
				}
				w.sameAs(t, images, version)
				if l := w.report.Last; l == nil || l.Done != l.Total || l.Total != sum(needed) || l.FromPeers != l.Total {
					t.Errorf("last transfer: %+v, want %d bytes", l, sum(needed))
				}
			})
			if len(needed) > 2 && (needed[0] > version.Layers[0].Size/2 || len(needed) > 3 && needed[1] > version.Layers[1].Size/2) {
				t.Errorf("%v bytes of %v are needed: this test shows nothing", needed, version.Layers)
			}
		})
	}
}

// A layer may be in a stack twice: what was changed, and changed back.
func TestALayerTwice(t *testing.T) {
	images, versions := installtest.Stack(t, t.TempDir())
	layers := versions[3].Layers
	twice, err := images.Publish(t.Context(), "tiny:5", store.Publication{Lower: append(slices.Clone(layers), layers[1])})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, images, twice)
		if _, err := w.in.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.sameAs(t, images, twice)
	})
}

// What an image has under the name of the staging would be removed with it.
func TestTheStagingIsInTheImage(t *testing.T) {
	images, version := installtest.Publish(t, t.TempDir())
	tree := imagetest.New().Add(image.Entry{Path: install.StagingDir, Type: image.Symlink, Link: "usr"})
	version, err := images.Publish(t.Context(), "tiny:2", store.Publication{Lower: version.Layers, Layer: func(w io.Writer) (image.Descriptor, error) {
		return image.Write(w, tree.Entries, tree.Open)
	}})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, images, version)
		_, err := w.in.Run(t.Context())
		if err == nil || !strings.Contains(err.Error(), "plan: image tiny:2: it has an entry .rookery,") || slices.Contains(w.machine.Calls, "partition") {
			t.Errorf("Run: %v after %v", err, w.machine.Calls)
		}
	})
}

func TestALayerIsLost(t *testing.T) {
	images, versions := installtest.Stack(t, t.TempDir())
	gone := errors.New("not found")
	for _, tt := range []struct {
		name  string
		piece int // the first that is there
		says  string
	}{
		{"all of it", 1 << 20, "plan: image tiny:2: layer 1: 16 of 16 pieces missing: fake: not found"},
		{"its beginning", 3, "fetch: layer 1: 3 of 16 pieces missing: fake: not found"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, images, versions[1])
				w.network.Pass = func(layer wire.Digest, piece int) error {
					if layer == versions[1].Layers[1].Digest && piece < tt.piece {
						return gone
					}
					return nil
				}
				_, err := w.in.Run(t.Context())
				if err == nil || err.Error() != tt.says || !errors.Is(err, gone) {
					t.Errorf("Run: %v, want %s", err, tt.says)
				}
			})
		})
	}
}

// slowMachine holds an installation up when everything is fetched.
type slowMachine struct {
	*installtest.Machine
	reached, goOn chan struct{}
}

func (m *slowMachine) Fixup(ctx context.Context, root string, plan disklayout.Plan, id wire.Identity) ([]string, error) {
	close(m.reached)
	<-m.goOn
	return m.Machine.Fixup(ctx, root, plan, id)
}

// Layers are swarms of their own: a node helps one that installs another version.
func TestNodesOfDifferentVersionsShare(t *testing.T) {
	images, versions := installtest.Stack(t, t.TempDir())
	server := httptest.NewServer(nil)
	defer server.Close()
	mux := http.NewServeMux()
	mux.Handle("GET "+wire.PathAnnounce, tracker.New(func([20]byte) bool { return true }))
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		blob, err := images.Blob(r.Context(), wire.Digest(path.Base(r.URL.Path)))
		if err != nil || strings.HasPrefix(r.URL.Path, wire.PathLayers) {
			http.NotFound(w, r)
			return
		}
		defer blob.Close()
		_, _ = io.Copy(w, io.NewSectionReader(blob, 0, blob.Size()))
	})
	server.Config.Handler = mux

	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	peer := func() *swarm.Peer {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p := swarm.NewPeer(ln, slog.New(slog.DiscardHandler))
		running.Go(func() { _ = p.Run(ctx) })
		return p
	}
	seeds, seeded := peer(), []transport.Info{}
	for _, l := range versions[2].Layers {
		torrent, err := os.ReadFile(images.Path(l.Torrent))
		if err != nil {
			t.Fatal(err)
		}
		info, err := transport.ParseTorrent(torrent)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(images.Path(l.Digest), os.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		pieces := transport.NewPieces(info, f)
		pieces.AllDone()
		seeds.Add(pieces, swarm.Options{Seeder: true, Trackers: []string{server.URL + wire.PathAnnounce}})
		seeded = append(seeded, info)
	}
	node := func(version store.Version) *world {
		w := newWorld(t, images, version)
		w.in.Network = &install.Site{Base: server.URL, Client: server.Client(), Peer: peer()}
		w.in.Script.Transports = []string{"bittorrent"}
		return w
	}

	first := node(versions[1])
	slow := &slowMachine{first.machine, make(chan struct{}), make(chan struct{})}
	first.in.Machine = slow
	ended := make(chan error, 1)
	go func() {
		_, err := first.in.Run(ctx)
		ended <- err
	}()
	select {
	case <-slow.reached:
	case err := <-ended:
		t.Fatal(err)
	}
	for _, info := range seeded[:2] { // from now on only the first node has these
		seeds.Remove(info.InfoHash)
	}
	second := node(versions[2])
	if _, err := second.in.Run(ctx); err != nil {
		t.Fatal(err)
	}
	second.sameAs(t, images, versions[2])
	needed := installtest.Needed(t, images, versions[2])
	if l := second.report.Last; l.FromPeers != needed[0]+needed[1] || l.FromServer != needed[2] || l.Total != sum(needed) {
		t.Errorf("last transfer: %+v, want %v bytes of the layers, of the last one alone from the server", l, needed)
	}

	// The first one has nobody to wait for: the other has what it wants.
	begin := time.Now()
	close(slow.goOn)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 30*time.Second {
		t.Errorf("lingered %v with nobody else there", took)
	}
	first.sameAs(t, images, versions[1])
}
