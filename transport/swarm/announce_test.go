package swarm

import (
	"bytes"
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
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anacrolix/torrent/bencode"

	"rookery/transport"
	"rookery/transport/transporttest"
)

// trackers are some, by host, that are reached over no network. One that is
// not there is dead.
type trackers struct {
	begun time.Time

	mu     sync.Mutex
	at     map[string]func(ctx context.Context, q url.Values) map[string]any
	events []string // what was announced: seconds since the begin, host, event, wait
}

func (ts *trackers) RoundTrip(r *http.Request) (*http.Response, error) {
	ts.mu.Lock()
	q, answer := r.URL.Query(), ts.at[r.URL.Host]
	ts.events = append(ts.events, strings.TrimRight(fmt.Sprintf("%.1f %s %s %s", time.Since(ts.begun).Seconds(), r.URL.Host, q.Get("event"), q.Get("wait")), " "))
	ts.mu.Unlock()
	if answer == nil {
		return nil, errors.New("connection refused")
	}
	a := answer(r.Context(), q)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	body := bytes.NewReader(bencode.MustMarshal(a))
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(body), Request: r}, nil
}

func (ts *trackers) set(host string, answer func(ctx context.Context, q url.Values) map[string]any) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	ts.at[host] = answer
}

// said are the announcements to one of them so far.
func (ts *trackers) said(host string) (out []string) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for _, e := range ts.events {
		if strings.Contains(e, " "+host) {
			out = append(out, strings.Replace(e, " "+host, "", 1))
		}
	}
	return out
}

// toTrackers is a node with no network but what reaches trackers at hosts.
func toTrackers(t *testing.T, o Options, hosts ...string) (*trackers, *Torrent) {
	t.Helper()
	content, info := transporttest.Layer(t, 1, 64<<10)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	p := NewPeer(ln, slog.New(slog.DiscardHandler))
	ts := &trackers{begun: time.Now(), at: map[string]func(context.Context, url.Values) map[string]any{}}
	p.http.Transport = ts
	for _, host := range hosts {
		o.Trackers = append(o.Trackers, "http://"+host+"/announce")
	}
	pieces := transport.NewPieces(info, transporttest.NewMemory(nil))
	if o.Seeder {
		pieces = transporttest.Seed(info, content)
	}
	return ts, p.Add(pieces, o)
}

// announcing runs the announce loops of a torrent, and nothing else of it.
func announcing(t *testing.T, torrent *Torrent) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i, to := range torrent.trackers {
		wg.Go(func() { torrent.announceLoop(ctx, i, to) })
	}
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

func complete(t *testing.T, torrent *Torrent) {
	t.Helper()
	content, _ := transporttest.Layer(t, 1, 64<<10)
	for n := range torrent.info.Hashes {
		off := n * int(torrent.info.PieceLength)
		if err := torrent.pieces.Put(n, content[off:off+torrent.info.PieceSize(n)], transport.FromServer); err != nil {
			t.Fatal(err)
		}
	}
}

// peersAt is the compact form of peers 10.0.0.n.
func peersAt(hosts ...int) string {
	var b []byte
	for _, n := range hosts {
		b = append(b, 10, 0, byte(n>>8), byte(n))
		b = binary.BigEndian.AppendUint16(b, 6881)
	}
	return string(b)
}

func knows(torrent *Torrent, n int) bool {
	torrent.mu.Lock()
	defer torrent.mu.Unlock()
	return slices.ContainsFunc(torrent.known, func(c *candidate) bool {
		return c.addr == netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 6881)
	})
}

// holding is a tracker of ours. It names the peers there are when there is one
// more, or when the time is over.
type holding struct {
	interval int
	mu       sync.Mutex
	peers    []int
	more     chan struct{}
}

func (h *holding) join(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.peers = append(h.peers, n)
	if h.more != nil {
		close(h.more)
		h.more = nil
	}
}

