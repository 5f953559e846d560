package tracker

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anacrolix/torrent/bencode"

	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/transporttest"
	"rookery/wire"
)

var ours = [20]byte{1, 2, '+', ' ', '&'}

func newTracker() *Tracker {
	return New(func(infohash [20]byte) bool { return infohash == ours })
}

type answer struct {
	Failure    string `bencode:"failure reason"`
	Complete   int    `bencode:"complete"`
	Incomplete int    `bencode:"incomplete"`
	Interval   int    `bencode:"interval"`
	Peers      string `bencode:"peers"`
	Peers6     string `bencode:"peers6"`
	Rack       string `bencode:"rack"`
	Wait       int    `bencode:"wait"`
}

func (a answer) addrs() (out []string) {
	for s := a.Peers; len(s) >= 6; s = s[6:] {
		ip, _ := netip.AddrFromSlice([]byte(s[:4]))
		out = append(out, netip.AddrPortFrom(ip, binary.BigEndian.Uint16([]byte(s[4:6]))).String())
	}
	slices.Sort(out)
	return out
}

func get(t testing.TB, tr *Tracker, from, local, target string, to any) {
	t.Helper()
	req := httptest.NewRequest("GET", target, nil)
	req.RemoteAddr = from
	if local != "" {
		req = req.WithContext(context.WithValue(req.Context(), http.LocalAddrContextKey, net.Addr(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local)))))
	}
	rec := httptest.NewRecorder()
	tr.ServeHTTP(rec, req)
	if err := bencode.Unmarshal(rec.Body.Bytes(), to); err != nil {
		t.Fatalf("%s: %d %q: %v", target, rec.Code, rec.Body, err)
	}
}

// announce says that a peer with the given prefix of its id listens at ip:port.
func announce(t testing.TB, tr *Tracker, prefix, ip string, port int, left int64, event string) (a answer) {
	t.Helper()
	q := url.Values{
		"info_hash": {string(ours[:])}, "peer_id": {(prefix + "xxxxxxxxxxxxxxxxxxxx")[:20]}, "port": {fmt.Sprint(port)},
		"left": {fmt.Sprint(left)}, "compact": {"1"},
	}
	if event != "" {
		q.Set("event", event)
	}
	get(t, tr, netip.AddrPortFrom(netip.MustParseAddr(ip), 40000).String(), "10.0.0.1:80", wire.PathAnnounce+"?"+q.Encode(), &a)
	return a
}

func TestPeersLearnOfEachOther(t *testing.T) {
	tr := newTracker()
	a := announce(t, tr, "-RKS1-", "10.0.0.1", 6881, 0, "started")
	if a.Complete != 1 || a.Incomplete != 0 || a.Peers != "" || a.Interval != 10 {
		t.Fatalf("alone: %+v", a)
	}
	a = announce(t, tr, "-RKP1-", "10.0.0.2", 6881, 5, "started")
	if want := []string{"10.0.0.1:6881"}; !slices.Equal(a.addrs(), want) || a.Incomplete != 1 || a.Interval != 5 {
		t.Fatalf("the second: %+v, peers %v", a, a.addrs())
	}
	a = announce(t, tr, "-RKP1-", "10.0.0.3", 1234, 5, "started")
	if want := []string{"10.0.0.1:6881", "10.0.0.2:6881"}; !slices.Equal(a.addrs(), want) {
		t.Fatalf("the third learns of %v, want %v", a.addrs(), want)
	}
	if n := tr.Incomplete(ours); n != 2 {
		t.Fatalf("%d incomplete, want 2", n)
	}
	a = announce(t, tr, "-RKP1-", "10.0.0.2", 6881, 0, "completed")
	if want := []string{"10.0.0.3:1234"}; !slices.Equal(a.addrs(), want) || a.Complete != 2 || a.Incomplete != 1 {
		t.Fatalf("who is complete learns of %v (%+v), want %v", a.addrs(), a, want)
	}
	a = announce(t, tr, "-RKP1-", "10.0.0.3", 1234, 5, "stopped")
	if a.Peers != "" || a.Incomplete != 0 || tr.Incomplete(ours) != 0 {
		t.Fatalf("after goodbye: %+v", a)
	}
	announce(t, tr, "-RKP1-", "10.0.0.3", 1234, 5, "stopped") // twice is nothing
}

