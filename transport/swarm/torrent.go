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
)

// How much is asked for at a time. A long queue in one place makes pieces
// complete late, and what is late cannot be passed on.
const (
	blockSize   = 16 << 10
	maxBlocks   = 32       // requests in flight, of all connections together
	minDepth    = 2        // of one connection
	maxDepth    = 16       // of one connection
	maxFetching = 64 << 20 // bytes of pieces that are not complete, of all torrents together
	maxFree     = 8        // buffers that a torrent keeps for its next pieces
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
	rank     []int32 // this peer's own order, so that not all want the same piece

	mu     sync.Mutex
	conns  map[*conn]bool
	copies []int32 // how many of conns have a piece
	have   bitset  // what the connections were told of
	seen   int     // as many, of pieces.Since
	spare  bitset  // what nobody need give us: we have it, or do not want it
	chosen bool    // spare has what is not wanted
	done   bool    // everything that is wanted is there
	known  []*candidate
	free   [][]byte // buffers of one piece
	open   int      // pieces being fetched
	heard  []heard  // from each tracker
	gone   bool
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
		max:      maxNode,
		poke:     make(chan struct{}, 1),
		left:     make(chan struct{}),
		failed:   make(chan struct{}),
		conns:    map[*conn]bool{},
		copies:   make([]int32, len(info.Hashes)),
		have:     newBitset(len(info.Hashes)),
		spare:    newBitset(len(info.Hashes)),
		rank:     make([]int32, len(info.Hashes)),
	}
	if o.Seeder {
		t.max = maxServed
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

// leave closes what the torrent has open.
func (t *Torrent) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone {
		return
	}
	t.gone = true
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

// tellLoop tells every connection of every new piece.
func (t *Torrent) tellLoop(ctx context.Context) {
	for {
		more := t.sync()
		t.mu.Lock()
		for c := range t.conns {
			c.wake()
		}
		t.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-more:
		}
		sleep(ctx, batch)
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
		t.have.set(n)
		t.spares(n)
		have := pp.Message{Type: pp.Have, Index: pp.Integer(n)}.MustMarshalBinary()
		for c := range t.conns {
			c.enqueue(have)
		}
	}
	if wanted := t.pieces.Wanted(); wanted != nil && !t.chosen {
		t.chosen = true
		for n, wanted := range wanted {
			if !wanted {
				t.spares(n)
			}
		}
		t.fillAll()
	}
	if !t.done && t.pieces.Missing() == 0 {
		t.done = true
		t.release(len(t.free))
		for c := range t.conns {
			if t.seen < len(t.copies) { // the Haves do not show it
				c.extend()
			}
		}
	}
	for c := range t.conns {
		t.judge(c)
	}
	return more
}

// spares notes that nobody need give us piece n.
func (t *Torrent) spares(n int) {
	if t.spare.get(n) {
		return
	}
	t.spare.set(n)
	for c := range t.conns {
		c.useful -= btoi(c.has.get(n))
	}
}

// judge says whether we are interested, and closes a connection between two
// that fetch nothing any more.
func (t *Torrent) judge(c *conn) {
	if t.done && c.sated() {
		c.close()
		return
	}
	if interested := c.useful > 0; interested != c.interested {
		c.interested = interested
		kind := pp.NotInterested
		if interested {
			kind = pp.Interested
		}
		c.send(pp.Message{Type: kind})
	}
}

