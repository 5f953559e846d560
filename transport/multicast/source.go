package multicast

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"rookery/transport"
	"rookery/wire"
)

// defaultMemory is what blocks take that are not complete, in bytes.
const defaultMemory = 64 << 20

// A Source listens to a Sender. It asks for the layer where the server can be
// reached, and listens all the same where it cannot.
type Source struct {
	Config wire.Multicast
	Wants  string       // URL that takes a wire.Want
	Client *http.Client // for it
	Via    string       // interface; "": the one that the server is reached by
	Alone  bool         // nobody else fills holes: the sender is asked to
	Memory int64        // bytes for blocks that are not complete; 0: 64 MiB

	rest  time.Duration // after losses
	until time.Time     // it ends
	lost  float64       // share of what was sent before it
}

// Who loses so much, twice in a row, leaves the group to have its link for the
// others, if there are any, and comes back after a while: to what is sent to
// others then, but not to have it sent.
const (
	tooMuch  = 0.4
	restMin  = 15 * time.Second
	restMost = 2 * time.Minute
)

// errLossy says that a node had better ask others.
var errLossy = errors.New("too much is lost")

func (s *Source) String() string { return "multicast" }

// Fetch listens until everything is there. It fails when it cannot listen.
func (s *Source) Fetch(ctx context.Context, p *transport.Pieces) error {
	if err := s.pause(ctx, p); err != nil || p.Missing() == 0 {
		return err
	}
	r, err := s.join(p.Info().InfoHash)
	if err != nil {
		return err
	}
	if !s.Alone && s.lost == 0 {
		r.hope = time.Now().Add(hopeFirst)
		p.Expect(everything(p), false) // for a moment: a sender that waits for more nodes begins soon
	}
	err = r.run(ctx, p)
	if p.Missing() == 0 {
		return nil
	}
	if errors.Is(err, errLossy) {
		s.rest = min(max(restMin, 2*s.rest), restMost)
		s.until = time.Now().Add(s.rest)
		s.lost = r.col.share
	}
	return err
}

// join begins to listen to the group that something is sent to.
func (s *Source) join(infohash [20]byte) (*reception, error) {
	group, err := GroupOf(s.Config.Group, infohash, s.Config.Rate)
	if err != nil {
		return nil, err
	}
	server, err := netip.ParseAddr(s.Config.Server)
	if err != nil {
		return nil, err
	}
	conn, err := listen(netip.AddrPortFrom(group, s.Config.Port), server, s.Via)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	memory := s.Memory
	if memory == 0 {
		memory = defaultMemory
	}
	r := &reception{Source: s, conn: conn, memory: memory, poke: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
	copy(r.layer[:], infohash[:])
	var id [8]byte
	rand.Read(id[:])
	r.id = hex.EncodeToString(id[:])
	return r, nil
}

// run receives until everything is there that p wants. It leaves the group.
func (r *reception) run(ctx context.Context, p *transport.Pieces) error {
	r.pieces = p
	ctx, stop := context.WithCancelCause(ctx)
	var running sync.WaitGroup
	running.Go(func() { stop(r.receive(ctx)) })
	running.Go(func() { stop(r.put(ctx)) })
	running.Go(func() { r.look(ctx) })
	running.Go(func() { stop(r.say(ctx)) })
	p.SetParts(r.part)
	select {
	case <-p.Done():
	case <-ctx.Done():
	}
	p.SetParts(nil)
	stop(nil)
	r.conn.Close()
	running.Wait()
	p.Expect(nil, false)
	return context.Cause(ctx)
}

// pause waits for the end of a rest.
func (s *Source) pause(ctx context.Context, p *transport.Pieces) error {
	timer := time.NewTimer(time.Until(s.until))
	defer timer.Stop()
	select {
	case <-p.Done():
	case <-ctx.Done():
	case <-timer.C:
	}
	return ctx.Err()
}

// A reception is one time in a group.
type reception struct {
	*Source
	pieces *transport.Pieces
	conn   *receiver
	memory int64
	layer  [8]byte
	id     string
	poke   chan struct{} // there is something to put
	turn   chan struct{} // a pass has ended

	mu   sync.Mutex
	col  *collector // nil before the first datagram
	due  []*block   // something of them can be put
	hope time.Time  // until then the sender may begin
}

// How long the others are kept from fetching what a sender may begin to send: at
// first, and since the server said that it is about to, for some times.
const (
	hopeFirst = 2 * time.Second
	hopeSaid  = 3 * time.Second
	hopeTimes = 3
)

func everything(p *transport.Pieces) []bool {
	all := make([]bool, len(p.Info().Hashes))
	for n := range all {
		all[n] = true
	}
	return all
}

// receive takes datagrams in until the socket is closed.
func (r *reception) receive(ctx context.Context) error {
	for {
		err := r.conn.read(func(batch [][]byte) {
			now := time.Now()
			r.mu.Lock()
			defer r.mu.Unlock()
			for _, b := range batch {
				r.one(b, now)
			}
		})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
	}
}

// one takes a datagram. Called by who holds mu.
func (r *reception) one(datagram []byte, now time.Time) {
	h, shard, err := parse(datagram)
	if err != nil || h.layer != r.layer {
		return
	}
	if c := r.col; c == nil || c.shard != len(shard) {
		if c != nil && c.flows(now) && c.trusted(now) {
			return // a second sender, with packets of another size
		}
		l, err := newLayout(r.pieces.Info(), len(shard))
		if err != nil {
			return
		}
		r.col = newCollector(l, r.memory, r.Alone)
		r.col.wanted(r.pieces, r.pieces.Wanted())
	}
	b, helps, news := r.col.add(h, shard, now)
	if helps && r.col.trusted(now) {
		// Otherwise only what turns out to be right is a sign of life.
		r.pieces.Received(len(shard))
	}
	if news {
		r.due = append(r.due, b)
		signal(r.poke)
	}
	if r.col.broken(now) {
		signal(r.turn)
	}
}

// signal leaves word for one who waits, or will.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// put gives complete pieces away, restores blocks, and takes in what others bring.
func (r *reception) put(ctx context.Context) error {
	seen, narrow, held := 0, false, true
	for {
		fresh, more := r.pieces.Since(seen)
		seen += len(fresh)
		r.found(fresh)
		if n, h := r.pieces.Wanted() != nil, r.pieces.Held(); n != narrow || h != held {
			narrow, held = n, h
			r.review()
		}
		for {
			r.mu.Lock()
			var b *block
			if len(r.due) > 0 {
				b, r.due = r.due[0], r.due[1:]
			}
			r.mu.Unlock()
			if b == nil {
				break
			}
			if err := r.finish(b); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-more:
		case <-r.poke:
		}
	}
}

// review looks at all blocks again: what is wanted has changed.
func (r *reception) review() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.col == nil {
		return
	}
	r.col.wanted(r.pieces, r.pieces.Wanted())
	for _, b := range r.col.open {
		r.due = append(r.due, b)
	}
}

