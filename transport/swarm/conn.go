package swarm

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/anacrolix/torrent/bencode"
	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
)

const (
	handshakeSize = 68
	maxRequest    = 128 << 10 // bytes of one request; stock clients ask for 16 KiB
	maxRequests   = 1024      // waiting requests of one peer
	reqq          = 250       // what we say of that: stock clients keep it
)

var extensions = pp.NewPeerExtensionBytes(pp.ExtensionBitFast, pp.ExtensionBitLtep)

// greeting is the first thing that is said on a connection.
type greeting struct {
	bits     pp.PeerExtensionBits
	infohash [20]byte
	id       [20]byte
}

func (g greeting) encode() []byte {
	b := make([]byte, 0, handshakeSize)
	b = append(b, pp.Protocol...)
	b = append(b, g.bits[:]...)
	b = append(b, g.infohash[:]...)
	return append(b, g.id[:]...)
}

func decodeGreeting(b [handshakeSize]byte) (g greeting, err error) {
	rest := b[len(pp.Protocol):]
	if string(b[:len(pp.Protocol)]) != pp.Protocol {
		return g, errors.New("not BitTorrent, or encrypted")
	}
	rest = rest[copy(g.bits[:], rest):]
	rest = rest[copy(g.infohash[:], rest):]
	copy(g.id[:], rest)
	if g.id == [20]byte{} {
		return g, errors.New("no peer id")
	}
	return g, nil
}

// greet hears what somebody who connected wants, and answers.
func (p *Peer) greet(ctx context.Context, nc net.Conn) (*conn, error) {
	addr := remote(nc)
	if p.isBanned(addr.Addr()) {
		return nil, errors.New("banned")
	}
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	nc.SetDeadline(time.Now().Add(shake))
	theirs, err := readGreeting(nc)
	if err != nil {
		return nil, err
	}
	t := p.torrent(theirs.infohash)
	if t == nil {
		return nil, fmt.Errorf("torrent %x is not here", theirs.infohash)
	}
	if _, err := nc.Write(greeting{extensions, t.info.InfoHash, t.id}.encode()); err != nil {
		return nil, err
	}
	return newConn(t, nc, theirs, netip.AddrPort{}), nil
}

// connect opens a connection and introduces itself.
func (t *Torrent) connect(ctx context.Context, addr netip.AddrPort) (*conn, error) {
	dialing, cancel := context.WithTimeout(ctx, dialFor)
	defer cancel()
	nc, err := t.peer.dialer.DialContext(dialing, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	nc.SetDeadline(time.Now().Add(shake))
	theirs, err := func() (greeting, error) {
		if _, err := nc.Write(greeting{extensions, t.info.InfoHash, t.id}.encode()); err != nil {
			return greeting{}, err
		}
		return readGreeting(nc)
	}()
	if err == nil && theirs.infohash != t.info.InfoHash {
		err = fmt.Errorf("answers for torrent %x", theirs.infohash)
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	c := newConn(t, nc, theirs, addr)
	c.dialed = true
	return c, nil
}

func readGreeting(r io.Reader) (greeting, error) {
	var b [handshakeSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return greeting{}, err
	}
	return decodeGreeting(b)
}

func remote(nc net.Conn) netip.AddrPort {
	addr, ok := nc.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := addr.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// A conn is a connection to one peer of a swarm.
type conn struct {
	t      *Torrent
	nc     net.Conn
	id     [20]byte
	origin transport.Origin
	dialed bool // by us
	fast   bool
	ltep   bool

	// Below t.mu.
	addr       netip.AddrPort // where the peer listens, when known
	has        bitset
	hasN       int  // set in has
	useful     int  // in has and not in t.spare
	uploads    bool // only: it has what it wants (BEP 21)
	choked     bool
	interested bool
	storing    bool
	open       []*download
	inflight   int // blocks asked for
	late       int // blocks no longer wanted that may still come
	stalled    int // times, one after the other
	lastBlock  time.Time
	paused     time.Time // nothing is asked for until then

	// What is to be written, below mu, which is taken after t.mu.
	mu       sync.Mutex
	out      []byte
	requests []pp.RequestSpec
	closed   bool
	woken    chan struct{}
}

func newConn(t *Torrent, nc net.Conn, theirs greeting, addr netip.AddrPort) *conn {
	c := &conn{
		t:      t,
		nc:     nc,
		id:     theirs.id,
		origin: transport.FromPeer,
		fast:   theirs.bits.SupportsFast(),
		ltep:   theirs.bits.SupportsExtended(),
		addr:   addr,
		has:    newBitset(len(t.info.Hashes)),
		choked: true,
		woken:  make(chan struct{}, 1),
	}
	if string(c.id[:len(serverPrefix)]) == serverPrefix {
		c.origin = transport.FromServer
	}
	return c
}

// serve is the life of a connection after the greetings.
func (t *Torrent) serve(ctx context.Context, c *conn) {
	defer c.close()
	if !t.attach(c) {
		return
	}
	defer context.AfterFunc(ctx, c.close)()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer c.close()
		if err := c.write(); err != nil {
			t.peer.log.Debug("swarm: write", "client", remote(c.nc), "err", err)
		}
	})
	err := c.read()
	t.peer.log.Debug("swarm: connection ended", "client", remote(c.nc), "err", err)
	c.close()
	t.detach(c)
	wg.Wait()
}

// close ends the connection. What is queued is lost.
func (c *conn) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.nc.Close()
	c.wake()
}

