package swarm_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/transporttest"
)

// aria2 runs the stock client on a torrent file in dir, with all that looks
// for peers elsewhere switched off, until the test or the client ends.
func aria2(t *testing.T, dir, tracker string, args ...string) (wait func() error) {
	t.Helper()
	program, err := exec.LookPath("aria2c")
	if err != nil {
		t.Skip("no aria2c: apt install aria2")
	}
	cmd := exec.CommandContext(t.Context(), program, append([]string{
		"--no-conf", "--dir=" + dir, "--bt-tracker=" + tracker, "--listen-port=6901-6999", "--interface=127.0.0.1",
		"--enable-dht=false", "--enable-dht6=false", "--enable-peer-exchange=false", "--bt-enable-lpd=false",
		"--disable-ipv6=true", "--file-allocation=none", "--console-log-level=notice", "--summary-interval=0",
		filepath.Join(dir, "layer.torrent"),
	}, args...)...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	wait = sync.OnceValue(cmd.Wait)
	t.Cleanup(func() {
		cmd.Process.Kill()
		wait()
		if t.Failed() {
			t.Logf("aria2c: %s", &said)
		}
	})
	return wait
}

// inDir makes a directory with a torrent for aria2c and, when it is to have
// it, the layer.
func inDir(t *testing.T, info transport.Info, content []byte, layer bool) string {
	t.Helper()
	dir := t.TempDir()
	file, err := transport.NewTorrent(bytes.NewReader(content), info.Length, info.Layer)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "layer.torrent"), file, 0o644); err != nil {
		t.Fatal(err)
	}
	if layer {
		if err := os.WriteFile(filepath.Join(dir, info.Name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestAria2FetchesFromUs(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 20, 50*64<<10+4321)
	r, _ := meet(t, address())
	server, _, _ := start(t, address())
	server.Add(seed(info, transporttest.NewMemory(content)), swarm.Options{Seeder: true, Trackers: []string{r.url}})
	dir := inDir(t, info, content, false)
	if err := aria2(t, dir, r.url, "--seed-time=0")(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, info.Name))
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(content), err)
	}
}

func TestWeFetchFromAria2(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 21, 50*64<<10+4321)
	r, _ := meet(t, address())
	aria2(t, inDir(t, info, content, true), r.url, "--check-integrity=true", "--seed-ratio=0.0")
	node, _, _ := start(t, address())
	store := transporttest.NewMemory(nil)
	pieces := transport.NewPieces(info, store)
	fetch(t, node, pieces, r.url)
	same(t, store, content)
	if _, fromServer, fromPeers, _ := pieces.Transfer(); fromServer != 0 || fromPeers != info.Length {
		t.Errorf("%d bytes from servers and %d from peers, want all %d from a peer", fromServer, fromPeers, info.Length)
	}
}
