// Package interop has stock BitTorrent clients fetch from ours and ours from
// them.
package interop

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"rookery/netnstest"
	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/tracker"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// A client is other people's program. Its command fetches the layer of
// dir/layer.torrent to dir, or finds it there, and serves it at an address of
// its own, port 6881, until it is killed. Nothing but trackers tells it of peers.
type client struct {
	name    string
	command func(t *testing.T, addr, dir string) []string
}

var clients = []client{
	{"aria2", aria2},
	{"transmission", transmission},
	{"libtorrent", libtorrent},
	{"anacrolix", anacrolix},
}

// python is Debian's, which knows of Debian's modules.
const python = "/usr/bin/python3"

// installed skips the test unless every client is there: a swarm wants all.
func installed(t *testing.T) {
	t.Helper()
	for pkg, probe := range map[string][]string{
		"aria2":              {"aria2c", "--version"},
		"transmission-cli":   {"transmission-cli", "--version"},
		"python3-libtorrent": {python, "-c", "import libtorrent"},
	} {
		if err := exec.CommandContext(t.Context(), probe[0], probe[1:]...).Run(); err != nil {
			t.Skipf("%q: %v: apt install %s", probe, err, pkg)
		}
	}
}

func aria2(_ *testing.T, addr, dir string) []string {
	return []string{"aria2c", "--no-conf", "--dir=" + dir, "--listen-port=6881", "--interface=" + addr,
		"--enable-dht=false", "--enable-dht6=false", "--enable-peer-exchange=false", "--bt-enable-lpd=false",
		"--disable-ipv6=true", "--file-allocation=none", "--console-log-level=info", "--summary-interval=0",
		"--check-integrity=true", "--seed-ratio=0.0", dir + "/layer.torrent"}
}

// Without --verify, during which it ends itself when it happens to look.
func transmission(t *testing.T, addr, dir string) []string {
	config := t.TempDir()
	settings := fmt.Sprintf(`{"bind-address-ipv4": %q, "bind-address-ipv6": "::1", "dht-enabled": false,
		"lpd-enabled": false, "pex-enabled": false, "utp-enabled": false, "message-level": 3}`, addr)
	if err := os.WriteFile(filepath.Join(config, "settings.json"), []byte(settings), 0o644); err != nil {
		t.Fatal(err)
	}
	return []string{"transmission-cli", "--config-dir", config, "--download-dir", dir, "--port", "6881",
		"--no-portmap", dir + "/layer.torrent"}
}

func libtorrent(_ *testing.T, addr, dir string) []string {
	return []string{python, "testdata/client.py", addr, dir}
}

// built is where the test finds anacrolix's client, in its second life as well.
const built = "ROOKERY_ANACROLIX"

func anacrolix(_ *testing.T, addr, dir string) []string {
	return []string{os.Getenv(built), addr, dir}
}

// build makes anacrolix's client, which has a module of its own: the programs
// are not to depend on it.
func build(t *testing.T) {
	if os.Getenv(built) != "" {
		return
	}
	program := filepath.Join(t.TempDir(), "anacrolix")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", program, ".")
	cmd.Dir = "anacrolix"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, said)
	}
	t.Setenv(built, program)
}

// host counts up, so that every peer is a machine of its own.
var host atomic.Uint32

func address() string {
	n := host.Add(1)
	return fmt.Sprintf("10.77.%d.%d", n/250, n%250+1)
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", addr+":0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// A meeting is a layer, the tracker of its swarm and its torrent file, which
// names a dead tracker before the living one.
type meeting struct {
	content []byte
	info    transport.Info
	torrent []byte
	url     string // of the tracker
	tracker *tracker.Tracker
	arrival chan netip.Addr // who announces, and is complete

	ctx    context.Context // the test waits no longer
	cancel context.CancelCauseFunc
}

func meet(ctx context.Context, t *testing.T, seed uint64) *meeting {
	t.Helper()
	m := &meeting{arrival: make(chan netip.Addr, 1000)}
	m.ctx, m.cancel = context.WithCancelCause(ctx)
	m.content, m.info = transporttest.Layer(t, seed, 64*64<<10+4321)
	m.tracker = tracker.New(func(hash [20]byte) bool { return hash == m.info.InfoHash })
	ln := listen(t, address())
	m.url = fmt.Sprintf("http://%s%s", ln.Addr(), wire.PathAnnounce)
	web := &http.Server{Handler: m}
	var wg sync.WaitGroup
	wg.Go(func() { web.Serve(ln) })
	t.Cleanup(func() { web.Close(); wg.Wait() })

	dead := listen(t, address())
	dead.Close()
	refuses := fmt.Sprintf("http://%s/announce", dead.Addr())
	m.torrent = fmt.Appendf(nil, "d8:announce%d:%s13:announce-listll%d:%sel%d:%see%s",
		len(refuses), refuses, len(refuses), refuses, len(m.url), m.url, m.info.File[1:])
	var err error
	if m.info, err = transport.ParseTorrent(m.torrent); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *meeting) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.tracker.ServeHTTP(w, r)
	if r.FormValue("left") == "0" {
		select {
		case m.arrival <- netip.MustParseAddrPort(r.RemoteAddr).Addr():
		default:
		}
	}
}

