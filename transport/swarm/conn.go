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
	"syscall"
	"time"

	"github.com/anacrolix/torrent/bencode"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"golang.org/x/sys/unix"

	"rookery/transport"
	"rookery/transport/swarm/rules"
)

const handshakeSize = 68

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

// greet hears what somebody who connected wants, and answers. There is no connection
// to keep with who only wants a torrent file.
func (p *Peer) greet(ctx context.Context, nc net.Conn) (*conn, error) {
	addr := remote(nc)
	if p.isBanned(addr.Addr()) {
		return nil, errors.New("banned")
	}
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	nc.SetDeadline(time.Now().Add(shake))
	theirs, err := readGreeting(nc)
	if err == errGet {
		return nil, p.give(ctx, nc)
	}
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
	nc, err := t.peer.dial(dialing, "tcp", addr.String())
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

var errGet = errors.New("HTTP")

// readGreeting fails with errGet, and the rest to be read, at an HTTP request.
func readGreeting(r io.Reader) (greeting, error) {
	var b [handshakeSize]byte
	begin := b[:len(getMethod)]
	if _, err := io.ReadFull(r, begin); err != nil {
		return greeting{}, err
	}
	if string(begin) == getMethod {
		return greeting{}, errGet
	}
	if _, err := io.ReadFull(r, b[len(begin):]); err != nil {
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
	raw    syscall.RawConn // nil when it is not TCP
	id     [20]byte
	origin transport.Origin
	dialed bool // by us
	ours   bool // Rookery at the other end
	fast   bool
	ltep   bool
	block  int // bytes that we ask for at a time

	// Below t.mu.
	addr         netip.AddrPort // where the peer listens, when known
	has          rules.Set
	hasN         int  // set in has
	uploads      bool // only: it has what it wants (BEP 21)
	interested   bool
	lacks        int    // pieces that we have told of and it has not
	rack         string // where it stands, as it says
	held         bool   // we do not read: a piece is being stored, or a limit waited for
	open         []*download
	late         int  // blocks no longer wanted that may still come
	comes        bool // it was noted that it has the torrent file
	named        int  // times, for that
	doubts       int  // pieces that were wrong after it had filled their holes
	expects      bool // a server: it is to be told of what it has offered
	rules.Feed        // as it gives
	rules.Place       // as it takes
	rules.Client      // as a server sees it; of all, the host

	denied int // piece that it asked for in vain, of the reader alone

	// What is to be written, below mu, which is taken after t.mu.
	mu       sync.Mutex
	out      []byte
	requests []pp.RequestSpec
	queued   int64     // bytes of the requests that have not left
	taken    int64     // of these, of the one that is leaving
	writing  time.Time // since then; zero: not
	left     time.Time // when the last block had left
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
		block:  stockBlock,
		addr:   addr,
		has:    rules.NewSet(len(t.info.Hashes)),
		Feed:   rules.Feed{Choked: true, Gained: time.Now()},
		Client: rules.Client{Host: remote(nc).Addr()},
		denied: -1,
		woken:  make(chan struct{}, 1),
	}
	switch string(c.id[:len(serverPrefix)]) {
	case serverPrefix:
		c.origin, c.Server = transport.FromServer, true
		fallthrough
	case nodePrefix:
		c.ours, c.block = true, ownBlock
	}
	if t.seeder {
		c.Client = rules.NewClient(len(t.info.Hashes), c.Host, time.Now())
		c.ID = c.id
	}
	c.tune()
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
		if err := c.write(ctx); err != nil {
			t.peer.log.Debug("swarm: write", "client", remote(c.nc), "err", err)
		}
	})
	err := c.read(ctx)
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
// It is called below t.mu, so that no Have is lost after it. A server says that
// it has nothing: see handOut.
func (c *conn) introduce() {
	t := c.t
	switch {
	case c.fast && (t.seeder || t.seen == 0):
		c.send(pp.Message{Type: pp.HaveNone})
	case t.seeder:
	case c.fast && t.seen == len(t.copies):
		c.send(pp.Message{Type: pp.HaveAll})
	case t.seen > 0:
		field := make([]bool, len(t.copies))
		for n := range field {
			field[n] = t.have.Has(n)
		}
		c.send(pp.Message{Type: pp.Bitfield, Bitfield: field})
	}
	c.extend()
	c.send(pp.Message{Type: pp.Unchoke})
}

