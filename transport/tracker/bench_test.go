package tracker

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"rookery/wire"
)

// apart in the environment makes this binary a tracker, so that its use of the
// processor and of memory is not that of the peers.
const apart = "TRACKER_TEST_APART"

func TestMain(m *testing.M) {
	if os.Getenv(apart) != "" {
		serveApart()
		return
	}
	os.Exit(m.Run())
}

// usage is what a tracker has used.
type usage struct {
	CPU    time.Duration
	Memory uint64 // bytes of heap and stacks
}

// serveApart serves until its input ends, and says what it used for each line.
func serveApart() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go (&http.Server{Handler: newTracker(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 75 * time.Second}).Serve(ln)
	fmt.Println(ln.Addr())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var cpu syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &cpu); err != nil {
			panic(err)
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		json.NewEncoder(os.Stdout).Encode(usage{time.Duration(cpu.Utime.Nano() + cpu.Stime.Nano()), m.HeapInuse + m.StackInuse})
	}
}

// A distant is a tracker in a process of its own.
type distant struct {
	addr string
	in   io.WriteCloser
	out  *bufio.Reader
}

func startApart(b *testing.B) *distant {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), apart+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	})
	d := &distant{in: in, out: bufio.NewReader(out)}
	addr, err := d.out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	d.addr = addr[:len(addr)-1]
	return d
}

func (d *distant) used(b *testing.B) (u usage) {
	b.Helper()
	fmt.Fprintln(d.in)
	line, err := d.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &u)
	}
	if err != nil {
		b.Fatal(err)
	}
	return u
}

// A caller is a node with an address of its own: all of 127.0.0.0/8 is here.
type caller struct {
	n    int
	addr string // of the tracker
	conn net.Conn
	in   *bufio.Reader
}

// send announces, over the connection that is open, if one is.
func (c *caller) send(b *testing.B, event string, wait int) {
	if c.conn == nil {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 20+byte(c.n>>16), byte(c.n>>8), byte(c.n))}}
		conn, err := dialer.Dial("tcp", c.addr)
		if err != nil {
			b.Fatal(err)
		}
		c.conn, c.in = conn, bufio.NewReaderSize(conn, 512)
	}
	q := url.Values{
		"info_hash": {string(ours[:])}, "peer_id": {"-RKP1-89012345678901"}, "port": {"6881"}, "uploaded": {"123456789"},
		"downloaded": {"123456789"}, "left": {"5"}, "compact": {"1"}, "event": {event}, "wait": {fmt.Sprint(wait)},
	}
	fmt.Fprintf(c.conn, "GET %s?%s HTTP/1.1\r\nHost: x\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n", wire.PathAnnounce, q.Encode())
}

// receive reads the answer, and closes the connection if asked to or if the
// tracker wants it.
func (c *caller) receive(b *testing.B, stay bool) {
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		b.Fatal(err)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || n < 60 {
		b.Fatal(resp.Status, n, err)
	}
	if !stay || resp.Close {
		c.conn.Close()
		c.conn = nil
	}
}

// BenchmarkTenThousand is what peers that announce over loopback cost the
// tracker, which is in a process of its own: its time for one announce, and its
// memory. Ten thousand that announce every 30 s are 333 announces in a second.
func BenchmarkTenThousand(b *testing.B) {
	for _, tt := range []struct {
		name        string
		peers, wait int  // how many of them wait for news
		stay        bool // connections are kept as long as the tracker likes
	}{
		{name: "new connections", peers: 10_000},
		{name: "kept connections", peers: 10_000, stay: true},
		{name: "1000 kept connections", peers: 1000, stay: true},
		{name: "1000 wait", peers: 10_000, wait: maxHeld},
	} {
		b.Run(tt.name, func(b *testing.B) {
			d := startApart(b)
			callers := make([]*caller, tt.peers)
			for n := range callers {
				callers[n] = &caller{n: n, addr: d.addr}
				callers[n].send(b, "started", 0)
				callers[n].receive(b, tt.stay)
			}
			waiting := callers[:tt.wait]
			for _, c := range waiting {
				c.send(b, "", 0) // it has heard of all who came
				c.receive(b, true)
				c.send(b, "", 60)
			}
			rest := callers[tt.wait:]
			var next atomic.Int64
			before := d.used(b)
			b.ResetTimer()
			for b.Loop() {
				c := rest[int(next.Add(1))%len(rest)]
				c.send(b, "", 0)
				c.receive(b, tt.stay)
			}
			b.StopTimer()
			after := d.used(b)
			cost := float64(after.CPU-before.CPU) / float64(b.N)
			b.ReportMetric(cost/1e3, "cpu-µs/announce")
			b.ReportMetric(cost/1e9*10_000/30*100, "%core")
			b.ReportMetric(float64(after.Memory)/(1<<20), "MiB")
			for _, c := range callers {
				if c.conn != nil {
					c.conn.Close()
				}
			}
		})
	}
}

// BenchmarkAnnounce is an announce without HTTP.
func BenchmarkAnnounce(b *testing.B) {
	tr, ask := tenThousand()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		ask(tr, i%10_000)
	}
}

var query = url.Values{"info_hash": {string(ours[:])}, "peer_id": {"-RKP1-89012345678901"}, "port": {"6881"}, "left": {"5"}}.Encode()

// tenThousand are so many peers in 40 racks, and how one of them asks.
func tenThousand() (*Tracker, func(tr *Tracker, n int) response) {
	ask := func(tr *Tracker, n int) response {
		ip := netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
		r := &http.Request{URL: &url.URL{Path: wire.PathAnnounce, RawQuery: query}, RemoteAddr: netip.AddrPortFrom(ip, 40000).String()}
		a, err := tr.announce(r)
		if err != nil {
			panic(err)
		}
		return a
	}
	tr := newTracker()
	for n := range 10_000 {
		ask(tr, n)
	}
	return tr, ask
}

// What one of ten thousand costs, in what does not depend on the machine. In
// November 2026 it was 211 bytes, 13 allocations and an answer of 409 bytes.
func TestCostOfAPeer(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	tr, ask := tenThousand()
	perPeer := (heap() - before) / 10_000
	n := 0
	allocs := testing.AllocsPerRun(1000, func() {
		ask(tr, n)
		n++
	})
	rec := httptest.NewRecorder()
	r := httptest.NewRequest("GET", wire.PathAnnounce+"?"+query, nil)
	r.RemoteAddr = "10.0.0.1:40000"
	tr.ServeHTTP(rec, r)
	t.Logf("%d bytes for a peer, %.0f allocations for an announce, %d bytes of answer", perPeer, allocs, rec.Body.Len())
	if perPeer > 500 {
		t.Errorf("a peer takes %d bytes, want 500 at the most", perPeer)
	}
	if allocs > 20 {
		t.Errorf("an announce makes %.0f allocations, want 20 at the most", allocs)
	}
	if n := rec.Body.Len(); n > 120+6*maxAnswer {
		t.Errorf("an answer has %d bytes, want %d at the most", n, 120+6*maxAnswer)
	}
	if got := tr.swarms[ours].interval(tr.members); got != 30 {
		t.Errorf("the interval is %d s, want 30", got)
	}
	if rec.Header().Get("Connection") != "close" {
		t.Error("a connection stays open for 30 s for each of ten thousand")
	}
}
