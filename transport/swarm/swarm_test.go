package swarm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anacrolix/torrent/bencode"

	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/transporttest"
)

// A rendezvous is a tracker that tells everybody of everybody else.
type rendezvous struct {
	url string

	mu    sync.Mutex
	peers map[netip.AddrPort]int64 // left
}

func (r *rendezvous) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	port, _ := strconv.Atoi(req.FormValue("port"))
	left, _ := strconv.ParseInt(req.FormValue("left"), 10, 64)
	self := netip.AddrPortFrom(netip.MustParseAddrPort(req.RemoteAddr).Addr(), uint16(port))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peers[self] = left
	if req.FormValue("event") == "stopped" {
		delete(r.peers, self)
	}
	answer := map[string]any{"interval": 1}
	incomplete, compact := 0, []byte{}
	for addr, left := range r.peers {
		if left > 0 {
			incomplete++
		}
		if addr != self {
			compact = append(compact, addr.Addr().AsSlice()...)
			compact = binary.BigEndian.AppendUint16(compact, addr.Port())
		}
	}
	answer["incomplete"], answer["peers"] = incomplete, string(compact)
	w.Write(bencode.MustMarshal(answer))
}

// meet starts a rendezvous at an address, or at any.
func meet(t *testing.T, addr string) (r *rendezvous, stop func()) {
	t.Helper()
	r = &rendezvous{peers: map[netip.AddrPort]int64{}}
	ln := listen(t, addr)
	r.url = "http://" + ln.Addr().String() + "/announce"
	server := &http.Server{Handler: r}
	var wg sync.WaitGroup
	wg.Go(func() { server.Serve(ln) })
	stop = func() { server.Close(); wg.Wait() }
	t.Cleanup(stop)
	return r, stop
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// host counts up, so that every peer of a test is a machine of its own: the
// whole of 127.0.0.0/8 is this one.
var host atomic.Uint32

func address() string {
	n := host.Add(1)
	return fmt.Sprintf("127.77.%d.%d:0", n/250, n%250+1)
}

// start runs a peer at addr until the test ends or it is stopped.
func start(t *testing.T, addr string) (p *swarm.Peer, at string, stop func()) {
	t.Helper()
	ln := listen(t, addr)
	p = swarm.NewPeer(ln, logger(t))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return p, ln.Addr().String(), stop
}

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func fetch(t *testing.T, p *swarm.Peer, pieces *transport.Pieces, tracker string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := swarm.Source(p, swarm.Options{Trackers: []string{tracker}}).Fetch(ctx, pieces); err != nil {
		t.Errorf("Fetch: %v, %d of %d pieces missing", err, pieces.Missing(), len(pieces.Info().Hashes))
	}
}

func same(t *testing.T, store *transporttest.Memory, content []byte) {
	t.Helper()
	if !bytes.Equal(store.Bytes(), content) {
		t.Error("not the layer that was sent")
	}
}

// A gate is storage of which so many bytes can be read until it is opened.
type gate struct {
	transport.Storage
	open chan struct{}
	left atomic.Int64
}

func newGate(content []byte, free int64) *gate {
	g := &gate{Storage: transporttest.NewMemory(content), open: make(chan struct{})}
	g.left.Store(free)
	return g
}

func (g *gate) ReadAt(b []byte, off int64) (int, error) {
	if g.left.Add(-int64(len(b))) < 0 {
		<-g.open
	}
	return g.Storage.ReadAt(b, off)
}

func seed(info transport.Info, store transport.Storage) *transport.Pieces {
	p := transport.NewPieces(info, store)
	p.AllDone()
	return p
}

func TestSource(t *testing.T) {
	t.Parallel()
	transporttest.Run(t, func(t *testing.T, info transport.Info, content []byte) transport.Source {
		r, _ := meet(t, address())
		server, _, _ := start(t, address())
		o := swarm.Options{Seeder: true, Trackers: []string{r.url}}
		server.Add(seed(info, transporttest.NewMemory(content)), o)
		node, _, _ := start(t, address())
		o.Seeder = false
		return swarm.Source(node, o)
	})
}

func TestNodesShare(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 1, 64*64<<10+1)
	r, _ := meet(t, address())
	var wg sync.WaitGroup
	var stores [2]*transporttest.Memory
	var pieces [2]*transport.Pieces
	for i := range pieces {
		stores[i] = transporttest.NewMemory(nil)
		pieces[i] = transport.NewPieces(info, stores[i])
		for n := 20 * i; n < 20*(i+1); n++ { // each has something of its own
			off := n * int(info.PieceLength)
			if err := pieces[i].Put(n, content[off:off+info.PieceSize(n)], transport.FromServer); err != nil {
				t.Fatal(err)
			}
		}
		node, _, _ := start(t, address())
		wg.Go(func() { fetch(t, node, pieces[i], r.url) })
	}
	// There is no server until each has what the other had.
	for i, p := range pieces {
		off := int64(20*(1-i)) * info.PieceLength
		if err := p.Wait(t.Context(), off, 20*info.PieceLength); err != nil {
			t.Fatal(err)
		}
	}
	server, _, _ := start(t, address())
	given := seed(info, transporttest.NewMemory(content))
	server.Add(given, swarm.Options{Seeder: true, Trackers: []string{r.url}})
	wg.Wait()
	var up, down int64
	for i, p := range pieces {
		same(t, stores[i], content)
		done, fromServer, fromPeers, uploaded := p.Transfer()
		if fromPeers < 20*info.PieceLength || fromServer+fromPeers != done {
			t.Errorf("node %d: %d from the server and %d from peers, want %d from both", i, fromServer, fromPeers, done)
		}
		up, down = up+uploaded, down+fromPeers
	}
	_, _, _, sent := given.Transfer()
	t.Logf("the server sent %d of %d bytes", sent, len(content))
	if up < down {
		t.Errorf("%d bytes sent, %d received", up, down)
	}
}