// found takes in pieces that are complete, whoever brought them: their rows
// help to restore the others.
func (r *reception) found(pieces []int) {
	r.mu.Lock()
	c := r.col
	r.mu.Unlock()
	if c == nil {
		return
	}
	wanted := r.pieces.Wanted()
	for _, n := range pieces {
		at := c.of(n)
		r.mu.Lock()
		b := c.open[at]
		r.mu.Unlock()
		if b != nil {
			r.feed(c, b, n)
		}
		first, end := c.pieces(at)
		lacking := false
		for i := first; i < end && !lacking; i++ {
			lacking = !r.pieces.Has(i) && (wanted == nil || wanted[i])
		}
		r.mu.Lock()
		if !lacking {
			c.closeBlock(at)
		} else if b != nil && c.ready(b) {
			r.due = append(r.due, b)
		}
		r.mu.Unlock()
	}
}

// feed gives a block a piece that is there.
func (r *reception) feed(c *collector, b *block, n int) {
	first, _ := c.pieces(b.n)
	if b.told[n-first] {
		return
	}
	content := make([]byte, r.pieces.Info().PieceSize(n))
	if _, err := r.pieces.ReadAt(content, int64(n)*r.pieces.Info().PieceLength); err != nil {
		content = nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c.known(b, n-first, content)
}

// finish puts what a block has, and restores it when that is possible.
func (r *reception) finish(b *block) error {
	r.mu.Lock()
	c := r.col
	open := c.open[b.n] == b
	r.mu.Unlock()
	if !open {
		return nil // dropped meanwhile, or closed
	}
	first, end := c.pieces(b.n)
	for n := first; n < end && !b.fed; n++ {
		if r.pieces.Has(n) {
			r.feed(c, b, n)
		}
	}
	b.fed = true
	r.mu.Lock()
	if c.open[b.n] != b {
		r.mu.Unlock()
		return nil
	}
	claimable := r.pieces.Claimable()
	wants := func(i int) bool { return !b.told[i] && (claimable == nil || claimable[first+i]) }
	var codes []int
	for i := range b.lacks {
		if wants(i) {
			codes = c.restorable(b)
			break
		}
	}
	if len(codes) > 0 {
		b.busy = true
		table := c.table(b)
		r.mu.Unlock()
		// Rows that are here are not written any more, nor are those of a complete code.
		for _, k := range codes {
			if err := c.restore(b.n, k, table); err != nil {
				return fmt.Errorf("block %d: %w", b.n, err)
			}
		}
		r.mu.Lock()
		b.busy = false
		for _, k := range codes {
			c.restored(b, k)
		}
	}
	var ready []int
	for i, lacks := range b.lacks {
		if lacks == 0 && wants(i) {
			ready = append(ready, i)
		}
	}
	r.mu.Unlock()

	var put []int
	bad := false
	for _, i := range ready {
		err := r.pieces.Put(first+i, c.piece(b, i), transport.FromMulticast)
		switch {
		case errors.Is(err, transport.ErrBadPiece):
			bad = true
		case err != nil:
			return err
		default:
			put = append(put, i)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(put) > 0 {
		c.put = time.Now()
		c.spoilt = 0
	}
	if c.open[b.n] != b {
		return nil // dropped meanwhile
	}
	for _, i := range put {
		c.known(b, i, c.piece(b, i))
	}
	if bad {
		c.spoil(b)
	}
	return nil
}

// part is for transport.Pieces.Part.
func (r *reception) part(n int, b []byte) []transport.Range {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.col == nil {
		return nil
	}
	return r.col.part(n, b)
}

// look says again and again which pieces are not to be asked for elsewhere.
func (r *reception) look(ctx context.Context) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-r.turn:
		}
		r.mu.Lock()
		now, streams := time.Now(), false
		var soon []bool
		switch {
		case r.col != nil:
			soon = r.col.expected(now)
			streams = r.col.trusted(now) && !r.col.broken(now)
		case !r.Alone && now.Before(r.hope):
			soon = everything(r.pieces)
		}
		r.mu.Unlock()
		r.pieces.Expect(soon, streams)
	}
}