// wake lets write look.
func (c *conn) wake() {
	select {
	case c.woken <- struct{}{}:
	default:
	}
}

func (c *conn) send(m pp.Message) {
	c.enqueue(m.MustMarshalBinary())
	c.wake()
}

// enqueue adds an encoded message, which goes out with the next wake.
func (c *conn) enqueue(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.out) > 1<<20+9*len(c.t.info.Hashes) && !c.closed {
		c.closed = true // it does not read what it makes us say
		c.nc.Close()
	}
	if !c.closed {
		c.out = append(c.out, b...)
	}
}

// introduce says what we have, that we choke nobody, and where we listen.
// It is called below t.mu, so that no Have is lost after it.
func (c *conn) introduce() {
	t := c.t
	switch {
	case c.fast && t.seen == len(t.copies):
		c.send(pp.Message{Type: pp.HaveAll})
	case c.fast && t.seen == 0:
		c.send(pp.Message{Type: pp.HaveNone})
	case t.seen > 0:
		field := make([]bool, len(t.copies))
		for n := range field {
			field[n] = t.have.get(n)
		}
		c.send(pp.Message{Type: pp.Bitfield, Bitfield: field})
	}
	c.extend()
	c.send(pp.Message{Type: pp.Unchoke})
}

// extend sends the handshake of BEP 10, again when we have what we want.
func (c *conn) extend() {
	if !c.ltep {
		return
	}
	hello, _ := bencode.Marshal(map[string]any{ // of plain values: it never fails
		"m": map[string]int{}, "p": int(c.t.peer.port), "reqq": reqq, "upload_only": btoi(c.t.done), "v": "Rookery",
	})
	c.send(pp.Message{Type: pp.Extended, ExtendedID: pp.HandshakeExtendedID, ExtendedPayload: hello})
}

// sated says whether the peer fetches nothing any more.
func (c *conn) sated() bool { return c.uploads || c.hasN == len(c.t.copies) }

// write sends what is queued: first the messages, then one block at a time.
func (c *conn) write() error {
	var buf []byte
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil
		}
		buf, c.out = append(buf[:0], c.out...), c.out[:0]
		var r pp.RequestSpec
		if len(c.requests) > 0 {
			r, c.requests = c.requests[0], c.requests[1:]
		}
		c.mu.Unlock()

		if len(buf) == 0 && r.Length == 0 {
			timer := time.NewTimer(keepAlive)
			select {
			case <-c.woken:
				timer.Stop()
				continue
			case <-timer.C:
				buf = append(buf, 0, 0, 0, 0)
			}
		}
		if r.Length > 0 {
			buf = binary.BigEndian.AppendUint32(buf, uint32(9+r.Length))
			buf = append(buf, byte(pp.Piece))
			buf = binary.BigEndian.AppendUint32(buf, uint32(r.Index))
			buf = binary.BigEndian.AppendUint32(buf, uint32(r.Begin))
			head := len(buf)
			buf = append(buf, make([]byte, r.Length)...)
			off := int64(r.Index)*c.t.info.PieceLength + int64(r.Begin)
			if _, err := c.t.pieces.ReadAt(buf[head:], off); err != nil {
				return err
			}
		}
		c.nc.SetWriteDeadline(time.Now().Add(writeFor))
		if _, err := c.nc.Write(buf); err != nil {
			return err
		}
		c.t.pieces.Sent(int(r.Length))
	}
}

// block is the one buffer that pp.Decoder gets for blocks: each is copied to
// its piece before the next message is read.
type block struct{ b []byte }

