package interop

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/transporttest"
)

// Ours find each other by another tracker, too. It refuses to run as root, so
// it has no namespace here and reads its list of torrents as nobody.
func TestOpentracker(t *testing.T) {
	t.Parallel()
	program, err := exec.LookPath("opentracker")
	if err != nil {
		t.Skip("no opentracker: apt install opentracker")
	}
	content, info := transporttest.Layer(t, 3, 64*64<<10)
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "torrents"), fmt.Appendf(nil, "%x\n", info.InfoHash), 0o644); err != nil {
		t.Fatal(err)
	}
	free := listen(t, "127.79.0.1")
	addr := free.Addr().(*net.TCPAddr)
	free.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, program, "-i", addr.IP.String(), "-p", fmt.Sprint(addr.Port), "-d", dir, "-w", "torrents")
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
		if t.Failed() {
			t.Logf("opentracker said: %s", &said)
		}
	})

	info.Trackers = []string{fmt.Sprintf("http://%s/announce", addr)}
	peer(t, "127.79.0.2").Add(transporttest.Seed(info, content), swarm.Options{Seeder: true})
	counted := fmt.Sprintf("http://%s/scrape?info_hash=%s", addr, url.PathEscape(string(info.InfoHash[:])))
	for !bytes.Contains(get(counted), []byte("8:completei1e")) {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("the server never announced itself")
		}
	}
	store := transporttest.NewMemory(nil)
	pieces := transport.NewPieces(info, store)
	if err := swarm.Source(peer(t, "127.79.0.3"), swarm.Options{}).Fetch(ctx, pieces); err != nil {
		t.Fatalf("%v: %d pieces missing", err, pieces.Missing())
	}
	if !bytes.Equal(store.Bytes(), content) {
		t.Error("not the layer that was sent")
	}
}

// get is what is at a URL, or nothing.
func get(at string) []byte {
	resp, err := http.Get(at)
	if err != nil {
		return nil
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return body
}
