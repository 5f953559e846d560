package swarm

import (
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
	"rookery/transport/swarm/rules"
	"rookery/transport/transporttest"
)

// attach gives a torrent a connection to a peer of its own address that says and
// hears nothing by itself.
func attach(t *testing.T, torrent *Torrent, prefix string, n int) *conn {
	t.Helper()
	here, _ := net.Pipe()
	id := fmt.Sprintf("%s%0*d", prefix, 20-len(prefix), n)
	c := newConn(torrent, here, greeting{extensions, torrent.info.InfoHash, [20]byte([]byte(id))}, lanAddr(90+n))
	if !torrent.attach(c) {
		t.Fatal("not attached")
	}
	t.Cleanup(func() { torrent.detach(c) })
	return c
}

// asks has a peer ask for a piece, and says whether it is taken on.
func (c *conn) asks(t *testing.T, n int) bool {
	t.Helper()
	before := c.waiting()
	for b := 0; b < int(c.t.info.PieceLength); b += ownBlock {
		if err := c.ask(pp.RequestSpec{Index: pp.Integer(n), Begin: pp.Integer(b), Length: ownBlock}); err != nil {
			t.Fatal(err)
		}
	}
	return c.waiting() > before
}

func (c *conn) waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.requests)
}

// A node takes on as many nodes as have a place. One that has asked in vain for
// long gets the place of the one that has had it longest. A stranger needs none.
func TestPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 16)
		t.Cleanup(end)
		s.server()
		torrent := s.join(transporttest.Seed(s.info, s.content), Options{}, s.rate).torrent
		if !attach(t, torrent, "-XX0000-", 0).asks(t, 0) {
			t.Error("a stranger is refused")
		}
		var fed []*conn
		for n := range rules.MaxFed {
			fed = append(fed, attach(t, torrent, nodePrefix, 1+n))
			if !fed[n].asks(t, 0) {
				t.Fatalf("node %d of %d is refused", n+1, rules.MaxFed)
			}
			time.Sleep(time.Millisecond)
		}
		hungry := attach(t, torrent, nodePrefix, 1+rules.MaxFed)
		if hungry.asks(t, 0) {
			t.Errorf("node %d is taken on", rules.MaxFed+1)
		}
		time.Sleep(rules.HungryAfter / 2)
		if hungry.asks(t, 1) {
			t.Errorf("it is taken on after %v", rules.HungryAfter/2)
		}
		time.Sleep(rules.HungryAfter / 2)
		if !hungry.asks(t, 2) {
			t.Errorf("it is refused after %v", rules.HungryAfter)
		}
		for n, c := range fed {
			if got, want := c.asks(t, 1), n > 0; got != want {
				t.Errorf("node %d is taken on again: %v, want %v", n+1, got, want)
			}
		}
		if !hungry.asks(t, 3) {
			t.Error("it has lost its place")
		}
	})
}

// A node asks a few nodes for a few pieces each, and others beside those that are
// silent. Who stalled is asked again when it says something.
func TestFeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 256)
		t.Cleanup(end)
		server := s.server()
		server.host.cut.Store(true)
		torrent := s.node(s.rate).torrent
		var peers []*conn
		for n := range 3 * rules.MaxFeeds {
			c := attach(t, torrent, nodePrefix, n)
			for _, m := range []pp.Message{{Type: pp.HaveAll}, {Type: pp.Unchoke}} {
				if err := c.handle(&m); err != nil {
					t.Fatal(err)
				}
			}
			peers = append(peers, c)
		}
		asked := func(want int) (of []*conn) {
			t.Helper()
			torrent.mu.Lock()
			defer torrent.mu.Unlock()
			for _, c := range peers {
				if len(c.open) > 0 {
					of = append(of, c)
				}
				if _, most := rules.Asking(0, torrent.info.PieceLength, false); len(c.open) > most {
					t.Errorf("%d pieces are asked of one node, want %d", len(c.open), most)
				}
			}
			if len(of) != want {
				t.Errorf("%d nodes are asked, want %d", len(of), want)
			}
			return of
		}
		first := asked(rules.MaxFeeds)
		time.Sleep(rules.QuietFor + 300*time.Millisecond) // and what manageLoop needs
		asked(2 * rules.MaxFeeds)
		time.Sleep(rules.StallAfter - rules.QuietFor)
		for n, c := range first {
			can := func() bool {
				torrent.mu.Lock()
				defer torrent.mu.Unlock()
				return c.Can(time.Now()) || len(c.open) > 0
			}
			if can() {
				t.Errorf("node %d is asked again while it says nothing", n)
			}
			if err := c.handle(&pp.Message{Type: pp.Interested}); err != nil {
				t.Fatal(err)
			}
			if !can() {
				t.Errorf("node %d is not asked again when it is back", n)
			}
		}
	})
}

// Beside a stream that may fill its link, a node asks for hardly anything.
func TestFeedsBesideAStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 256)
		t.Cleanup(end)
		server := s.server()
		server.host.cut.Store(true)
		node := s.node(s.rate)
		asked := func(streams bool) (pieces int) {
			node.pieces.Expect(nil, streams)
			node.torrent.mu.Lock()
			defer node.torrent.mu.Unlock()
			node.torrent.fill(time.Now())
			for c := range node.torrent.conns {
				pieces += len(c.open)
			}
			return pieces
		}
		node.pieces.Expect(nil, true)
		for n := range 3 * rules.MaxFeeds {
			c := attach(t, node.torrent, nodePrefix, n)
			for _, m := range []pp.Message{{Type: pp.HaveAll}, {Type: pp.Unchoke}} {
				if err := c.handle(&m); err != nil {
					t.Fatal(err)
				}
			}
		}
		feeds, each := rules.Asking(0, s.info.PieceLength, true)
		if got := asked(true); got != feeds*each {
			t.Errorf("%d pieces are asked for, want %d", got, feeds*each)
		}
		feeds, each = rules.Asking(0, s.info.PieceLength, false)
		if got := asked(false); got != feeds*each {
			t.Errorf("%d pieces are asked for when the stream has ended, want %d", got, feeds*each)
		}
	})
}

// A server hears at once of what it has offered, and soon of the rest.
func TestWhatAServerHears(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, end := newSite(t, 16)
		t.Cleanup(end)
		torrent := s.lonely("")
		server := attach(t, torrent, serverPrefix, 0)
		for n := 1; n < 3; n++ { // it is of interest still when it has given one of them
			if err := server.handle(&pp.Message{Type: pp.Have, Index: pp.Integer(n)}); err != nil {
				t.Fatal(err)
			}
		}
		<-server.woken // with what was to be said at the start
		for n, soon := range []bool{false, true} {
			<-server.woken // as every second
			at := n * int(s.info.PieceLength)
			if err := torrent.pieces.Put(n, s.content[at:at+s.info.PieceSize(n)], transport.FromPeer); err != nil {
				t.Fatal(err)
			}
			put := time.Now()
			<-server.woken
			if took := time.Since(put); (took <= rules.TellServers/4) != soon || took > rules.TellServers+rules.Measured {
				t.Errorf("piece %d is told after %v, want it at once: %v", n, took, soon)
			}
		}
	})
}