func (p *block) Get() *[]byte { return &p.b }
func (p *block) Put(*[]byte)  {}

// read handles messages until the connection ends or breaks a rule.
func (c *conn) read() error {
	size := 32 << 10
	if c.t.seeder {
		size = 4 << 10 // it gets requests only, from very many
	}
	field := (len(c.t.info.Hashes) + 7) / 8
	d := pp.Decoder{
		R:         bufio.NewReaderSize(c.nc, size),
		Pool:      &block{make([]byte, blockSize)},
		MaxLength: pp.Integer(max(9+blockSize, 1+field)),
	}
	for {
		c.nc.SetReadDeadline(time.Now().Add(silence))
		var m pp.Message
		if err := d.Decode(&m); err != nil {
			return err
		}
		if m.Keepalive {
			continue
		}
		if err := c.handle(&m); err != nil {
			return fmt.Errorf("%s: %w", m.Type, err)
		}
	}
}

var errUnasked = errors.New("nobody asked")

// handle does what one message says. An error ends the connection.
func (c *conn) handle(m *pp.Message) error {
	switch m.Type {
	case pp.Piece:
		return c.take(m)
	case pp.Request:
		return c.ask(m.RequestSpec())
	case pp.Cancel:
		c.cancel(m.RequestSpec())
		return nil
	}
	t := c.t
	t.mu.Lock()
	defer t.mu.Unlock()
	switch m.Type {
	case pp.Choke:
		c.choked = true
		t.abandon(c)
	case pp.Unchoke:
		c.choked = false
	case pp.Have:
		if int64(m.Index) >= int64(len(t.copies)) {
			return fmt.Errorf("piece %d of %d", m.Index, len(t.copies))
		}
		t.gains(c, int(m.Index))
	case pp.Bitfield, pp.HaveAll, pp.HaveNone:
		// At the start, by the book; aria2 says its new pieces like this, too.
		if err := c.declare(m); err != nil {
			return err
		}
	case pp.Reject:
		if d, _ := c.find(int64(m.Index), int64(m.Begin), int64(m.Length)); d != nil {
			t.abandon(c)
			c.paused = time.Now().Add(time.Second)
		} else if c.late--; c.late < 0 {
			return errUnasked
		}
		return nil
	case pp.Extended:
		if m.ExtendedID != pp.HandshakeExtendedID {
			return nil
		}
		if err := c.extended(m.ExtendedPayload); err != nil {
			return err
		}
	default: // hints, and what belongs to things we did not offer
		return nil
	}
	t.judge(c)
	t.fill(c)
	return nil
}

// declare notes all that the peer has.
func (c *conn) declare(m *pp.Message) error {
	count := len(c.t.copies)
	if m.Type == pp.Bitfield && len(m.Bitfield) != (count+7)/8*8 {
		return fmt.Errorf("%d bits for %d pieces", len(m.Bitfield), count)
	}
	for n, has := range m.Bitfield {
		if has && n >= count {
			return fmt.Errorf("bit %d of %d pieces", n, count)
		}
	}
	for n := range count {
		if m.Type == pp.HaveAll || m.Type == pp.Bitfield && m.Bitfield[n] {
			c.t.gains(c, n)
		}
	}
	return nil
}

// extended reads the handshake of BEP 10, of which the port counts here, and
// whether the peer has what it wants.
func (c *conn) extended(payload []byte) error {
	var hello struct {
		Port    int `bencode:"p,ignore_unmarshal_type_error"`
		Uploads int `bencode:"upload_only,ignore_unmarshal_type_error"`
	}
	if err := bencode.Unmarshal(payload, &hello); err != nil {
		return err
	}
	c.uploads = hello.Uploads == 1
	if from := remote(c.nc); hello.Port > 0 && hello.Port < 1<<16 && from.IsValid() {
		c.addr = netip.AddrPortFrom(from.Addr(), uint16(hello.Port))
	}
	return nil
}

// ask queues what the peer wants.
func (c *conn) ask(r pp.RequestSpec) error {
	info := c.t.info
	if int64(r.Index) >= int64(len(info.Hashes)) || r.Length == 0 || r.Length > maxRequest ||
		int64(r.Begin)+int64(r.Length) > int64(info.PieceSize(int(r.Index))) {
		return fmt.Errorf("%d bytes at %d of piece %d", r.Length, r.Begin, r.Index)
	}
	if !c.t.pieces.Has(int(r.Index)) {
		if !c.fast {
			return fmt.Errorf("piece %d is not here", r.Index)
		}
		c.send(reject(r))
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.requests) >= maxRequests {
		return fmt.Errorf("more than %d at a time", maxRequests)
	}
	c.requests = append(c.requests, r)
	c.wake()
	return nil
}