func TestServerAndTrackerGoAndComeBack(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 2, 64*64<<10)
	r, stopTracker := meet(t, address())
	trackerAt := r.url[len("http://") : len(r.url)-len("/announce")]
	server, at, stopServer := start(t, address())
	g := newGate(content, int64(len(content)/3))
	o := swarm.Options{Seeder: true, Trackers: []string{r.url}}
	server.Add(seed(info, g), o)

	node, _, _ := start(t, address())
	store := transporttest.NewMemory(nil)
	pieces := transport.NewPieces(info, store)
	var wg sync.WaitGroup
	wg.Go(func() { fetch(t, node, pieces, r.url) })
	for range pieces.Completed(t.Context()) {
		break
	}
	stopTracker()
	close(g.open) // or it could not be stopped
	stopServer()
	before, _, _, _ := pieces.Transfer()
	if before == int64(len(content)) {
		t.Log("the layer was there before the server stopped")
	}
	meet(t, trackerAt)
	server, _, _ = start(t, at)
	server.Add(seed(info, transporttest.NewMemory(content)), o)
	wg.Wait()
	same(t, store, content)
}

func TestLiarIsBanned(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 3, 32*64<<10)
	r, _ := meet(t, address())
	liar, _, _ := start(t, address())
	lies := bytes.Clone(content)
	for i := 0; i < len(lies); i += 1000 {
		lies[i] ^= 1
	}
	toldLies := seed(info, transporttest.NewMemory(lies))
	liar.Add(toldLies, swarm.Options{Trackers: []string{r.url}})

	node, _, _ := start(t, address())
	store := transporttest.NewMemory(nil)
	pieces := transport.NewPieces(info, store)
	var wg sync.WaitGroup
	wg.Go(func() { fetch(t, node, pieces, r.url) })

	// Nobody else is there until the liar has been found out: its connection
	// came, and went.
	torrent := node.Add(pieces, swarm.Options{Trackers: []string{r.url}})
	transporttest.Until(t, func() bool {
		_, _, _, sent := toldLies.Transfer()
		return sent >= info.PieceLength && torrent.Peers() == 0
	})
	server, _, _ := start(t, address())
	server.Add(seed(info, transporttest.NewMemory(content)), swarm.Options{Seeder: true, Trackers: []string{r.url}})
	wg.Wait()
	same(t, store, content)
	if _, _, fromPeers, _ := pieces.Transfer(); fromPeers != 0 {
		t.Errorf("%d bytes taken from a liar", fromPeers)
	}
	// What was on its way when the first piece failed is all it got to say.
	if _, _, _, sent := toldLies.Transfer(); sent > info.Length/2 {
		t.Errorf("the liar sent %d of %d bytes: it was asked again", sent, info.Length)
	}
}