func (h *holding) answer(ctx context.Context, q url.Values) map[string]any {
	h.mu.Lock()
	if h.more == nil {
		h.more = make(chan struct{})
	}
	more := h.more
	h.mu.Unlock()
	if d, err := time.ParseDuration(q.Get("wait") + "s"); err == nil && q.Get("wait") != "" {
		select {
		case <-more:
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return map[string]any{"interval": h.interval, "wait": h.interval, "peers": peersAt(h.peers...), "incomplete": 2}
}

func TestNewcomerIsLearnedOfAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts, torrent := toTrackers(t, Options{}, "a")
		h := &holding{interval: 10}
		ts.set("a", h.answer)
		stop := announcing(t, torrent)
		time.Sleep(3 * time.Second) // it waits by now
		h.join(1)
		synctest.Wait()
		if !knows(torrent, 1) {
			t.Error("a newcomer is not known at once")
		}
		time.Sleep(2 * time.Second)
		h.join(2)
		synctest.Wait()
		if !knows(torrent, 2) {
			t.Error("the second is not known at once")
		}
		time.Sleep(time.Second)
		complete(t, torrent)
		time.Sleep(10 * time.Second)
		stop()
		want := []string{"0.0 started", "0.5  10", "3.5  10", "5.5  10", "6.0 completed", "6.5  10", "16.0 stopped"}
		if got := ts.said("a"); !similar(got, want) {
			t.Errorf("announced %q, want %q", got, want)
		}
	})
}

// similar compares announcements whose times differ by what the lot adds.
func similar(got, want []string) bool {
	if len(got) != len(want) {
		return false
	}
	for i := range got {
		at, what, _ := strings.Cut(got[i], " ")
		wanted, same, _ := strings.Cut(want[i], " ")
		a, err := strconv.ParseFloat(at, 64)
		b, err2 := strconv.ParseFloat(wanted, 64)
		if err != nil || err2 != nil || what != same || a < b-0.05 || a > b+0.3 {
			return false
		}
	}
	return true
}

func TestHowOftenATrackerIsAsked(t *testing.T) {
	fixed := func(a map[string]any) func(context.Context, url.Values) map[string]any {
		return func(context.Context, url.Values) map[string]any { return a }
	}
	for _, tt := range []struct {
		name        string
		o           Options
		answer      func(ctx context.Context, q url.Values) map[string]any
		least, most int // in ten minutes
		waits       bool
	}{
		{name: "every 30 s", answer: fixed(map[string]any{"interval": 30, "peers": peersAt(1)}), least: 18, most: 21},
		{name: "twice a day", answer: fixed(map[string]any{"interval": 43200}), least: 9, most: 11},
		{name: "always", answer: fixed(map[string]any{"interval": 0}), least: 500, most: 601},
		{name: "before it began", answer: fixed(map[string]any{"interval": -1 << 60}), least: 500, most: 601},
		{name: "never again", answer: fixed(map[string]any{"interval": 1 << 62, "wait": 0}), least: 9, most: 11},
		{name: "it holds", answer: (&holding{interval: 30}).answer, least: 18, most: 21, waits: true},
		{name: "it does not hold what it promised to", answer: fixed(map[string]any{"interval": 30, "wait": 30, "peers": peersAt(1)}), least: 18, most: 24, waits: true},
		{name: "it invents peers", answer: func() func(context.Context, url.Values) map[string]any {
			n := 0
			return func(context.Context, url.Values) map[string]any {
				n++
				return map[string]any{"interval": 30, "wait": 1 << 62, "peers": peersAt(n)}
			}
		}(), least: 1000, most: 1201, waits: true},
		{name: "a server does not wait", o: Options{Seeder: true}, answer: (&holding{interval: 30}).answer, least: 18, most: 21},
		{name: "it fails", answer: fixed(map[string]any{"failure reason": "no"}), least: 68, most: 77},
		{name: "it is dead", least: 68, most: 77},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts, torrent := toTrackers(t, tt.o, "a")
				if tt.answer != nil {
					ts.set("a", tt.answer)
				}
				announcing(t, torrent)
				time.Sleep(10 * time.Minute)
				got := ts.said("a")
				if len(got) < tt.least || len(got) > tt.most {
					t.Errorf("%d announces, want %d to %d: %q", len(got), tt.least, tt.most, got[:min(10, len(got))])
				}
				waits := slices.ContainsFunc(got, func(e string) bool { return strings.Contains(e, "  ") })
				if waits != tt.waits {
					t.Errorf("it asks the tracker to wait: %v, want %v: %q", waits, tt.waits, got[:min(10, len(got))])
				}
			})
		})
	}
}

