package swarm

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anacrolix/torrent/bencode"
	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport/swarm/rules"
)

// says has a peer say where it stands.
func (c *conn) says(t *testing.T, rack string) {
	t.Helper()
	payload := bencode.MustMarshal(map[string]string{rackKey: rack})
	if err := c.handle(&pp.Message{Type: pp.Extended, ExtendedID: pp.HandshakeExtendedID, ExtendedPayload: payload}); err != nil {
		t.Fatal(err)
	}
}

func (c *conn) hears(t *testing.T, messages ...pp.Message) {
	t.Helper()
	for _, m := range messages {
		if err := c.handle(&m); err != nil {
			t.Fatal(err)
		}
	}
}

// Of another rack's nodes a node asks for what it has drawn the lot of and nobody
// near has, one piece at a time. What a mate does not bring in it does, in the end.
func TestFarPieces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 256)
		t.Cleanup(end)
		server := s.server()
		server.host.cut.Store(true)
		torrent := s.node(s.rate).torrent
		locked := func(do func()) {
			torrent.mu.Lock()
			defer torrent.mu.Unlock()
			do()
		}
		locked(func() { torrent.stands("r1") })
		var mate *conn
		for n := range 3 {
			mate = attach(t, torrent, nodePrefix, n)
			mate.says(t, "r1")
		}
		stranger := attach(t, torrent, "-XX0000-", 8) // where it stands nobody knows
		var own, others []int
		locked(func() {
			for n := range 256 {
				if torrent.nearby.MayBring(n, 0, torrent.id, torrent.mates, time.Now()) {
					own = append(own, n)
				} else {
					others = append(others, n)
				}
			}
		})
		have := func(n int) pp.Message { return pp.Message{Type: pp.Have, Index: pp.Integer(n)} }
		asked := func(c *conn) (pieces []int) {
			locked(func() {
				for _, d := range c.open {
					pieces = append(pieces, d.piece)
				}
			})
			return pieces
		}

		mate.hears(t, have(own[0]))
		stranger.hears(t, have(own[1]))
		far := attach(t, torrent, nodePrefix, 9)
		far.hears(t, have(own[0]), have(own[1]), have(own[2]), have(own[3]), have(others[0]))
		far.says(t, "r2")
		far.hears(t, pp.Message{Type: pp.Unchoke})
		if got := asked(far); len(got) != 1 || got[0] != own[2] && got[0] != own[3] {
			t.Errorf("of another rack it asks %v, want %d or %d alone", got, own[2], own[3])
		}
		second := attach(t, torrent, nodePrefix, 10)
		second.says(t, "r3")
		second.hears(t, pp.Message{Type: pp.HaveAll}, pp.Message{Type: pp.Unchoke})
		if got := asked(second); len(got) != 0 {
			t.Errorf("beside it %v", got)
		}

		for _, c := range []*conn{far, second} {
			locked(func() { torrent.detachLocked(c) })
		}
		late := attach(t, torrent, nodePrefix, 11)
		late.says(t, "r2")
		late.hears(t, have(others[0]), pp.Message{Type: pp.Unchoke})
		begin := time.Now()
		for end := time.After(7 * time.Second / 2); len(asked(late)) == 0; { // it is the fourth in line at the most
			select {
			case <-late.woken:
			case <-end:
				t.Fatalf("it does not ask for %d, which no mate has brought in", others[0])
			}
		}
		if took := time.Since(begin); took <= time.Second/2 {
			t.Errorf("after %v it asks for %v, which a mate is to bring in", took, asked(late))
		}
		if got := asked(late); !slices.Equal(got, []int{others[0]}) {
			t.Errorf("it asks for %v, want %d, which no mate has brought in", got, others[0])
		}
	})
}

// What only a mate has that does not answer is brought in all the same; when it
// answers again, it is near again.
func TestASilentMateIsNotNear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 16)
		t.Cleanup(end)
		torrent := s.lonely("r1")
		mate, far := attach(t, torrent, nodePrefix, 1), attach(t, torrent, nodePrefix, 2)
		mate.says(t, "r1")
		far.says(t, "r2")
		have := pp.Message{Type: pp.Have, Index: 7}
		asked := func(c *conn) bool {
			torrent.mu.Lock()
			defer torrent.mu.Unlock()
			return slices.ContainsFunc(c.open, func(d *download) bool { return d.piece == 7 })
		}
		mate.hears(t, have, pp.Message{Type: pp.Unchoke})
		far.hears(t, have, pp.Message{Type: pp.Unchoke})
		if !asked(mate) || asked(far) {
			t.Fatalf("asks the mate: %v, the far one: %v; want the mate alone", asked(mate), asked(far))
		}
		late := time.After(8 * time.Second) // the mate may have drawn the lower lot
		for !asked(far) {
			select {
			case <-far.woken:
			case <-late:
				t.Fatal("nobody is asked for what only a silent mate has")
			}
		}
		near := func() bool {
			torrent.mu.Lock()
			defer torrent.mu.Unlock()
			return torrent.nearby.Here(7)
		}
		if near() {
			t.Error("what a silent mate has is near")
		}
		torrent.mu.Lock()
		mate.recount(func() { mate.Stalled = 0 }) // as when a block of it comes
		torrent.detachLocked(far)
		torrent.mu.Unlock()
		if !near() {
			t.Error("what the mate has is not near any more")
		}
		torrent.mu.Lock()
		mate.recount(func() { mate.Stalled = 1 })
		torrent.detachLocked(mate)
		mate.recount(func() { mate.Stalled = 0 }) // as when its reader had a block in hand
		torrent.mu.Unlock()
		if near() {
			t.Error("what nobody has is near")
		}
	})
}