// How often a node says what it wants, besides at once when a pass has ended.
var sayAfter = []time.Duration{time.Second, 2 * time.Second, 5 * time.Second}

// say tells the server what is wanted. It is no error when that cannot be done, but
// when it is better not to listen.
func (r *reception) say(ctx context.Context) error {
	tick := time.NewTicker(endAfter / 2)
	defer tick.Stop()
	told := uint32(0) // of which pass that it is over
	for next, times, quiet := time.Now(), 0, false; ; {
		now := time.Now()
		pass, over := r.over(now)
		if r.asks() && (!now.Before(next) || over && (!quiet || pass != told)) { // one may take less than a tick
			// One that is not awaited could be heard after the last word.
			if sent, _, _ := r.tell(context.WithoutCancel(ctx), r.want(now)); sent && times < hopeTimes {
				r.mu.Lock()
				r.hope = time.Now().Add(hopeSaid)
				r.mu.Unlock()
			}
			next = time.Now().Add(sayAfter[min(times, len(sayAfter)-1)])
			times++
		}
		if quiet = over; over {
			told = pass
		}
		err := r.lossy()
		select {
		case <-tick.C:
		case <-ctx.Done():
			err = ctx.Err()
		}
		if err != nil {
			if times > 0 {
				r.leave(ctx, r.pieces.Info().Layer)
			}
			return err
		}
	}
}

// asks says whether to say what is wanted.
func (r *reception) asks() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lost == 0 || r.col != nil
}

// lossy is an error when others had better bring the pieces.
func (r *reception) lossy() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Alone || r.col == nil || r.col.heavy < 2 {
		return nil
	}
	return fmt.Errorf("%w: %.0f %% of what was sent", errLossy, 100*r.col.share)
}

// over says whether a pass has ended, and which: the sender waits to hear what is lacked.
func (r *reception) over(now time.Time) (pass uint32, over bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.col == nil {
		return 0, false
	}
	return r.col.pass, r.col.broken(now)
}

func (r *reception) want(now time.Time) wire.Want {
	w := wire.Want{Client: r.id, Layer: r.pieces.Info().Layer, Rate: r.Config.Rate, Helped: !r.Alone, Lost: r.lost}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.col == nil {
		return w
	}
	if lost, known := r.col.lost(now); known {
		w.Lost = lost
		if len(r.col.state) <= maxSaid {
			w.Lacks = r.col.wants(now)
		}
	}
	return w
}

// maxSaid is how many blocks are spoken of. Larger layers are sent as a whole.
const maxSaid = 64 << 10

// leave says that a layer or file is wanted no more.
func (r *reception) leave(ctx context.Context, d wire.Digest) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_, _, _ = r.tell(ctx, wire.Want{Client: r.id, Layer: d, Rate: r.Config.Rate, Done: true}) // it is forgotten if not heard
}

// tell says what is wanted. It returns whether that is sent, or is about to be, and its
// size; 0: the server does not say.
func (r *reception) tell(ctx context.Context, w wire.Want) (sent bool, size int64, err error) {
	if r.Wants == "" {
		return false, 0, nil
	}
	body, err := json.Marshal(w)
	if err != nil {
		return false, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.Wants, bytes.NewReader(body))
	if err != nil {
		return false, 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := r.Client.Do(req)
	if err != nil {
		return false, 0, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, wire.MaxSending+1))
	switch {
	case err != nil:
		return false, 0, fmt.Errorf("%s: %w", r.Wants, err)
	case resp.StatusCode == http.StatusNoContent:
		return false, 0, nil
	case resp.StatusCode != http.StatusAccepted:
		return false, 0, fmt.Errorf("%s: %s", r.Wants, resp.Status)
	case len(answer) == 0: // it is older
		return true, 0, nil
	}
	said, err := wire.DecodeSending(answer)
	return err == nil, said.Size, err
}
