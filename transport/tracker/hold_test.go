package tracker

import (
	"context"
	"fmt"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anacrolix/torrent/bencode"

	"rookery/wire"
)

// A member is a node as the tracker sees it, over no network.
type member struct {
	tr   *Tracker
	ip   string
	id   string
	left int
}

func node(tr *Tracker, n int) *member {
	return &member{tr, netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}).String(), "-RKP1-89012345678901", 5}
}

func (m *member) ask(ctx context.Context, event string, wait int) (a answer) {
	q := url.Values{
		"info_hash": {string(ours[:])}, "peer_id": {m.id}, "port": {"6881"},
		"left": {fmt.Sprint(m.left)}, "event": {event}, "wait": {fmt.Sprint(wait)},
	}
	r := httptest.NewRequestWithContext(ctx, "GET", wire.PathAnnounce+"?"+q.Encode(), nil)
	r.RemoteAddr = m.ip + ":40000"
	rec := httptest.NewRecorder()
	m.tr.ServeHTTP(rec, r)
	if err := bencode.Unmarshal(rec.Body.Bytes(), &a); err != nil || a.Failure != "" {
		panic(fmt.Sprint(a.Failure, err))
	}
	return a
}

// held starts to wait for news, and says what came, and after how long.
func (m *member) held(wait int) func() (answer, time.Duration) {
	begun := time.Now()
	got := make(chan answer, 1)
	var took time.Duration
	go func() {
		a := m.ask(context.Background(), "", wait)
		took = time.Since(begun)
		got <- a
	}()
	synctest.Wait()
	return func() (answer, time.Duration) {
		a := <-got
		return a, took
	}
}

func TestNewcomerIsToldAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTracker()
		early := node(tr, 1)
		if a := early.ask(t.Context(), "started", 30); a.Wait != 5 || len(a.Peers) != 0 {
			t.Fatalf("the first: %+v", a)
		}
		told := early.held(30)
		time.Sleep(2 * time.Second)
		node(tr, 2).ask(t.Context(), "started", 30)
		time.Sleep(50 * time.Millisecond)
		node(tr, 3).ask(t.Context(), "started", 30)
		a, took := told()
		if want := 2*time.Second + gathers(1); took != want {
			t.Errorf("told after %v, want %v", took, want)
		}
		if want := []string{"10.0.0.2:6881", "10.0.0.3:6881"}; !slices.Equal(a.addrs(), want) {
			t.Errorf("told of %v, want %v", a.addrs(), want)
		}

		// Who came while nobody waited is news as well.
		node(tr, 4).ask(t.Context(), "started", 30)
		if a, took := early.held(30)(); took != gathers(1) || len(a.addrs()) != 3 {
			t.Errorf("told of %v after %v", a.addrs(), took)
		}
		// And who begins anew where another was.
		told = early.held(30)
		node(tr, 4).ask(t.Context(), "started", 30)
		if _, took := told(); took != gathers(1) {
			t.Errorf("told of a restart after %v", took)
		}
	})
}

func TestWhatEndsTheWait(t *testing.T) {
	for _, tt := range []struct {
		name string
		wait int
		do   func(tr *Tracker, peers []*member)
		want time.Duration
	}{
		{name: "nothing", wait: 60, want: 5 * time.Second},
		{name: "who asks", wait: 3, want: 3 * time.Second},
		{name: "nobody asks", wait: 0},
		{name: "nonsense", wait: -7},
		{name: "a known one asks again", wait: 60, want: 5 * time.Second, do: func(_ *Tracker, peers []*member) {
			peers[1].ask(context.Background(), "", 0)
		}},
		{name: "a goodbye is no news", wait: 60, want: 5 * time.Second, do: func(_ *Tracker, peers []*member) {
			peers[1].ask(context.Background(), "stopped", 0)
		}},
		{name: "the last one completes", wait: 60, want: 2*time.Second + gathers(1), do: func(_ *Tracker, peers []*member) {
			for _, p := range peers[1:] {
				p.left = 0
				p.ask(context.Background(), "completed", 0)
			}
		}},
		{name: "the last one leaves", wait: 60, want: 2*time.Second + gathers(1), do: func(_ *Tracker, peers []*member) {
			for _, p := range peers[1:] {
				p.ask(context.Background(), "stopped", 0)
			}
		}},
		{name: "not all complete", wait: 60, want: 5 * time.Second, do: func(_ *Tracker, peers []*member) {
			peers[1].left = 0
			peers[1].ask(context.Background(), "completed", 0)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tr := newTracker()
				peers := []*member{node(tr, 1), node(tr, 2), node(tr, 3)}
				peers[0].left = 0
				for _, p := range peers {
					p.ask(t.Context(), "started", 0)
				}
				peers[0].ask(t.Context(), "", 0)
				told := peers[0].held(tt.wait)
				time.Sleep(2 * time.Second)
				if tt.do != nil {
					tt.do(tr, peers)
				}
				if _, took := told(); took != tt.want {
					t.Errorf("answered after %v, want %v", took, tt.want)
				}
				if tr.held != 0 {
					t.Errorf("%d are held", tr.held)
				}
			})
		})
	}
}

