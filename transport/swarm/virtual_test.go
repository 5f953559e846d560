package swarm

import (
	"context"
	"crypto/sha1"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rookery/transport"
	"rookery/transport/swarm/rules"
	"rookery/transport/transporttest"
)

// A site is a server and nodes on a lan, in virtual time.
type site struct {
	ctx      context.Context
	lan      lan
	ran      sync.WaitGroup
	rate     float64
	info     transport.Info
	content  []byte
	start    time.Time
	known    []netip.AddrPort // who came before
	standsIn bool             // who joins is told in which it is
	rack     *lanRack         // of those who join; nil: none
}

// newSite is one for a layer of so many pieces of 64 KiB, on which the server
// alone would need 30 s for a copy.
func newSite(t *testing.T, pieces int) (s *site, end func()) {
	const length = 64 << 10
	content, info := transporttest.Layer(t, 1, pieces*length)
	info.PieceLength, info.Hashes = length, nil
	for b := range slices.Chunk(content, length) {
		info.Hashes = append(info.Hashes, sha1.Sum(b))
	}
	ctx, cancel := context.WithCancel(t.Context())
	s = &site{ctx: ctx, rate: float64(len(content)) / 30, info: info, content: content, start: time.Now()}
	return s, func() {
		cancel()
		s.ran.Wait()
		s.lan.wg.Wait()
	}
}

// lonely is a node that meets nobody by itself, since the server does not answer. It
// stands in a rack; "": in none.
func (s *site) lonely(rack string) *Torrent {
	s.server().host.cut.Store(true)
	torrent := s.node(s.rate).torrent
	if rack != "" {
		torrent.mu.Lock()
		defer torrent.mu.Unlock()
		torrent.stands(rack)
	}
	return torrent
}

// A member is a peer that can be switched off.
type member struct {
	host    *lanHost
	torrent *Torrent
	pieces  *transport.Pieces
	off     context.CancelFunc
}

func (s *site) join(pieces *transport.Pieces, o Options, rate float64) member {
	return s.joinLimited(pieces, o, rate, nil)
}

// told is what a tracker tells who joins: the server first, then by lot two of its
// rack for each other one.
func (s *site) told() (addrs []netip.AddrPort) {
	others := slices.Clone(s.known[1:])
	rand.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
	var near, far []netip.AddrPort
	for _, addr := range others {
		if s.rack != nil && s.lan.hosts[addr.Addr()].rack == s.rack {
			near = append(near, addr)
		} else {
			far = append(far, addr)
		}
	}
	addrs = append(addrs, s.known[0])
	for len(near)+len(far) > 0 {
		from := &near
		if len(near) == 0 || len(far) > 0 && len(addrs)%3 == 0 {
			from = &far
		}
		addrs, *from = append(addrs, (*from)[0]), (*from)[1:]
	}
	return addrs
}

// joinLimited is join with a limit on what is received.
func (s *site) joinLimited(pieces *transport.Pieces, o Options, rate float64, download *transport.Limiter) member {
	ctx, off := context.WithCancel(s.ctx)
	h := s.lan.host(s.ctx, len(s.known)+1, rate, s.rack)
	p := NewPeer(h, slog.New(slog.DiscardHandler))
	p.dial = h.dial
	p.Limit(nil, download)
	s.ran.Go(func() { p.Run(ctx) })
	torrent := p.Add(pieces, o)
	if !o.Seeder {
		if s.standsIn && s.rack != nil {
			torrent.mu.Lock()
			torrent.stands(s.rack.name)
			torrent.mu.Unlock()
		}
		torrent.learn(s.told())
	}
	s.known = append(s.known, h.addr)
	return member{h, torrent, pieces, off}
}

func (s *site) server() member {
	return s.join(transporttest.Seed(s.info, s.content), Options{Seeder: true}, s.rate)
}

func (s *site) node(rate float64) member {
	return s.join(transport.NewPieces(s.info, transporttest.NewMemory(nil)), Options{}, rate)
}

// nodes are n that begin at once, with the site's rate.
func (s *site) nodes(n int) (all []member) {
	for range n {
		all = append(all, s.node(s.rate))
	}
	return all
}

// done waits for members and says when each was done, over the time of one copy,
// the first one first.
func (s *site) done(t *testing.T, members ...member) []float64 {
	times := make([]float64, len(members))
	var wg sync.WaitGroup
	for i, m := range members {
		wg.Go(func() {
			select {
			case <-m.pieces.Done():
				times[i] = time.Since(s.start).Seconds() / 30
			case <-time.After(20 * time.Minute):
				t.Errorf("node %d: %d of %d pieces missing", i, m.pieces.Missing(), len(s.info.Hashes))
			}
		})
	}
	wg.Wait()
	slices.Sort(times)
	return times
}

// sent is how many copies of the layer a member has sent.
func (s *site) sent(m member) float64 {
	_, _, _, sent := m.pieces.Transfer()
	return float64(sent) / float64(s.info.Length)
}