// A peer that takes every request and never answers holds up nothing for long.
func TestSilentPeerIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 4, 8*64<<10)
	r, _ := meet(t, address())
	silent, _, _ := start(t, address())
	g := newGate(content, 0)
	silent.Add(seed(info, g), swarm.Options{Trackers: []string{r.url}})
	defer close(g.open)

	node, _, _ := start(t, address())
	store := transporttest.NewMemory(nil)
	pieces := transport.NewPieces(info, store)
	torrent := node.Add(pieces, swarm.Options{Trackers: []string{r.url}})
	transporttest.Until(t, func() bool { return torrent.Peers() == 1 && g.left.Load() < 0 }) // it has claims
	server, _, _ := start(t, address())
	server.Add(seed(info, transporttest.NewMemory(content)), swarm.Options{Seeder: true, Trackers: []string{r.url}})
	fetch(t, node, pieces, r.url)
	same(t, store, content)
}

func TestManyLayersOverOneListener(t *testing.T) {
	t.Parallel()
	r, _ := meet(t, address())
	server, _, _ := start(t, address())
	node, _, _ := start(t, address())
	var wg sync.WaitGroup
	for i := range uint64(5) {
		content, info := transporttest.Layer(t, 10+i, 3*64<<10)
		server.Add(seed(info, transporttest.NewMemory(content)), swarm.Options{Seeder: true, Trackers: []string{r.url}})
		wg.Go(func() {
			store := transporttest.NewMemory(nil)
			fetch(t, node, transport.NewPieces(info, store), r.url)
			same(t, store, content)
		})
	}
	wg.Wait()
	if n := len(server.Torrents()); n != 5 {
		t.Errorf("%d torrents, want 5", n)
	}
	for _, torrent := range server.Torrents() {
		server.Remove(torrent.Pieces().Info().InfoHash)
	}
	if n := len(server.Torrents()); n != 0 {
		t.Errorf("%d torrents after their removal", n)
	}
}

func TestLingerKnowsWhoIsIncomplete(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 5, 4*64<<10)
	r, _ := meet(t, address())
	g := newGate(content, 0)
	server, _, _ := start(t, address())
	served := server.Add(seed(info, g), swarm.Options{Seeder: true, Trackers: []string{r.url}})
	if n := served.Incomplete(); n != 0 {
		t.Fatalf("%d incomplete, want none", n)
	}
	store := transporttest.NewMemory(nil)
	node, _, _ := start(t, address())
	pieces := transport.NewPieces(info, store)
	torrent := node.Add(pieces, swarm.Options{Trackers: []string{r.url}})
	transporttest.Until(t, func() bool { return served.Incomplete() == 1 })
	if n := torrent.Incomplete(); n != 0 {
		t.Fatalf("the only incomplete one sees %d others", n)
	}
	close(g.open)
	<-pieces.Done()
	transporttest.Until(t, func() bool { return served.Incomplete() == 0 })
}

