package swarm

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
	"rookery/transport/swarm/rules"
	"rookery/wire"
)

// A Torrent is one swarm this peer takes part in.
type Torrent struct {
	peer     *Peer
	pieces   *transport.Pieces
	info     transport.Info
	id       [20]byte
	seeder   bool
	trackers []string
	max      int           // connections
	poke     chan struct{} // look for peers now
	left     chan struct{} // closed by leave
	failed   chan struct{} // closed when failure is set
	failure  error
	rank     []int32       // this peer's own order, so that not all want the same piece
	file     wire.Digest   // of the torrent file
	names    chan struct{} // one for each that a node may be named to, see Giver
	giving   chan struct{} // one for each who gets the file from the server

	mu      sync.Mutex
	conns   map[*conn]bool
	copies  []int32   // how many of conns have a piece
	have    rules.Set // what the connections were told of
	seen    int       // as many, of pieces.Since
	spare   rules.Set // what nobody need give us: we have it, or do not want it
	chosen  bool      // spare has what is not wanted
	done    bool      // everything that is wanted is there
	known   []*candidate
	free    [][]byte         // buffers of one piece
	open    int              // pieces being fetched
	usual   [2]time.Duration // that a piece takes, from near and from far
	rack    string           // where we stand, as a tracker says
	nearby  rules.Nearby
	abroad  bool      // it has met nodes of other racks
	gained  time.Time // our latest piece
	down    int64     // bytes a second, lately
	up      int64     // bytes a second, lately
	chance  *rand.Rand
	denied  []*conn // who asked when there was no room, the first one first
	handout rules.Handout[*conn]
	heard   []heard // from each tracker
	gone    bool
	quiet   bool          // see Quiet
	awaited []*time.Timer // of those in giving who have not come
	latest  time.Time     // that somebody came
	whole   map[int]bool  // pieces to be asked for whole: filling their holes was in vain
}

// A candidate is a peer that a tracker told of.
type candidate struct {
	addr    netip.AddrPort
	id      [20]byte // when it was met
	dialing bool
	fails   int
	next    time.Time // not before
}

// heard is what a tracker said last.
type heard struct {
	incomplete int
	until      time.Time // it is news until then: a dead tracker holds nobody back
	rack       string
}

func newTorrent(p *Peer, pieces *transport.Pieces, o Options) *Torrent {
	info := pieces.Info()
	t := &Torrent{
		peer:     p,
		pieces:   pieces,
		info:     info,
		id:       newID(o.Seeder),
		seeder:   o.Seeder,
		trackers: slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(info.Trackers), o.Trackers...)))),
		max:      rules.MaxNode,
		file:     wire.DigestOf(info.File),
		poke:     make(chan struct{}, 1),
		left:     make(chan struct{}),
		failed:   make(chan struct{}),
		conns:    map[*conn]bool{},
		copies:   make([]int32, len(info.Hashes)),
		nearby:   rules.NewNearby(len(info.Hashes), time.Now()),
		have:     rules.NewSet(len(info.Hashes)),
		spare:    rules.NewSet(len(info.Hashes)),
		rank:     make([]int32, len(info.Hashes)),
		whole:    map[int]bool{},
		chance:   rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())),
	}
	if o.Seeder {
		t.max, t.handout = rules.MaxServed, rules.NewHandout[*conn](pieces.Preferred())
		t.names, t.giving = make(chan struct{}, maxNames), make(chan struct{}, rules.MaxGiving)
	} else {
		pieces.SetCopies(t.availability)
	}
	for i, r := range rand.Perm(len(t.rank)) {
		t.rank[i] = int32(r)
	}
	t.heard = make([]heard, len(t.trackers))
	t.sync()
	return t
}

// Pieces are what the torrent was added with.
func (t *Torrent) Pieces() *transport.Pieces { return t.pieces }

// File is the digest of the torrent file.
func (t *Torrent) File() wire.Digest { return t.file }

