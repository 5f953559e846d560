package swarm_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// A server gives a torrent file to few at a time, and names those who came with it to
// the others; these pass it on.
func TestTorrentFilesArePassedOn(t *testing.T) {
	meeting, _ := meet(t, "127.0.0.1:0")
	content, info := transporttest.Layer(t, 1, 3<<20)
	server, _, _ := start(t, "127.0.0.1:0")
	seeder := server.Add(transporttest.Seed(info, content), swarm.Options{Seeder: true, Trackers: []string{meeting.url}})
	if seeder.File() != wire.DigestOf(info.File) {
		t.Errorf("File: %s", seeder.File())
	}
	giver := func() netip.AddrPort {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		return seeder.Giver(ctx)
	}
	for n := range 4 {
		if node := giver(); node.IsValid() {
			t.Fatalf("asked %d times: %s has it, and nobody is there", n+1, node)
		}
	}

	node, at, stop := start(t, "127.0.0.1:0")
	held := transport.NewPieces(info, transporttest.NewMemory(nil))
	held.Hold()
	node.Add(held, swarm.Options{Trackers: []string{meeting.url}})
	var named netip.AddrPort
	for deadline := time.Now().Add(time.Minute); !named.IsValid() && time.Now().Before(deadline); {
		named = giver() // the server's own turns come again each second
	}
	if named.String() != at {
		t.Fatalf("named: %s, want %s", named, at)
	}
	get := func(path string) (int, []byte) {
		t.Helper()
		resp, err := http.Get("http://" + named.String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, b
	}
	if status, b := get(wire.PathTorrents + string(seeder.File())); status != http.StatusOK || !bytes.Equal(b, info.File) {
		t.Errorf("the torrent file: %d, %d bytes; want 200, %d bytes", status, len(b), len(info.File))
	}
	for _, path := range []string{"/", wire.PathTorrents, wire.PathTorrents + string(wire.DigestOf(nil)), wire.PathLayers + string(info.Layer)} {
		if status, b := get(path); status != http.StatusNotFound || len(b) > 0 {
			t.Errorf("%s: %d, %d bytes; want 404 and nothing", path, status, len(b))
		}
	}
	nc, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := nc.Write([]byte("GET " + strings.Repeat("x", 1<<16))); err != nil {
		t.Log(err) // it has hung up by then
	}
	if b, _ := io.ReadAll(nc); len(b) > 0 {
		t.Errorf("a line without end is answered with %q", b)
	}

	// Who is gone is not named.
	stop()
	for deadline := time.Now().Add(time.Minute); seeder.Peers() > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if node := giver(); node.IsValid() {
		t.Errorf("%s is named, and gone", node)
	}
}