// Nodes that install different versions want different parts of a layer: what
// they share they give each other, and who has its part counts as complete.
func TestNodesThatWantAPart(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 8, 40*64<<10)
	r, _ := meet(t, address())
	server, at, _ := start(t, address())
	given := seed(info, transporttest.NewMemory(content))
	served := server.Add(given, swarm.Options{Seeder: true, Trackers: []string{r.url}})
	want := func(first, end int64) (*transport.Pieces, *swarm.Torrent) {
		node, _, _ := start(t, address())
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		p.Want(transport.Range{Offset: first * info.PieceLength, Size: (end - first) * info.PieceLength})
		torrent := node.Add(p, swarm.Options{Trackers: []string{r.url}})
		<-p.Done()
		return p, torrent
	}
	first, ours := want(0, 20)
	transporttest.Until(t, func() bool { return served.Incomplete() == 0 })
	if done, fromServer, fromPeers, _ := first.Transfer(); done != 20*info.PieceLength || fromServer+fromPeers != done {
		t.Errorf("%d bytes, %d from the server and %d from peers, want 20 pieces", done, fromServer, fromPeers)
	}
	second, _ := want(10, 30)
	if done, fromServer, fromPeers, _ := second.Transfer(); done != 20*info.PieceLength || fromServer+fromPeers != done {
		t.Errorf("%d bytes, %d from the server and %d from peers, want 20 pieces", done, fromServer, fromPeers)
	}
	transporttest.Until(t, func() bool { return served.Incomplete() == 0 && ours.Incomplete() == 0 })

	// Without the server there is still all that one of them has.
	server.Remove(info.InfoHash)
	r.mu.Lock()
	delete(r.peers, netip.MustParseAddrPort(at))
	r.mu.Unlock()
	third, _ := want(5, 25)
	if done, fromServer, fromPeers, _ := third.Transfer(); fromServer != 0 || fromPeers != done || done != 20*info.PieceLength {
		t.Errorf("%d bytes, %d from the server and %d from peers, want 20 pieces of peers", done, fromServer, fromPeers)
	}
}

// What goes wrong on one connection costs that connection and nothing else.
func TestGarbage(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 6, 64*64<<10)
	r, _ := meet(t, address())
	server, at, _ := start(t, address())
	g := newGate(content, int64(len(content)/2))
	server.Add(seed(info, g), swarm.Options{Seeder: true, Trackers: []string{r.url}})
	node, nodeAt, _ := start(t, address())
	store := transporttest.NewMemory(nil)
	pieces := transport.NewPieces(info, store)
	var wg sync.WaitGroup
	wg.Go(func() { fetch(t, node, pieces, r.url) })
	for range pieces.Completed(t.Context()) {
		break // it is under way
	}

	hello := func(hash [20]byte) string {
		return "\x13BitTorrent protocol\x00\x00\x00\x00\x00\x10\x00\x04" + string(hash[:]) + "-XX0000-garbage56789"
	}
	good := hello(info.InfoHash)
	for name, said := range map[string]string{
		"http":                  "GET / HTTP/1.1\r\nHost: rookery\r\n\r\n" + string(make([]byte, 100)),
		"encrypted":             string(bytes.Repeat([]byte{0x7f}, 200)),
		"another torrent":       hello([20]byte{1}),
		"no id":                 good[:48] + string(make([]byte, 20)),
		"a huge message":        good + "\xff\xff\xff\xff\x07",
		"a long message":        good + "\x00\x01\x00\x00\x07",
		"unknown":               good + "\x00\x00\x00\x02\x63x",
		"short bitfield":        good + "\x00\x00\x00\x02\x05\xff",
		"long bitfield":         good + "\x00\x00\x00\x0a\x05\xff\xff\xff\xff\xff\xff\xff\xff\xff",
		"have out of range":     good + "\x00\x00\x00\x05\x04\x00\x00\x00\x40",
		"request out of range":  good + "\x00\x00\x00\x0d\x06\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x40\x00",
		"request past a piece":  good + "\x00\x00\x00\x0d\x06\x00\x00\x00\x00\x00\x00\xff\xff\x00\x00\x40\x00",
		"request of gigabytes":  good + "\x00\x00\x00\x0d\x06\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff",
		"request of nothing":    good + "\x00\x00\x00\x0d\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"a block nobody wanted": good + "\x00\x00\x00\x0a\x07\x00\x00\x00\x00\x00\x00\x00\x00x",
		"unasked reject":        good + "\x00\x00\x00\x0d\x10\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x40\x00",
		"extended garbage":      good + "\x00\x00\x00\x08\x14\x00lllllll",
		"a deep bomb":           good + extended(strings.Repeat("l", 8<<10)+strings.Repeat("e", 8<<10-2)),
		"a deep bomb in a key":  good + extended("d1:m"+strings.Repeat("d1:a", 3<<10)),
		"a string of gigabytes": good + extended("d1:v9999999999:x"),
		"an endless number":     good + extended("d1:pi"+strings.Repeat("9", 8<<10)+"ee"),
		"an endless length":     good + extended("d"+strings.Repeat("9", 8<<10)),
	} {
		for _, addr := range []string{at, nodeAt} {
			nc, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			nc.SetDeadline(time.Now().Add(20 * time.Second))
			io.WriteString(nc, said) // it may be closed in the middle
			if _, err := io.Copy(io.Discard, nc); err != nil && isTimeout(err) {
				t.Errorf("%s: the connection stays open", name)
			}
			nc.Close()
		}
	}
	close(g.open)
	wg.Wait()
	same(t, store, content)
}