// Peers is the number of connections.
func (t *Torrent) Peers() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.conns)
}

// Incomplete is the number of other peers that still fetch the layer, as the
// trackers said lately or, where that is more, as the connections show.
func (t *Torrent) Incomplete() int {
	self := min(1, t.pieces.Missing())
	t.mu.Lock()
	defer t.mu.Unlock()
	connected, told := 0, 0
	for c := range t.conns {
		if !c.sated() {
			connected++
		}
	}
	for _, h := range t.heard {
		if time.Now().Before(h.until) {
			told = max(told, h.incomplete-self)
		}
	}
	return max(connected, told)
}

// availability is how many connections have each piece; nil when there are none.
func (t *Torrent) availability() []int32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.conns) == 0 {
		return nil
	}
	return slices.Clone(t.copies)
}

// leave closes what the torrent has open.
func (t *Torrent) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone {
		return
	}
	t.gone = true
	if !t.seeder {
		t.pieces.SetCopies(nil)
	}
	t.release(len(t.free))
	close(t.left)
	for c := range t.conns {
		c.close()
	}
}

// fail gives up fetching: the node cannot keep what it gets.
func (t *Torrent) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failure == nil {
		t.failure = err
		close(t.failed)
	}
}

// run is the life of the torrent: it announces, connects and tells what it has.
func (t *Torrent) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for i, url := range t.trackers {
		wg.Go(func() { t.announceLoop(ctx, i, url) })
	}
	wg.Go(func() { t.tellLoop(ctx) })
	wg.Go(func() { t.manageLoop(ctx) })
	select {
	case <-ctx.Done():
		t.leave()
	case <-t.left:
	}
	cancel()
	wg.Wait()
}

// tellLoop tells every connection of every new piece, a few of them together. When a stream
// has ended, all are told at once: what it did not bring is theirs to find now.
func (t *Torrent) tellLoop(ctx context.Context) {
	ended := false
	for round := 1; ; round++ {
		more := t.sync()
		later := false // there are those who are not told yet
		now := time.Now()
		t.mu.Lock()
		for c := range t.conns {
			switch {
			case !ended && c.Waits(round, c.lacks > 0, c.Fed(now)):
				later = true
			case c.origin != transport.FromServer || c.expects:
				c.expects = false
				c.wake()
			}
		}
		batch := rules.Batch(t.down, t.info.PieceLength)
		t.mu.Unlock()
		if !later {
			select {
			case <-ctx.Done():
				return
			case <-more:
			}
		}
		streams := t.pieces.Streams()
		sleep(ctx, batch)
		for end := time.Now().Add(castBatch); t.pieces.Streams() && time.Now().Before(end) && ctx.Err() == nil; {
			sleep(ctx, batch)
		}
		ended = streams && !t.pieces.Streams()
	}
}

// sync brings the connections up to what pieces has, and returns a channel
// that is closed when there is more.
func (t *Torrent) sync() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	fresh, more := t.pieces.Since(t.seen)
	t.seen += len(fresh)
	for _, n := range fresh {
		t.have.Add(n)
		t.gained = time.Now()
		t.spares(n)
		t.came(n)
		if t.seeder {
			continue // see handOut
		}
		have := pp.Message{Type: pp.Have, Index: pp.Integer(n)}.MustMarshalBinary()
		for c := range t.conns {
			c.lacks += btoi(!c.has.Has(n))
			// One of ours that has the piece has no use for the news; a server
			// counts the copies.
			if !c.ours || !c.has.Has(n) || c.origin == transport.FromServer {
				c.enqueue(have)
				c.expects = c.expects || c.has.Has(n)
			}
		}
	}
	if wanted := t.pieces.Wanted(); wanted != nil && !t.chosen {
		t.chosen = true
		for n, wanted := range wanted {
			if !wanted {
				t.spares(n)
			}
		}
		t.fill(time.Now())
		for c := range t.conns {
			if c.origin == transport.FromServer {
				c.extend()
			}
		}
	}
	if !t.done && t.pieces.Missing() == 0 {
		t.done = true
		t.release(len(t.free))
		for c := range t.conns {
			if !t.seeder {
				c.extend() // the Haves do not show it to everybody
			}
		}
	}
	for c := range t.conns {
		t.judge(c)
	}
	return more
}