// extend sends the handshake of BEP 10, again when what it says has changed.
// A server learns from it which pieces are of any use to us; of itself it does
// not say that it only uploads, since libtorrent leaves who does and has nothing.
func (c *conn) extend() {
	if !c.ltep {
		return
	}
	hello := map[string]any{
		"m": map[string]int{}, "p": int(c.t.peer.port), "reqq": reqq, "upload_only": btoi(c.t.done && !c.t.seeder), "v": "Rookery",
	}
	if uses := c.t.pieces.Claimable(); uses != nil && c.origin == transport.FromServer {
		hello[usesKey] = string(packBits(uses))
	}
	if c.t.rack != "" {
		hello[rackKey] = c.t.rack
	}
	b, _ := bencode.Marshal(hello) // of plain values: it never fails
	c.send(pp.Message{Type: pp.Extended, ExtendedID: pp.HandshakeExtendedID, ExtendedPayload: b})
}

// usesKey is a key of our own in the handshake of BEP 10: a bitfield of the
// pieces that a node has a use for. Without it, it wants them all.
const usesKey = "rookery_uses"

// sated says whether the peer fetches nothing any more.
func (c *conn) sated() bool {
	return c.uploads || c.hasN == len(c.t.copies) || c.origin == transport.FromServer
}

// head is the length and the id of a message; a block has two numbers more.
const (
	headSize  = 5
	blockHead = headSize + 8
)