func TestSixes(t *testing.T) {
	tr := newTracker()
	announce(t, tr, "-RKP1-", "2001:db8::1", 6881, 5, "")
	a := announce(t, tr, "-RKP1-", "2001:db8::2", 6881, 5, "")
	want := string(netip.MustParseAddr("2001:db8::1").AsSlice()) + "\x1a\xe1"
	if a.Peers6 != want || a.Peers != "" {
		t.Fatalf("peers6 %x, want %x", a.Peers6, want)
	}
}

func TestRack(t *testing.T) {
	named := func(addr netip.Addr) string {
		if addr == netip.MustParseAddr("10.0.0.1") {
			return "r1"
		}
		return ""
	}
	for _, tt := range []struct {
		rack       func(netip.Addr) string
		addr, want string
	}{
		{nil, "10.0.0.1", "10.0.0.0/24"},
		{nil, "10.0.1.1", "10.0.1.0/24"},
		{nil, "2001:db8:1:2:3::4", "2001:db8:1:2::/64"},
		{named, "10.0.0.1", "r1"},
		{named, "10.0.0.2", "10.0.0.0/24"},
	} {
		tr := newTracker()
		tr.Rack = tt.rack
		if got := tr.rack(netip.MustParseAddr(tt.addr)); got != tt.want {
			t.Errorf("%s is in %s, want %s", tt.addr, got, tt.want)
		}
		if a := announce(t, tr, "-RKP1-", tt.addr, 6881, 5, ""); a.Rack != tt.want {
			t.Errorf("%s is told that it is in %s, want %s", tt.addr, a.Rack, tt.want)
		}
	}
}

func TestNeighboursFirst(t *testing.T) {
	tr := newTracker()
	for i := range 6 {
		announce(t, tr, "-RKP1-", fmt.Sprintf("10.0.%d.%d", i%2, 2+i), 6881, 5, "")
	}
	a := announce(t, tr, "-RKP1-", "10.0.0.100", 6881, 5, "")
	subnets := ""
	for p := a.Peers; p != ""; p = p[6:] {
		subnets += fmt.Sprint(p[2])
	}
	if subnets != "001011" {
		t.Fatalf("named peers of subnets %s, want 001011", subnets)
	}
}

// The seeder beside the tracker is told under the address the asker knows.
func TestServerBesideTheTracker(t *testing.T) {
	tr := newTracker()
	q := url.Values{"info_hash": {string(ours[:])}, "peer_id": {"-RKS1-89012345678901"}, "port": {"6881"}, "left": {"0"}}
	var a answer
	get(t, tr, "127.0.0.1:4000", "127.0.0.1:80", wire.PathAnnounce+"?"+q.Encode(), &a)
	a = announce(t, tr, "-RKP1-", "10.0.0.2", 6881, 5, "")
	if want := []string{"10.0.0.1:6881"}; !slices.Equal(a.addrs(), want) {
		t.Fatalf("learns of %v, want %v", a.addrs(), want)
	}
}

func TestServersAreToldToEverybody(t *testing.T) {
	tr := newTracker()
	for i := range 300 {
		announce(t, tr, "-RKP1-", fmt.Sprintf("10.0.%d.%d", 1+i/200, i%200), 6881, 5, "")
	}
	announce(t, tr, "-RKS1-", "10.9.9.9", 6881, 0, "")
	for i := range 20 {
		a := announce(t, tr, "-RKP1-", fmt.Sprintf("10.1.0.%d", i), 6881, 5, "")
		got := a.addrs()
		if !slices.Contains(got, "10.9.9.9:6881") {
			t.Fatalf("node %d is not told of the server", i)
		}
		if len(got) != maxAnswer || len(slices.Compact(got)) != maxAnswer {
			t.Fatalf("node %d is told of %d peers, want %d different ones", i, len(got), maxAnswer)
		}
	}
}

func TestTheDeadAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTracker()
		announce(t, tr, "-RKP1-", "10.0.0.2", 6881, 5, "")
		for range 10 {
			time.Sleep(10 * time.Second)
			announce(t, tr, "-RKP1-", "10.0.0.3", 6881, 0, "")
		}
		if n := tr.Incomplete(ours); n != 0 {
			t.Fatalf("%d incomplete, want none", n)
		}
		if a := announce(t, tr, "-RKP1-", "10.0.0.4", 6881, 5, ""); a.Complete != 1 || len(a.addrs()) != 1 {
			t.Fatalf("%+v", a)
		}
	})
}

func TestMembersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTracker()
		s := newGroup()
		tr.swarms[ours] = s
		join := func(n, port int) error {
			ip := netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
			a := announcement{infohash: ours, left: 1}
			copy(a.id[:], "-RKS1-")
			_, err := tr.take(s, a, netip.AddrPortFrom(ip, uint16(port)), false)
			return err
		}
		for port := range 2 * maxOfAddress {
			if err := join(0, 1+port); (err == nil) != (port < maxOfAddress) {
				t.Fatalf("peer %d of one address: %v", port+1, err)
			}
		}
		var last error
		for n := range maxPeers {
			last = join(1+n, 6881)
		}
		if last == nil || len(s.peers) != maxPeers || tr.members != maxPeers || len(s.servers) != maxServers || len(s.recent) != maxRecent {
			t.Fatalf("%d peers, %d members, %d servers, %d recent, %v", len(s.peers), tr.members, len(s.servers), len(s.recent), last)
		}
		if err := join(1, 6881); err != nil {
			t.Fatalf("a member: %v", err)
		}
		tr.members = maxMembers
		if err := join(1, 6881); err != nil {
			t.Fatalf("a member: %v", err)
		}
		time.Sleep(time.Hour)
		if n := tr.Incomplete(ours); n != 0 || tr.members != 0 || len(tr.swarms) != 0 {
			t.Fatalf("after an hour: %d incomplete, %d members, %d swarms", n, tr.members, len(tr.swarms))
		}
		if len(s.peers)+len(s.at)+len(s.racks)+len(s.servers)+s.complete != 0 {
			t.Fatalf("after an hour: %+v", s)
		}
	})
}

func TestRefusals(t *testing.T) {
	tr := newTracker()
	good := url.Values{"info_hash": {string(ours[:])}, "peer_id": {"-XX0000-901234567890"}, "port": {"1"}, "left": {"1"}}
	for name, change := range map[string]func(url.Values){
		"no hash":         func(v url.Values) { v.Del("info_hash") },
		"another torrent": func(v url.Values) { v.Set("info_hash", "01234567890123456789") },
		"no id":           func(v url.Values) { v.Set("peer_id", "") },
		"no port":         func(v url.Values) { v.Set("port", "0") },
		"a large port":    func(v url.Values) { v.Set("port", "65536") },
		"no left":         func(v url.Values) { v.Del("left") },
		"negative left":   func(v url.Values) { v.Set("left", "-1") },
		"huge left":       func(v url.Values) { v.Set("left", "99999999999999999999") },
		"a huge port":     func(v url.Values) { v.Set("port", strings.Repeat("9", 4000)) },
		"a hash too many": func(v url.Values) { v.Add("info_hash", "01234567890123456789") },
		"a long query":    func(v url.Values) { v.Set("x", string(make([]byte, 9000))) },
	} {
		v := url.Values{}
		for k, s := range good {
			v[k] = slices.Clone(s)
		}
		change(v)
		var a answer
		get(t, tr, "10.0.0.2:1", "", wire.PathAnnounce+"?"+v.Encode(), &a)
		if a.Failure == "" {
			t.Errorf("%s: no failure reason", name)
		}
	}
	for name, query := range map[string]string{
		"a bad escape":            "info_hash=%zz",
		"thousands of hashes":     strings.Repeat("info_hash=a&", 600),
		"more hashes than it may": strings.Repeat("info_hash=01234567890123456789&", maxScrape+1),
	} {
		for _, path := range []string{wire.PathAnnounce, wire.PathScrape} {
			var a answer
			get(t, tr, "10.0.0.2:1", "", path+"?"+query, &a)
			if a.Failure == "" || len(a.Failure) > 100 {
				t.Errorf("%s: %s: failure reason %q", path, name, a.Failure)
			}
		}
	}
	if len(tr.swarms) != 0 {
		t.Errorf("%d swarms after refusals only", len(tr.swarms))
	}
	rec := httptest.NewRecorder()
	tr.ServeHTTP(rec, httptest.NewRequest("GET", "/else", nil))
	if rec.Code != http.StatusNotFound {
		t.Errorf("/else: %d", rec.Code)
	}
}