// came ends the fetching of a piece that another source has brought.
func (t *Torrent) came(n int) {
	for c := range t.conns {
		for _, d := range slices.Clone(c.open) {
			if d.piece == n {
				c.forgo(d, true)
				t.drop(d)
			}
		}
	}
}

// spares notes that nobody need give us piece n.
func (t *Torrent) spares(n int) {
	if t.spare.Has(n) {
		return
	}
	t.spare.Add(n)
	for c := range t.conns {
		c.Useful -= btoi(c.has.Has(n))
	}
}

// judge says whether we are interested, and closes a connection between two
// nodes that fetch nothing any more. A server stays, to know who has what.
func (t *Torrent) judge(c *conn) {
	if t.done && c.sated() && !t.seeder && c.origin != transport.FromServer {
		c.close()
		return
	}
	if interested := c.Useful > 0; interested != c.interested && !c.ours { // ours do not care
		c.interested = interested
		kind := pp.NotInterested
		if interested {
			kind = pp.Interested
		}
		c.send(pp.Message{Type: kind})
	}
}

// manageLoop connects to peers, takes pieces back from those who stall, and
// measures.
func (t *Torrent) manageLoop(ctx context.Context) {
	tick := time.NewTicker(rules.Measured)
	defer tick.Stop()
	var received, sent int64
	var told time.Time
	for {
		for _, cand := range t.candidates(time.Now()) {
			t.peer.goRun(func() { t.dial(ctx, cand) })
		}
		select {
		case <-ctx.Done():
			return
		case <-t.poke:
		case now := <-tick.C:
			done, _, _, uploaded := t.pieces.Transfer()
			t.mu.Lock()
			t.down = rules.Lately(t.down, done-received)
			t.up = rules.Lately(t.up, uploaded-sent)
			if uploaded > sent {
				t.handout.Sent = now
			}
			received, sent = done, uploaded
			t.stalls(now)
			for c := range t.conns {
				if c.Watch(t.gained) {
					t.nearby.Redraw()
				}
			}
			tell := rules.TellServers
			if t.pieces.Streams() {
				tell = castBatch
			}
			counts := now.Sub(told) >= tell
			if counts {
				told = now
			}
			for c := range t.conns {
				if counts && c.origin == transport.FromServer {
					c.wake()
				}
				c.Dry = false // another source may have given pieces up
			}
			t.fill(now)
			t.greetLate(now)
			t.handout.Expire(now)
			t.handOut(now)
			t.mu.Unlock()
		}
	}
}

// lookAround wakes manageLoop.
func (t *Torrent) lookAround() {
	select {
	case t.poke <- struct{}{}:
	default:
	}
}

// learn adds the peers a tracker named, in its order of preference, before
// those that are known.
func (t *Torrent) learn(addrs []netip.AddrPort) {
	const max = 256
	t.mu.Lock()
	defer t.mu.Unlock()
	met := map[netip.AddrPort]*candidate{}
	for _, c := range t.known {
		met[c.addr] = c
	}
	var known []*candidate
	for _, addr := range addrs {
		if met[addr] == nil {
			met[addr] = &candidate{addr: addr}
		}
		if !slices.Contains(known, met[addr]) {
			known = append(known, met[addr])
		}
	}
	for _, c := range t.known {
		if !slices.Contains(addrs, c.addr) {
			known = append(known, c)
		}
	}
	t.known = known[:min(max, len(known))]
	t.lookAround()
}