// cancel forgets what the peer no longer wants.
func (c *conn) cancel(r pp.RequestSpec) {
	c.mu.Lock()
	found := false
	for i, queued := range c.requests {
		if queued == r {
			c.requests = append(c.requests[:i:i], c.requests[i+1:]...)
			found = true
			break
		}
	}
	c.mu.Unlock()
	if found && c.fast {
		c.send(reject(r)) // BEP 6: every request gets an answer
	}
}

func reject(r pp.RequestSpec) pp.Message {
	return pp.Message{Type: pp.Reject, Index: r.Index, Begin: r.Begin, Length: r.Length}
}

// take puts a block into its piece and, when that is complete, keeps it.
func (c *conn) take(m *pp.Message) error {
	t := c.t
	t.mu.Lock()
	d, b := c.find(int64(m.Index), int64(m.Begin), int64(len(m.Piece)))
	if d == nil {
		defer t.mu.Unlock()
		if c.late--; c.late < 0 {
			return errUnasked
		}
		return nil
	}
	copy(d.buf[b*blockSize:], m.Piece)
	d.blocks[b] = got
	d.missing--
	c.inflight--
	c.stalled, c.lastBlock = 0, time.Now()
	if d.missing == 0 {
		c.finish(d)
	}
	t.fill(c)
	t.mu.Unlock()
	t.pieces.Received(len(m.Piece))
	if d.missing > 0 {
		return nil
	}

	// While this hashes and writes, the requests made above are on their way.
	err := t.pieces.Put(d.piece, d.buf, c.origin)
	t.mu.Lock()
	c.storing, c.lastBlock = false, time.Now()
	t.close(d)
	t.mu.Unlock()
	switch {
	case err == nil:
		t.sync()
		t.mu.Lock()
		t.fill(c)
		t.mu.Unlock()
	case errors.Is(err, transport.ErrBadPiece):
		t.peer.log.Warn("swarm: banned", "client", remote(c.nc), "err", err)
		t.peer.ban(remote(c.nc).Addr())
		return err
	default:
		t.fail(err)
	}
	return nil
}

// find is the block that was asked for with these numbers.
func (c *conn) find(piece, begin, size int64) (*download, int) {
	for _, d := range c.open {
		b := int(begin / blockSize)
		if int64(d.piece) == piece && b < len(d.blocks) && d.blocks[b] == asked {
			if at, length := d.block(b); int64(at) == begin && int64(length) == size {
				return d, b
			}
		}
	}
	return nil, 0
}

// finish takes a piece that has all its blocks off the list.
func (c *conn) finish(d *download) {
	c.storing = true
	for i, other := range c.open {
		if other == d {
			c.open = append(c.open[:i], c.open[i+1:]...)
			return
		}
	}
}

// pending is the piece of which not all has been asked for.
func (c *conn) pending() *download {
	if last := len(c.open) - 1; last >= 0 && c.open[last].next < len(c.open[last].blocks) {
		return c.open[last]
	}
	return nil
}

// A download is a piece on its way from one peer. All of it comes from there,
// so a bad piece has one culprit.
type download struct {
	piece   int
	buf     []byte
	blocks  []state
	next    int // block to ask for
	missing int
}

// state is how far a block is.
type state byte

const (
	unasked state = iota
	asked
	got
)

func newDownload(piece int, buf []byte) *download {
	count := (len(buf) + blockSize - 1) / blockSize
	return &download{piece: piece, buf: buf, blocks: make([]state, count), missing: count}
}

// block is the place of block b in its piece.
func (d *download) block(b int) (begin, length int) {
	begin = b * blockSize
	return begin, min(blockSize, len(d.buf)-begin)
}

func (d *download) message(kind pp.MessageType, b int) pp.Message {
	begin, length := d.block(b)
	return pp.Message{Type: kind, Index: pp.Integer(d.piece), Begin: pp.Integer(begin), Length: pp.Integer(length)}
}

// A bitset is a set of pieces.
type bitset []uint64

func newBitset(n int) bitset    { return make(bitset, (n+63)/64) }
func (b bitset) get(n int) bool { return b[n/64]>>(n%64)&1 == 1 }
func (b bitset) set(n int)      { b[n/64] |= 1 << (n % 64) }