// What comes from a connection that has lost its place is not counted: nothing would
// be brought in that it had, and a server would keep for it what it has drawn.
func TestNoPlaceNoWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 16)
		t.Cleanup(end)
		server, node := s.server().torrent, s.node(s.rate).torrent
		for _, torrent := range []*Torrent{server, node} {
			gone := attach(t, torrent, nodePrefix, 1)
			torrent.detach(gone)
			for _, m := range []pp.Message{
				{Type: pp.Have, Index: 7},
				{Type: pp.Extended, ExtendedID: pp.HandshakeExtendedID, ExtendedPayload: bencode.MustMarshal(map[string]string{rackKey: "r1"})},
			} {
				if err := gone.handle(&m); err == nil {
					t.Errorf("%v: nil, want an error", m.Type)
				}
			}
			torrent.mu.Lock()
			if n := torrent.copies[7]; n != 0 || torrent.nearby.Here(7) {
				t.Errorf("%d copies of what is gone", n)
			}
			torrent.mu.Unlock()
		}
	})
}

// A place is four racks of nodes behind uplinks that carry a quarter of the site's
// rate, with one server.
type place struct {
	*site
	server member
	racks  []*lanRack
	nodes  []member // the first of each rack first
}

func newPlace(t *testing.T, pieces, racks, of int, known bool) (p *place, end func()) {
	s, end := newSite(t, pieces)
	s.standsIn = known
	p = &place{site: s, server: s.server()}
	for r := range racks {
		p.racks = append(p.racks, s.lan.rack(s.ctx, fmt.Sprintf("r%d", r+1), s.rate/4))
	}
	for range of {
		for _, r := range p.racks {
			s.rack = r
			p.nodes = append(p.nodes, s.node(s.rate))
			time.Sleep(3 * time.Millisecond)
		}
	}
	return p, end
}

// copies are those that came into each rack.
func (p *place) copies() (all []float64) {
	for _, r := range p.racks {
		all = append(all, float64(r.received.Load())/float64(p.info.Length))
	}
	return all
}

// Each piece passes each uplink about once, and the uplinks are busy until the end.
// In 2026-11 the last node took 1.10 to 1.13 of what they allow, the uplinks carried
// 1.09 to 1.11 copies.
func TestRacks(t *testing.T) {
	if raced {
		t.Skip("takes a minute with the race detector: run it without -race, as `make unit` does too")
	}
	synctest.Test(t, func(t *testing.T) {
		p, end := newPlace(t, 512, 4, 8, true)
		defer end()
		times := p.done(t, p.nodes...)
		last, copies := times[len(times)-1]/4, slices.Max(p.copies())
		t.Logf("first %.3f, last %.3f; copies by an uplink %.3f, sent by the server %.3f", times[0]/4, last, copies, p.sent(p.server))
		if last > 1.2 || copies > 1.2 {
			t.Errorf("last %.3f, copies by an uplink %.3f, want at most 1.2", last, copies)
		}
	})
}

// Who cannot have enough mates stops looking for them.
func TestSmallRacks(t *testing.T) {
	const all = 128 // pieces
	synctest.Test(t, func(t *testing.T) {
		p, end := newPlace(t, all, 12, 3, true)
		defer end()
		for _, m := range p.nodes {
			m.torrent.learn(p.known)
		}
		dials := func() (sum int) {
			for _, m := range p.nodes {
				m.host.mu.Lock()
				sum += int(m.host.ports)
				m.host.mu.Unlock()
			}
			return sum
		}
		have := func(count int) { // waits until all nodes do
			for _, m := range p.nodes {
				pieces := 0
				for range m.pieces.Completed(t.Context()) {
					if pieces++; pieces == count {
						break
					}
				}
			}
		}
		have(all / 3)
		before := dials()
		have(all)
		if again := dials() - before; again > len(p.nodes)/3 {
			t.Errorf("%d connections are tried after %d", again, before)
		}
	})
}

// Who has met nodes of other racks and has none of them left looks for more, beside as
// many mates as it likes.
func TestSomebodyAbroad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 16)
		t.Cleanup(end)
		torrent := s.lonely("r1")
		for n := range rules.Wanted {
			attach(t, torrent, nodePrefix, n).says(t, "r1")
		}
		known := lanAddr(200)
		looks := func() bool {
			torrent.learn([]netip.AddrPort{known})
			return slices.ContainsFunc(torrent.candidates(time.Now()), func(c *candidate) bool { return c.addr == known })
		}
		if looks() {
			t.Error("in one rack it looks for more")
		}
		far := attach(t, torrent, nodePrefix, rules.Wanted)
		far.says(t, "r2")
		torrent.detach(far)
		if !looks() {
			t.Error("where there are others it does not look for more")
		}
	})
}

// A node that brings nothing in, since nothing reaches it any more, holds up nobody.
func TestRacksWithADeadNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, end := newPlace(t, 256, 4, 4, true)
		defer end()
		time.Sleep(20 * time.Second)
		p.nodes[0].host.cut.Store(true)
		times := p.done(t, p.nodes[1:]...)
		t.Logf("first %.3f, last %.3f; copies by an uplink %.3f", times[0]/4, times[len(times)-1]/4, slices.Max(p.copies()))
		if last := times[len(times)-1] / 4; last > 1.5 {
			t.Errorf("last %.3f, want at most 1.5", last)
		}
	})
}