func TestScrape(t *testing.T) {
	tr := newTracker()
	announce(t, tr, "-RKP1-", "10.0.0.2", 6881, 5, "")
	announce(t, tr, "-RKP1-", "10.0.0.3", 6881, 0, "")
	var got struct {
		Files map[string]answer `bencode:"files"`
	}
	get(t, tr, "10.0.0.2:1", "", wire.PathScrape+"?"+url.Values{"info_hash": {string(ours[:]), "01234567890123456789"}}.Encode(), &got)
	if f := got.Files[string(ours[:])]; len(got.Files) != 1 || f.Complete != 1 || f.Incomplete != 1 {
		t.Fatalf("%+v", got)
	}
}

func FuzzQuery(f *testing.F) {
	good := url.Values{"info_hash": {string(ours[:])}, "peer_id": {"-XX0000-901234567890"}, "port": {"1"}, "left": {"1"}, "numwant": {"-3"}, "wait": {"99999999999999999999"}}
	f.Add(good.Encode())
	f.Add("info_hash=%zz")
	f.Add("info_hash=aaaaaaaaaaaaaaaaaaaa&info_hash=b")
	f.Fuzz(func(t *testing.T, query string) {
		if a, err := parse(query); err == nil && (a.port == 0 || a.left < 0 || a.want < 0 || a.want > maxAnswer || a.wait < 0 || a.wait > 60) {
			t.Fatalf("%q: %+v", query, a)
		}
		tr := newTracker()
		for _, path := range []string{wire.PathAnnounce, wire.PathScrape} {
			r := &http.Request{URL: &url.URL{Path: path, RawQuery: query}, RemoteAddr: "10.0.0.1:1"}
			rec := httptest.NewRecorder()
			tr.ServeHTTP(rec, r)
			var v any
			if err := bencode.Unmarshal(rec.Body.Bytes(), &v); err != nil || rec.Code != http.StatusOK {
				t.Fatalf("%q: %d %q: %v", query, rec.Code, rec.Body, err)
			}
		}
	})
}

// The tracker and our peers together, over real sockets: one that is there
// first finds the server that comes later long before its next announce. One of
// its trackers has never been there, and one dies.
func TestSwarmMeetsHere(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 40*64<<10)
	known := func(infohash [20]byte) bool { return infohash == info.InfoHash }
	tr, dies := New(known), New(known)
	server, dying := httptest.NewServer(tr), httptest.NewServer(dies)
	defer server.Close()
	defer dying.Close()
	o := swarm.Options{Trackers: []string{"http://127.0.0.1:1" + wire.PathAnnounce, dying.URL + wire.PathAnnounce, server.URL + wire.PathAnnounce}}
	peer := func() *swarm.Peer {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p := swarm.NewPeer(ln, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
		return p
	}
	fetch := func(p *swarm.Peer) {
		store := transporttest.NewMemory(nil)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := swarm.Source(p, o).Fetch(ctx, transport.NewPieces(info, store)); err != nil {
			t.Error(err)
		} else if !bytes.Equal(store.Bytes(), content) {
			t.Error("not the layer")
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { fetch(peer()) })
	transporttest.Until(t, func() bool { return tr.waiting() == 1 && dies.waiting() == 1 })
	dying.CloseClientConnections()
	dying.Listener.Close()
	begun := time.Now()
	peer().Add(transporttest.Seed(info, content), swarm.Options{Seeder: true, Trackers: o.Trackers})
	wg.Wait()
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("the first found the server after %v: at its next announce", took)
	}
	fetch(peer())
}

func (t *Tracker) waiting() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.held
}