// stock starts a client, which has the layer or not, and returns where it has it.
func (m *meeting) stock(t *testing.T, c client, has bool) (addr, file string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "layer.torrent"), m.torrent, 0o644); err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(dir, m.info.Name)
	if has {
		if err := os.WriteFile(file, m.content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	addr = address()
	args := c.command(t, addr, dir)
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		m.cancel(fmt.Errorf("%s ended: %v", c.name, cmd.Wait()))
	}()
	t.Cleanup(func() {
		<-ended // with t.Context
		if t.Failed() {
			t.Logf("%s said: %s", c.name, said.Bytes()[max(0, said.Len()-20_000):])
		}
	})
	return addr, file
}

// arrives waits until a client that is complete says so.
func (m *meeting) arrives(t *testing.T, addr string) {
	t.Helper()
	for {
		select {
		case who := <-m.arrival:
			if who.String() == addr {
				return
			}
		case <-m.ctx.Done():
			t.Fatalf("%s never announced that it is complete: %v", addr, context.Cause(m.ctx))
		}
	}
}

// serve starts our server and waits until the tracker knows it: anacrolix's
// client asks only once a minute.
func (m *meeting) serve(t *testing.T) *transport.Pieces {
	t.Helper()
	served, addr := transporttest.Seed(m.info, m.content), address()
	peer(t, addr).Add(served, swarm.Options{Seeder: true})
	m.arrives(t, addr)
	return served
}

// fetched waits until a client has all bytes in its file.
func (m *meeting) fetched(t *testing.T, c client, file string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		got, err := os.ReadFile(file)
		if err == nil && bytes.Equal(got, m.content) {
			return
		}
		select {
		case <-tick.C:
		case <-m.ctx.Done():
			t.Errorf("%s: %v: %d of %d bytes, %v", c.name, context.Cause(m.ctx), len(got), len(m.content), err)
			return
		}
	}
}

// peer runs one of ours at an address until the test ends.
func peer(t *testing.T, addr string) *swarm.Peer {
	t.Helper()
	p := swarm.NewPeer(listen(t, addr), slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return p
}

// All of it happens in a network of its own, since transmission wants no peer
// in 127.0.0.0/8.
func TestStockClients(t *testing.T) {
	installed(t)
	build(t)
	if !netnstest.Inside(t) {
		return
	}
	// Every address of a net on lo is this machine.
	for _, args := range [][]string{{"link", "set", "lo", "up"}, {"addr", "add", "10.77.0.0/16", "dev", "lo"}} {
		if said, err := exec.CommandContext(t.Context(), "ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v: %s", args, err, said)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Second) // all: go test's own end shows no logs
	t.Cleanup(cancel)
	for i, c := range clients {
		t.Run(c.name+" fetches from us", func(t *testing.T) {
			t.Parallel()
			m := meet(ctx, t, uint64(10+i))
			m.serve(t)
			_, file := m.stock(t, c, false)
			m.fetched(t, c, file)
		})
		t.Run("we fetch from "+c.name, func(t *testing.T) {
			t.Parallel()
			m := meet(ctx, t, uint64(20+i))
			addr, _ := m.stock(t, c, true)
			m.arrives(t, addr)
			store := transporttest.NewMemory(nil)
			pieces := transport.NewPieces(m.info, store)
			if err := swarm.Source(peer(t, address()), swarm.Options{}).Fetch(m.ctx, pieces); err != nil {
				t.Fatalf("%v: %d pieces missing", err, pieces.Missing())
			}
			if !bytes.Equal(store.Bytes(), m.content) {
				t.Error("not the layer that was sent")
			}
			if _, fromServer, fromPeers, _ := pieces.Transfer(); fromServer != 0 || fromPeers != m.info.Length {
				t.Errorf("%d bytes from servers and %d from peers, want all %d from a peer", fromServer, fromPeers, m.info.Length)
			}
		})
	}
	t.Run("all fetch together", func(t *testing.T) {
		t.Parallel()
		together(t, meet(ctx, t, 1), "")
	})
	// Nobody is told to ours, who so depend on whom the stock clients, which
	// are told of ours, connect to.
	t.Run("the stock clients serve us", func(t *testing.T) {
		t.Parallel()
		for i, p := range together(t, meet(ctx, t, 2), "?numwant=0") {
			if _, fromServer, fromPeers, _ := p.Transfer(); fromServer != 0 || fromPeers != p.Info().Length {
				t.Errorf("node %d: %d bytes from the server and %d from peers", i, fromServer, fromPeers)
			}
		}
	})
}

// together has our server as the only seed, and two of our nodes and one of each
// stock client fetch; the nodes announce with query.
func together(t *testing.T, m *meeting, query string) (nodes []*transport.Pieces) {
	t.Helper()
	served := m.serve(t)
	var wg sync.WaitGroup
	ours := m.info
	ours.Trackers = []string{m.url + query}
	for range 2 {
		store := transporttest.NewMemory(nil)
		pieces := transport.NewPieces(ours, store)
		nodes = append(nodes, pieces)
		source := swarm.Source(peer(t, address()), swarm.Options{})
		wg.Go(func() {
			if err := source.Fetch(m.ctx, pieces); err != nil {
				t.Errorf("%v: %d pieces missing", err, pieces.Missing())
			} else if !bytes.Equal(store.Bytes(), m.content) {
				t.Error("not the layer that was sent")
			}
		})
	}
	for _, c := range clients {
		_, file := m.stock(t, c, false)
		wg.Go(func() { m.fetched(t, c, file) })
	}
	wg.Wait()
	_, _, _, sent := served.Transfer()
	t.Logf("the server sent %.2f copies", float64(sent)/float64(m.info.Length))
	return nodes
}