// A node that has others tell it of peers misses nothing when one tracker dies,
// and finds the first that comes back.
func TestAnyTrackerMayDie(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts, torrent := toTrackers(t, Options{}, "dead", "dies", "stays", "silent")
		silent := func(ctx context.Context, _ url.Values) map[string]any {
			<-ctx.Done()
			return nil
		}
		dies, stays := &holding{interval: 5}, &holding{interval: 5}
		ts.set("dies", dies.answer)
		ts.set("stays", stays.answer)
		ts.set("silent", silent)
		announcing(t, torrent)
		learns := func(of int, by *holding, within time.Duration) {
			t.Helper()
			by.join(of)
			time.Sleep(within)
			if !knows(torrent, of) {
				t.Errorf("peer %d is not known after %v", of, within)
			}
		}
		time.Sleep(3 * time.Second)
		learns(1, dies, breath+breath/10+1)
		learns(2, stays, breath+breath/10+1)
		if n := torrent.Incomplete(); n != 1 {
			t.Errorf("%d others are incomplete, want 1", n)
		}

		ts.set("dies", nil)
		time.Sleep(time.Minute)
		learns(3, stays, breath+breath/10+1)
		if n := torrent.Incomplete(); n != 1 {
			t.Errorf("with one tracker dead %d others are incomplete, want 1", n)
		}

		ts.set("stays", nil)
		time.Sleep(time.Minute)
		if n := torrent.Incomplete(); n != 0 {
			t.Errorf("a minute after the last tracker %d others are incomplete, want none", n)
		}
		if !knows(torrent, 3) {
			t.Error("with the trackers their peers are forgotten")
		}
		ts.set("dead", dies.answer)
		learns(4, dies, retryMost+retryMost/10+1)
	})
}

// What a tracker can do wrong costs one announce, and little memory.
func TestTrackersThatAreWrong(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"lists in lists": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "d1:x", strings.Repeat("l", 50_000))
		},
		"lists in lists that end": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "d1:x", strings.Repeat("l", 30_000), strings.Repeat("e", 30_000), "e")
		},
		"a string longer than all": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "d5:peers134217727:x") },
		"a string of no length":    func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "d5:peers-1:e") },
		"a number out of range":    func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "d8:intervali99999999999999999999ee") },
		"a number of any length": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "d8:intervali", strings.Repeat("9", 60_000), "ee")
		},
		"a list of peers":         func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "d5:peersld2:ip9:127.0.0.14:porti1eeee") },
		"no dictionary":           func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "i1e") },
		"nothing":                 func(http.ResponseWriter, *http.Request) {},
		"an answer after its end": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "dede") },
		"an endless failure reason": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "d14:failure reason60000:", strings.Repeat("n", 60_000), "e")
		},
		"an endless answer": func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, strings.Repeat("d1:x", 1000)); err != nil {
					return
				}
			}
		},
		"an endless header": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", maxHeaders)) },
		"an endless way":    func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.String(), http.StatusFound) },
		"a status":          func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "d8:intervali5ee", http.StatusTeapot) },
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(answer)
			defer server.Close()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			_, info := transporttest.Layer(t, 1, 64<<10)
			p := NewPeer(ln, slog.New(slog.DiscardHandler))
			defer p.http.CloseIdleConnections()
			torrent := p.Add(transport.NewPieces(info, transporttest.NewMemory(nil)), Options{})
			_, err = torrent.announce(t.Context(), server.URL, "", 0)
			if err == nil || len(err.Error()) > 400 {
				t.Errorf("announce: %v, want a short error", err)
			}
		})
	}
}

func FuzzPause(f *testing.F) {
	f.Add(int64(5), int64(5), int64(5), int64(1), true)
	f.Add(int64(-1)<<63, int64(1)<<62, int64(0), int64(0), false)
	f.Fuzz(func(t *testing.T, interval, wait, hold, took int64, same bool) {
		r, err := parseReply(bencode.MustMarshal(map[string]any{"interval": interval, "wait": wait, "peers": peersAt(1)}))
		if err != nil {
			t.Fatal(err)
		}
		var last reply
		if same {
			last = r
		}
		if d := r.pause(last, time.Duration(hold), time.Duration(took)); d < breath || d > longest {
			t.Fatalf("%+v: asked again after %v", r, d)
		}
	})
}
