package swarm

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A lan is a switch with a machine at each port, for tests in virtual time: what
// is said goes in packets, which wait in one line for the sender's uplink and in
// one for the receiver's downlink, and so does what says that they have come. So
// who has much to send hears and is heard late. A connection keeps unsent and
// unread bytes as TCP does.
type lan struct {
	wg    sync.WaitGroup
	mu    sync.Mutex
	hosts map[netip.Addr]*lanHost
}

const (
	packet    = 8948     // bytes of payload: an MTU of 9000
	window    = 64 << 10 // bytes of a connection that are sent and not read
	overhead  = 66       // bytes of headers, Ethernet's too
	roundTrip = 100 * time.Microsecond
)

// A lanRack is a switch of its own, which one cable connects to that of the lan.
// What waits for the cable waits in one line in each direction.
type lanRack struct {
	name     string
	out, in  chan lanPacket
	received atomic.Int64 // bytes, with headers
}

// rack adds a switch whose cable carries rate bytes a second in each direction.
func (l *lan) rack(ctx context.Context, name string, rate float64) *lanRack {
	r := &lanRack{name: name, out: make(chan lanPacket, 1<<18), in: make(chan lanPacket, 1<<18)}
	l.wg.Go(func() { carry(ctx, rate, r.out, func(p lanPacket) chan lanPacket { return p.to.host.port() }) })
	l.wg.Go(func() {
		carry(ctx, rate, r.in, func(p lanPacket) chan lanPacket {
			r.received.Add(int64(len(p.b) + overhead))
			return p.to.host.in
		})
	})
	return r
}

// carry takes packets one after the other over a cable.
func carry(ctx context.Context, rate float64, from chan lanPacket, to func(lanPacket) chan lanPacket) {
	wire := link{rate: rate}
	for {
		select {
		case p := <-from:
			wire.carry(len(p.b))
			to(p) <- p // has room for all that windows allow
		case <-ctx.Done():
			return
		}
	}
}

// port is where the lan's switch puts what is for the host.
func (h *lanHost) port() chan lanPacket {
	if h.rack != nil {
		return h.rack.in
	}
	return h.in
}

// hop is where a packet goes from the host's uplink.
func (h *lanHost) hop(to *lanHost) chan lanPacket {
	switch h.rack {
	case to.rack:
		return to.in
	case nil:
		return to.port()
	}
	return h.rack.out
}

// A lanHost is a machine. It has a peer's listener, and dials.
type lanHost struct {
	lan  *lan
	rack *lanRack // nil: on the lan's own switch
	addr netip.AddrPort
	rate float64 // bytes a second, in each direction
	in   chan lanPacket
	new  chan net.Conn // to be accepted
	gone chan struct{} // closed by Close

	mu      sync.Mutex
	queue   []lanPacket // for the uplink
	stirred chan struct{}
	sent    int64 // bytes, with headers
	ports   uint16
	cut     atomic.Bool // nothing comes or goes any more, and nobody is told
}

type lanPacket struct {
	to  *lanConn
	b   []byte
	ack int // bytes that were read
}

// host adds a machine that works until ctx ends.
func (l *lan) host(ctx context.Context, n int, rate float64, rack *lanRack) *lanHost {
	h := &lanHost{
		lan: l, rack: rack, addr: lanAddr(n), rate: rate,
		in: make(chan lanPacket, 1<<16), new: make(chan net.Conn, 1024), gone: make(chan struct{}), stirred: make(chan struct{}, 1),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hosts == nil {
		l.hosts = map[netip.Addr]*lanHost{}
	}
	l.hosts[h.addr.Addr()] = h
	l.wg.Go(func() { h.uplink(ctx) })
	l.wg.Go(func() { h.downlink(ctx) })
	return h
}

func lanAddr(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 6881)
}

// A link is busy until then.
type link struct {
	rate float64
	free time.Time
}

// carry returns when n bytes have passed.
func (l *link) carry(n int) {
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n+overhead) / l.rate * float64(time.Second)))
	time.Sleep(time.Until(l.free))
}

// uplink sends what waits, in the order in which it came: a message of a few bytes
// waits for the blocks before it, and so does what says that a block has come.
func (h *lanHost) uplink(ctx context.Context) {
	wire := link{rate: h.rate}
	for {
		h.mu.Lock()
		var p lanPacket
		if len(h.queue) > 0 {
			p, h.queue = h.queue[0], h.queue[1:]
			h.sent += int64(len(p.b) + overhead)
		}
		h.mu.Unlock()
		if p.to == nil {
			select {
			case <-h.stirred:
				continue
			case <-ctx.Done():
				return
			}
		}
		wire.carry(len(p.b))
		if h.cut.Load() {
			<-ctx.Done()
			return
		}
		select {
		case h.hop(p.to.host) <- p:
		case <-ctx.Done():
			return
		}
	}
}