// read handles messages until the connection ends or breaks a rule. Blocks are
// read to where they belong; the rest is left to pp.Decoder.
func (c *conn) read(ctx context.Context) error {
	r := bufio.NewReaderSize(c.nc, 4<<10) // what is larger is not copied twice
	field := (len(c.t.info.Hashes) + 7) / 8
	d := pp.Decoder{R: r, MaxLength: pp.Integer(max(maxMessage, 1+field))}
	for {
		c.nc.SetReadDeadline(time.Now().Add(silence))
		size, err := r.Peek(4)
		if err != nil {
			return err
		}
		if n := binary.BigEndian.Uint32(size); n >= blockHead-4 {
			head, err := r.Peek(headSize)
			if err != nil {
				return err
			}
			if pp.MessageType(head[4]) == pp.Piece {
				if n > blockHead-4+maxRequest {
					return fmt.Errorf("%s: %d bytes: %w", pp.Piece, n, errUnasked)
				}
				if err := c.take(ctx, r); err != nil {
					return fmt.Errorf("%s: %w", pp.Piece, err)
				}
				continue
			}
		}
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

// maxMessage is the size of the largest message that is no block: a handshake
// of BEP 10.
const maxMessage = 16 << 10

var errUnasked = errors.New("nobody asked")

// handle does what one message says. An error ends the connection.
func (c *conn) handle(m *pp.Message) error {
	switch m.Type {
	case pp.Request:
		return c.ask(m.RequestSpec())
	case pp.Cancel:
		c.cancel(m.RequestSpec())
		return nil
	}
	t, now := c.t, time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.conns[c] { // what it says is counted no longer, and nobody would take it back
		return net.ErrClosed
	}
	if c.Stalled > 0 {
		c.Paused = time.Time{} // it is back
	}
	switch m.Type {
	case pp.Choke:
		c.Choked = true
		t.abandon(c)
	case pp.Unchoke:
		c.Unchoked()
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
		if err := t.refused(c, m, now); err != nil {
			return err
		}
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
	t.fill(now)
	t.handOut(now)
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

// extended reads the handshake of BEP 10, of which the port counts here,
// whether the peer has what it wants, and what it has a use for.
func (c *conn) extended(payload []byte) error {
	var hello struct {
		Port    int    `bencode:"p,ignore_unmarshal_type_error"`
		Uploads int    `bencode:"upload_only,ignore_unmarshal_type_error"`
		Uses    string `bencode:"rookery_uses,ignore_unmarshal_type_error"`
		Rack    string `bencode:"rookery_rack,ignore_unmarshal_type_error"`
	}
	if err := bencode.Unmarshal(payload, &hello); err != nil {
		return err
	}
	c.uploads = hello.Uploads == 1
	if from := remote(c.nc); hello.Port > 0 && hello.Port < 1<<16 && from.IsValid() {
		c.addr = netip.AddrPortFrom(from.Addr(), uint16(hello.Port))
	}
	c.t.comes(c)
	if c.moves(hello.Rack); c.t.seeder {
		return c.uses(hello.Uses)
	}
	c.t.crowd(c)
	return nil
}

// take reads a block into its piece and, when that is complete, keeps it.
func (c *conn) take(ctx context.Context, r *bufio.Reader) error {
	t := c.t
	t.mu.Lock()
	expected := len(c.open) > 0 || c.late > 0
	t.mu.Unlock()
	if !expected {
		return errUnasked // before it says which
	}
	head, err := r.Peek(blockHead)
	if err != nil {
		return err
	}
	size := int64(binary.BigEndian.Uint32(head)) - (blockHead - 4)
	piece, begin := binary.BigEndian.Uint32(head[headSize:]), binary.BigEndian.Uint32(head[headSize+4:])
	r.Discard(blockHead) // was there
	t.mu.Lock()
	d, b := c.find(int64(piece), int64(begin), size)
	if d == nil {
		c.late--
		late := c.late
		t.mu.Unlock()
		if late < 0 {
			return errUnasked
		}
		_, err := r.Discard(int(size))
		return err
	}
	d.reading = true
	t.mu.Unlock()
	err = c.fetch(ctx, r, d.buf[begin:int64(begin)+size])

	t.mu.Lock()
	now := time.Now()
	d.reading = false
	switch {
	case d.dropped: // while it was read
		c.late--
		t.recycle(d.buf)
	case err == nil:
		d.blocks[b].state = got
		if d.missing--; d.missing == 0 {
			c.strike(d)
			c.held = true
			if usual := &t.usual[btoi(c.Far)]; d.holes == nil {
				*usual = rules.Usually(*usual, now.Sub(d.since))
			}
		}
		t.fill(now)
	}
	complete := !d.dropped && d.missing == 0
	t.mu.Unlock()
	if err != nil || !complete {
		return err
	}

	// While this hashes and writes, the requests made above are on their way.
	err = t.pieces.Put(d.piece, d.buf, c.origin)
	doubt := d.holes != nil && errors.Is(err, transport.ErrBadPiece)
	t.mu.Lock()
	c.held, c.Heard = false, time.Now()
	t.drop(d)
	if doubt {
		t.whole[d.piece] = true // and it shows whose fault it is
		c.doubts++
		t.fill(c.Heard)
	}
	t.mu.Unlock()
	switch {
	case err == nil:
		t.sync()
	case doubt:
		t.peer.log.Warn("swarm: asked for whole", "client", remote(c.nc), "err", err)
	case errors.Is(err, transport.ErrBadPiece):
		t.peer.log.Warn("swarm: banned", "client", remote(c.nc), "err", err)
		t.peer.ban(remote(c.nc).Addr())
		return err
	default:
		t.fail(err)
	}
	return nil
}

// fetch reads all of a block, and takes note of every part.
func (c *conn) fetch(ctx context.Context, r io.Reader, b []byte) error {
	t := c.t
	t.mu.Lock()
	c.held = true // it is not the peer's fault
	t.mu.Unlock()
	err := t.peer.download.Wait(ctx, len(b))
	t.mu.Lock()
	c.held, c.Heard = false, time.Now()
	t.mu.Unlock()
	if err != nil {
		return err
	}
	defer c.wakeAt(1)
	for len(b) > 0 {
		c.wakeAt(len(b)) // and not for every packet
		n, err := r.Read(b)
		b = b[n:]
		if n > 0 {
			t.pieces.Received(n)
			t.mu.Lock()
			c.Heard = time.Now()
			if c.Stalled > 0 {
				c.recount(func() { c.Stalled = 0 })
			}
			t.mu.Unlock()
		}
		if err != nil && len(b) > 0 {
			return err
		}
	}
	return nil
}

// wakeAt lets the kernel wake the reader when n bytes are there.
func (c *conn) wakeAt(n int) {
	if c.raw != nil {
		_ = c.raw.Control(func(fd uintptr) { // without it, we are woken more often
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, n)
		})
	}
}

// packBits is the bitfield of BEP 3: the first piece is the highest bit.
func packBits(bits []bool) []byte {
	b := make([]byte, (len(bits)+7)/8)
	for n, set := range bits {
		b[n/8] |= byte(btoi(set)) << (7 - n%8)
	}
	return b
}