// manageLoop connects to peers and takes pieces back from those who stall.
func (t *Torrent) manageLoop(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		for _, cand := range t.candidates(time.Now()) {
			t.peer.goRun(func() { t.dial(ctx, cand) })
		}
		select {
		case <-ctx.Done():
			return
		case <-t.poke:
		case <-tick.C:
			t.mu.Lock()
			t.stalls(time.Now())
			t.fillAll()
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
	for c := range t.conns {
		met[c.id], at[c.addr] = true, true
	}
	count := len(t.conns)
	for _, c := range t.known {
		count += btoi(c.dialing && !met[c.id])
	}
	var out []*candidate
	for _, c := range t.known {
		if count >= wanted || t.gone || t.failure != nil {
			break
		}
		if c.dialing || met[c.id] || at[c.addr] || now.Before(c.next) || t.peer.isBanned(c.addr.Addr()) {
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
	cand.next = now.Add(time.Second << cand.fails) // 8 s at the most: servers come back
	cand.fails = min(cand.fails+1, 3)
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
	if len(t.conns) >= t.max {
		return false
	}
	t.conns[c] = true
	c.introduce()
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
	for n := range t.copies {
		t.copies[n] -= int32(btoi(c.has.get(n)))
	}
	t.abandon(c)
	t.fillAll()
	t.lookAround()
}

// gains notes that a connection's peer has piece n.
func (t *Torrent) gains(c *conn, n int) {
	if c.has.get(n) {
		return
	}
	c.has.set(n)
	c.hasN++
	t.copies[n]++
	c.useful += btoi(!t.spare.get(n))
}

// stalls takes the pieces back from connections that bring nothing.
func (t *Torrent) stalls(now time.Time) {
	for c := range t.conns {
		if len(c.open) == 0 || c.storing {
			continue
		}
		if now.Sub(c.lastBlock) > stallAfter {
			t.abandon(c)
			c.paused = now.Add(stallAfter)
			if c.stalled++; c.stalled >= maxStalls {
				c.close()
			}
		}
	}
}

// abandon gives the pieces a connection was fetching back to all.
func (t *Torrent) abandon(c *conn) {
	for _, d := range c.open {
		for b, state := range d.blocks {
			if state == asked {
				c.send(d.message(pp.Cancel, b))
				c.late++
			}
		}
		t.close(d)
	}
	c.open, c.inflight = nil, 0
}

// close ends the fetching of a piece.
func (t *Torrent) close(d *download) {
	t.pieces.Release(d.piece)
	t.open--
	t.free = append(t.free, d.buf[:cap(d.buf)])
	if t.done || t.gone {
		t.release(len(t.free))
	} else if len(t.free) > maxFree {
		t.release(1)
	}
}

// buffer is one for a piece, or nil when there are enough in use. A torrent
// that has none gets one whatever the others have.
func (t *Torrent) buffer() []byte {
	if last := len(t.free) - 1; last >= 0 {
		b := t.free[last]
		t.free = t.free[:last]
		return b
	}
	if t.peer.buffers.Add(t.info.PieceLength) > maxFetching && t.open > 0 {
		t.peer.buffers.Add(-t.info.PieceLength)
		return nil
	}
	return make([]byte, t.info.PieceLength)
}

// release gives up the last n buffers that are free.
func (t *Torrent) release(n int) {
	t.peer.buffers.Add(-int64(n) * t.info.PieceLength)
	keep := len(t.free) - n
	clear(t.free[keep:])
	t.free = t.free[:keep]
}

func (t *Torrent) fillAll() {
	for c := range t.conns {
		t.fill(c)
	}
}

// fill asks for as much as a connection may have in flight. A connection gets
// a new piece only when all of the last one has been asked for.
func (t *Torrent) fill(c *conn) {
	if c.choked || c.useful == 0 || !t.conns[c] || t.failure != nil || time.Now().Before(c.paused) {
		return
	}
	for depth := t.depth(); c.inflight < depth; {
		d := c.pending()
		if d == nil {
			if d = t.choose(c); d == nil {
				return
			}
			if len(c.open) == 0 {
				c.lastBlock = time.Now() // the patience begins now
			}
			c.open = append(c.open, d)
		}
		b := d.next
		d.blocks[b] = asked
		d.next++
		c.inflight++
		c.send(d.message(pp.Request, b))
	}
}

// depth shares the requests in flight between the connections in use.
func (t *Torrent) depth() int {
	used := 0
	for c := range t.conns {
		used += btoi(!c.choked && c.useful > 0)
	}
	return min(maxDepth, max(minDepth, maxBlocks/max(1, used)))
}

// choose claims the piece to get from a connection: preferred first, then the
// rarest, then by our own lot.
func (t *Torrent) choose(c *conn) *download {
	buf := t.buffer()
	if buf == nil {
		return nil
	}
	n, ok := t.pieces.Claim(func(n int) (int64, bool) {
		return int64(t.copies[n])<<32 | int64(t.rank[n]), c.has.get(n)
	})
	if !ok {
		t.free = append(t.free, buf)
		return nil
	}
	t.open++
	return newDownload(n, buf[:t.info.PieceSize(n)])
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