func (h *lanHost) downlink(ctx context.Context) {
	wire := link{rate: h.rate}
	for {
		select {
		case p := <-h.in:
			wire.carry(len(p.b))
			if h.cut.Load() {
				<-ctx.Done()
				return
			}
			p.to.deliver(p)
		case <-ctx.Done():
			return
		}
	}
}

// queues puts a packet at the end of what waits for the uplink.
func (h *lanHost) queues(p lanPacket) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.queue = append(h.queue, p)
	select {
	case h.stirred <- struct{}{}:
	default:
	}
}

// Sent is how many bytes the machine has sent.
func (h *lanHost) Sent() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sent
}

// Accept, Close and Addr make it a net.Listener.
func (h *lanHost) Accept() (net.Conn, error) {
	select {
	case c := <-h.new:
		return c, nil
	case <-h.gone:
		return nil, net.ErrClosed
	}
}

func (h *lanHost) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-h.gone:
	default:
		close(h.gone)
	}
	return nil
}

func (h *lanHost) Addr() net.Addr { return net.TCPAddrFromAddrPort(h.addr) }

// dial is for Peer.
func (h *lanHost) dial(_ context.Context, _, addr string) (net.Conn, error) {
	h.lan.mu.Lock()
	other := h.lan.hosts[netip.MustParseAddrPort(addr).Addr()]
	h.lan.mu.Unlock()
	if other == nil {
		return nil, errors.New("no route to host")
	}
	time.Sleep(roundTrip)
	h.mu.Lock()
	h.ports++
	from := netip.AddrPortFrom(h.addr.Addr(), 32768+h.ports)
	h.mu.Unlock()
	a := &lanConn{host: h, at: net.TCPAddrFromAddrPort(from), changed: make(chan struct{})}
	b := &lanConn{host: other, at: other.Addr(), changed: make(chan struct{})}
	a.peer, b.peer = b, a
	select {
	case other.new <- b:
		return a, nil
	case <-other.gone:
		return nil, errors.New("connection refused")
	}
}

// A lanConn is one end of a connection.
type lanConn struct {
	host *lanHost
	peer *lanConn
	at   net.Addr

	mu      sync.Mutex
	out     []byte // written and not sent
	flying  int    // sent and not acknowledged
	read    int    // and not acknowledged
	in      []byte
	closed  bool          // by either end
	changed chan struct{} // closed and replaced at every change
}

// stir lets who waits look again, with mu held.
func (c *lanConn) stir() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// push gives the uplink what may fly, with mu held.
func (c *lanConn) push() {
	for len(c.out) > 0 && c.flying < window {
		n := min(packet, len(c.out))
		c.host.queues(lanPacket{to: c.peer, b: slices.Clone(c.out[:n])})
		c.out = c.out[n:]
		c.flying += n
		c.stir()
	}
}

func (c *lanConn) deliver(p lanPacket) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in = append(c.in, p.b...)
	c.flying -= p.ack
	c.push()
	c.stir()
}

// unacked is what SIOCOUTQ tells.
func (c *lanConn) unacked() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flying + len(c.out)
}

func (c *lanConn) Read(b []byte) (int, error) {
	for {
		c.mu.Lock()
		n := copy(b, c.in)
		c.in = c.in[n:]
		c.read += n
		if c.read >= 2*packet || c.read > 0 && len(c.in) == 0 {
			c.host.queues(lanPacket{to: c.peer, ack: c.read})
			c.read = 0
		}
		closed, changed := c.closed, c.changed
		c.mu.Unlock()
		switch {
		case n > 0:
			return n, nil
		case closed:
			return 0, io.EOF
		}
		<-changed
	}
}

func (c *lanConn) Write(b []byte) (int, error) {
	for done := 0; ; {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return done, net.ErrClosed
		}
		n := max(0, min(len(b)-done, unsent-len(c.out)))
		c.out = append(c.out, b[done:done+n]...)
		c.push()
		done += n
		changed := c.changed
		c.mu.Unlock()
		if done == len(b) {
			return done, nil
		}
		<-changed
	}
}

func (c *lanConn) Close() error {
	for _, end := range []*lanConn{c, c.peer} {
		end.mu.Lock()
		end.closed = true
		end.stir()
		end.mu.Unlock()
	}
	return nil
}

func (c *lanConn) LocalAddr() net.Addr              { return c.at }
func (c *lanConn) RemoteAddr() net.Addr             { return c.peer.at }
func (c *lanConn) SetDeadline(time.Time) error      { return nil }
func (c *lanConn) SetReadDeadline(time.Time) error  { return nil }
func (c *lanConn) SetWriteDeadline(time.Time) error { return nil }