// Fifty come within one second. Each is told of all, and nobody is woken often.
func TestCrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nodes = 50
		tr := newTracker()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var mu sync.Mutex
		answers, knows := make([]int, nodes), make([]map[string]bool, nodes)
		for n := range nodes {
			wg.Go(func() {
				time.Sleep(time.Duration(n) * time.Second / nodes)
				m, event := node(tr, n+1), "started"
				knows[n] = map[string]bool{}
				for ctx.Err() == nil {
					a := m.ask(ctx, event, 30)
					event = ""
					mu.Lock()
					answers[n]++
					for _, addr := range a.addrs() {
						knows[n][addr] = true
					}
					mu.Unlock()
					time.Sleep(500 * time.Millisecond)
				}
			})
		}
		time.Sleep(1700 * time.Millisecond)
		mu.Lock()
		for n := range nodes {
			if len(knows[n]) != nodes-1 || answers[n] > 3 {
				t.Errorf("node %d knows %d of %d others after %d answers", n, len(knows[n]), nodes-1, answers[n])
			}
		}
		mu.Unlock()
		cancel()
		wg.Wait()
	})
}

// In a large swarm a newcomer is told to some, a server to everyone who waits,
// and not more than a bounded number wait.
func TestCrowdThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTracker()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var mu sync.Mutex
		answers := 0
		const nodes = maxHeld + 100
		for n := range nodes {
			node(tr, n+1).ask(ctx, "started", 0)
		}
		for n := range nodes {
			node(tr, n+1).ask(ctx, "", 0) // now they know all who came
		}
		for n := range maxHeld {
			wg.Go(func() {
				node(tr, n+1).ask(ctx, "", 60)
				mu.Lock()
				defer mu.Unlock()
				answers++
			})
		}
		synctest.Wait()
		if tr.held != maxHeld {
			t.Fatalf("%d are held, want %d", tr.held, maxHeld)
		}
		begun := time.Now()
		if a := node(tr, nodes).ask(ctx, "", 60); a.Wait != 0 || time.Since(begun) != 0 {
			t.Fatalf("one too many was held for %v, and may wait %d", time.Since(begun), a.Wait)
		}
		node(tr, 9000).ask(ctx, "started", 0)
		time.Sleep(2 * time.Second)
		mu.Lock()
		if answers < maxAnswer/2 || answers > 2*maxAnswer {
			t.Errorf("a newcomer is told to %d who wait, want about %d", answers, maxAnswer)
		}
		mu.Unlock()
		server := node(tr, 9001)
		server.id, server.left = "-RKS1-89012345678901", 0
		server.ask(ctx, "started", 0)
		time.Sleep(2 * time.Second)
		mu.Lock()
		if answers != maxHeld {
			t.Errorf("a server is told to %d, want all %d who wait", answers, maxHeld)
		}
		mu.Unlock()
		cancel()
		wg.Wait()
	})
}

func TestWhoGivesUpIsNotHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTracker()
		m := node(tr, 1)
		m.ask(t.Context(), "started", 0)
		m.ask(t.Context(), "", 0)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { m.ask(ctx, "", 60) })
		synctest.Wait()
		begun := time.Now()
		if m.ask(t.Context(), "", 60); time.Since(begun) != 0 || tr.held != 1 {
			t.Errorf("the same peer waits twice: %d held, after %v", tr.held, time.Since(begun))
		}
		cancel()
		wg.Wait()
		if tr.held != 0 || time.Since(begun) != 0 {
			t.Errorf("%d held, after %v", tr.held, time.Since(begun))
		}
		told := m.held(60)
		m.ask(t.Context(), "stopped", 0)
		node(tr, 2).ask(t.Context(), "started", 0)
		if a, took := told(); len(a.addrs()) != 0 || took > time.Second {
			t.Errorf("after its goodbye a peer is told of %v, after %v", a.addrs(), took)
		}
	})
}