// extended is a handshake of BEP 10.
func extended(payload string) string {
	return string(binary.BigEndian.AppendUint32(nil, uint32(2+len(payload)))) + "\x14\x00" + payload
}

func isTimeout(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}

// A peer that asks for more than it reads is cut off, not remembered.
func TestRequestFlood(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 7, 64<<10)
	server, at, _ := start(t, address())
	server.Add(seed(info, transporttest.NewMemory(content)), swarm.Options{Seeder: true})
	nc, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(nc, "\x13BitTorrent protocol\x00\x00\x00\x00\x00\x10\x00\x04"+string(info.InfoHash[:])+"-XX0000-greedy567890")
	flood := bytes.Repeat([]byte("\x00\x00\x00\x0d\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00"), 100)
	for {
		if _, err := nc.Write(flood); err != nil {
			if isTimeout(err) {
				t.Fatal("the connection stays open")
			}
			return
		}
	}
}

// A crowd at the door costs nobody but itself: neither those who say nothing nor
// those who say who they are, and then nothing, keep a node from what it wants.
func TestCrowd(t *testing.T) {
	t.Parallel()
	content, info := transporttest.Layer(t, 9, 64*64<<10)
	r, _ := meet(t, address())
	server, at, _ := start(t, address())
	served := server.Add(seed(info, transporttest.NewMemory(content)), swarm.Options{Seeder: true, Trackers: []string{r.url}})
	node, nodeAt, _ := start(t, address())
	store := transporttest.NewMemory(nil)
	pieces := transport.NewPieces(info, store)

	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(strings.TrimSuffix(address(), ":0"))}}
	come := func(to, said string) {
		nc, err := dialer.Dial("tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		io.WriteString(nc, said)
		if said != "" { // they come one by one, or most are turned away
			nc.SetReadDeadline(time.Now().Add(20 * time.Second))
			io.ReadFull(nc, make([]byte, 68))
		}
	}
	for i := range 1200 {
		id := fmt.Sprintf("-XX0000-nothing%05d", i)
		come(at, "\x13BitTorrent protocol\x00\x00\x00\x00\x00\x10\x00\x04"+string(info.InfoHash[:])+id+extended("de"))
	}
	if n := served.Peers(); n < 900 {
		t.Errorf("only %d connections are held", n)
	}
	for range 300 {
		come(at, "")
		come(nodeAt, "")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	if err := swarm.Source(node, swarm.Options{Trackers: []string{r.url}}).Fetch(ctx, pieces); err != nil {
		t.Fatalf("Fetch: %v, %d of %d pieces missing", err, pieces.Missing(), len(info.Hashes))
	}
	same(t, store, content)
}