// The last node is done soon after the server has sent one copy, with all links
// of one rate. Time is virtual, so the bounds hold on any machine; in 24 runs of
// 2026-11-26 eight nodes took 1.15 to 1.17, twenty 1.23 to 1.29. What is missing to 1
// is mostly the way of the first and the last pieces through the swarm: it is
// shorter when pieces are more, see bench/.
func TestTheLastNodeIsDoneAfterOneCopy(t *testing.T) {
	for _, tt := range []struct {
		nodes, pieces int
		last, copies  float64
	}{
		{1, 256, 1.03, 1.001},
		{8, 256, 1.25, 1.12},
		{20, 256, 1.38, 1.20},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, end := newSite(t, tt.pieces)
			defer end()
			server := s.server()
			var nodes []member
			for range tt.nodes {
				nodes = append(nodes, s.node(s.rate))
				time.Sleep(10 * time.Millisecond)
			}
			times := s.done(t, nodes...)
			t.Logf("%d nodes: first %.3f, last %.3f; copies sent %.3f", tt.nodes, times[0], times[tt.nodes-1], s.sent(server))
			if last := times[tt.nodes-1]; last > tt.last {
				t.Errorf("%d nodes: last %.3f, want at most %.3f", tt.nodes, last, tt.last)
			}
			if sent := s.sent(server); sent < 1 || sent > tt.copies {
				t.Errorf("%d nodes: the server sent %.3f copies, want 1 to %.3f", tt.nodes, sent, tt.copies)
			}
		})
	}
}

// One node with a fifth of the rate costs the others less than a tenth.
func TestASlowNodeHoldsUpNobody(t *testing.T) {
	last := func(t *testing.T, slow float64) (times []float64) {
		synctest.Test(t, func(t *testing.T) {
			s, end := newSite(t, 256)
			defer end()
			s.server()
			nodes := append([]member{s.node(s.rate * slow)}, s.nodes(7)...)
			times = s.done(t, nodes[1:]...)
			if behind := s.done(t, nodes[0])[0]; slow < 1 && behind < 4 {
				t.Errorf("a fifth of the rate took %.2f times as long", behind)
			}
		})
		return times
	}
	all, others := last(t, 1)[6], last(t, 0.2)[6]
	t.Logf("the others: last %.3f; with a slow one %.3f", all, others)
	if others > 1.10*all {
		t.Errorf("last %.3f with a slow node, %.3f without", others, all)
	}
}

// A server that is gone when it has given everything out once is not missed.
func TestTheSwarmAloneFinishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 256)
		defer end()
		server := s.server()
		nodes := s.nodes(8)
		for !s.complete(nodes) {
			time.Sleep(10 * time.Millisecond)
		}
		server.off()
		times := s.done(t, nodes...)
		t.Logf("last %.3f", times[7])
	})
}

// complete says whether the nodes together have every piece.
func (s *site) complete(nodes []member) bool {
	for n := range s.info.Hashes {
		if !slices.ContainsFunc(nodes, func(m member) bool { return m.pieces.Has(n) }) {
			return false
		}
	}
	return true
}

// A server that is quiet gives nothing away, and goes on when it is not any more.
func TestQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 64)
		defer end()
		server := s.server()
		server.torrent.Quiet(true)
		node := s.node(s.rate)
		time.Sleep(30 * time.Second) // a copy
		if missing := node.pieces.Missing(); missing != 64 {
			t.Errorf("%d of 64 pieces missing, want all", missing)
		}
		server.torrent.Quiet(false)
		if took := s.done(t, node)[0] - 1; took > 1.2 {
			t.Errorf("then it took %.3f", took)
		}
	})
}

// While all get the same by another way, they tell each other of it seldom, but they do,
// and when that ends, at once.
func TestNewsOfMulticast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 64)
		defer end()
		s.server().torrent.Quiet(true)
		nodes := s.nodes(2)
		expect := func(streams bool) {
			for _, m := range nodes {
				m.pieces.Expect(slices.Repeat([]bool{true}, 64), streams)
			}
		}
		expect(true)
		time.Sleep(time.Second)
		known := func(n int, within time.Duration) {
			t.Helper()
			begin, other := time.Now(), nodes[1].torrent
			transporttest.Until(t, func() bool {
				other.mu.Lock()
				defer other.mu.Unlock()
				return other.copies[n] > 0
			})
			if took := time.Since(begin); took > within {
				t.Errorf("piece %d is known of after %v, want %v at most", n, took, within)
			}
		}
		for n := range 10 {
			length := int(s.info.PieceLength)
			if err := nodes[0].pieces.Put(n, s.content[n*length:(n+1)*length], transport.FromMulticast); err != nil {
				t.Fatal(err)
			}
			if n < 4 {
				known(n, rules.NewsBatch*castBatch+time.Second)
				continue
			}
			synctest.Wait() // it is to be told some time
			expect(false)
			known(n, time.Second/4)
			expect(true)
		}
	})
}

// A piece that only nodes had which are gone is given out again.
func TestLostPiecesAreGivenOutAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 256)
		defer end()
		server := s.server()
		nodes := s.nodes(8)
		time.Sleep(10 * time.Second) // a third
		for _, m := range nodes[:4] {
			m.off()
		}
		times := s.done(t, nodes[4:]...)
		t.Logf("last %.3f, copies sent %.3f", times[3], s.sent(server))
		if times[3] > 1.5 {
			t.Errorf("last %.3f", times[3])
		}
	})
}

// Who comes late gets the layer from those who have it, at its own rate.
func TestALateNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 256)
		defer end()
		server := s.server()
		nodes := s.nodes(7)
		time.Sleep(27 * time.Second)
		late := s.node(s.rate)
		s.done(t, nodes...)
		took := s.done(t, late)[0] - 0.9
		t.Logf("the late one took %.3f; copies sent %.3f", took, s.sent(server))
		if took > 1.15 {
			t.Errorf("the late one took %.3f of the time of one copy", took)
		}
	})
}