// candidates marks and returns whom to connect to now.
func (t *Torrent) candidates(now time.Time) []*candidate {
	if t.pieces.Missing() == 0 {
		return nil // who still needs something comes to us
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	met := map[[20]byte]bool{t.id: true}
	at := map[netip.AddrPort]bool{}
	count, far := 0, 0
	for c := range t.conns {
		met[c.id], at[c.addr] = true, true
		count += btoi(c.origin != transport.FromServer)
		far += btoi(c.Far)
	}
	for _, c := range t.known {
		count += btoi(c.dialing && !met[c.id])
	}
	var out []*candidate
	for _, c := range t.known {
		if rules.Enough(count, far, t.abroad) || t.gone || t.failure != nil {
			break
		}
		if c.dialing || count >= rules.Wanted && c.fails > 0 || met[c.id] || at[c.addr] || now.Before(c.next) || t.peer.isBanned(c.addr.Addr()) {
			continue
		}
		c.dialing = true
		count++
		out = append(out, c)
	}
	return out
}

// dial connects to a candidate and stays until that connection ends.
func (t *Torrent) dial(ctx context.Context, cand *candidate) {
	start := time.Now()
	c, err := t.connect(ctx, cand.addr)
	if err == nil {
		t.mu.Lock()
		cand.id = c.id
		t.mu.Unlock()
		t.serve(ctx, c)
	} else {
		t.peer.log.Debug("swarm: connect", "client", cand.addr, "err", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if err == nil && now.Sub(start) > 10*time.Second {
		cand.fails = 0
	}
	cand.dialing = false
	cand.next = now.Add(rules.Redial(cand.fails))
	cand.fails++
	t.lookAround()
}

// attach admits a connection, or says no. Of two connections between the same
// peers both sides keep the one that the peer with the higher id opened.
func (t *Torrent) attach(c *conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone || c.id == t.id {
		return false
	}
	for other := range t.conns {
		if other.id != c.id {
			continue
		}
		if c.dialed != other.dialed && c.dialed != (string(t.id[:]) > string(c.id[:])) {
			return false
		}
		other.close()
		t.detachLocked(other)
	}
	most := t.max
	if c.origin == transport.FromServer { // as it says
		most += rules.MaxServers
	}
	if len(t.conns) >= most && !t.room(c) && !(t.mayBeMate(c) && len(t.conns) < most+rules.MaxGuests) {
		return false
	}
	t.conns[c], c.lacks = true, t.seen
	c.introduce()
	c.Met, t.handout.Idle = !c.ltep, false
	return true
}

// room makes room for a newcomer where all places are taken: the address that has
// most of them gives one up to an address that then still has fewer.
func (t *Torrent) room(c *conn) bool {
	of := map[netip.Addr]int{}
	var most *conn
	for other := range t.conns {
		of[other.Host]++
		if most == nil || of[other.Host] > of[most.Host] {
			most = other
		}
	}
	if most == nil || of[most.Host] <= of[c.Host]+1 {
		return false
	}
	most.close()
	t.detachLocked(most)
	return true
}

func (t *Torrent) detach(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.detachLocked(c)
}

func (t *Torrent) detachLocked(c *conn) {
	if !t.conns[c] {
		return
	}
	delete(t.conns, c)
	t.denied = slices.DeleteFunc(t.denied, func(other *conn) bool { return other == c })
	for n := range t.copies {
		t.counts(c, n, -btoi(c.has.Has(n)))
	}
	t.nearby.Redraw()
	t.abandon(c)
	t.handout.Forget(c)
	t.fill(time.Now())
	t.handOut(time.Now())
	t.lookAround()
}

// gains notes that a connection's peer has piece n.
func (t *Torrent) gains(c *conn, n int) {
	if c.has.Has(n) {
		return
	}
	c.has.Add(n)
	c.Dry = false
	c.hasN++
	c.Gained = time.Now()
	t.counts(c, n, 1)
	c.Useful += btoi(!t.spare.Has(n))
	c.lacks -= btoi(t.have.Has(n))
	if t.seeder {
		t.handout.Taken(c, n, c.Gained)
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
