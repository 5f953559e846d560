package swarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rookery/transport"
	"rookery/transport/transporttest"
)

// A lan is a switch with a machine at each port, in virtual time: all that is
// said is carried in packets which wait for the sender's uplink and then for
// the receiver's downlink.
type lan struct {
	mu    sync.Mutex
	hosts map[netip.Addr]*lanHost
	wg    sync.WaitGroup
}

const (
	packet   = 8948 // bytes of payload
	overhead = 66   // bytes of headers

	propagate = 50 * time.Microsecond
)

type lanHost struct {
	lan  *lan
	addr netip.Addr
	up   float64 // bytes a second
	down float64

	mu      sync.Mutex
	sending []*lanConn // with something to send and room at the other end
	stirred chan struct{}
	inbox   chan lanPacket
	ln      *lanListener
	sent    int64
	recv    int64
}

type lanPacket struct {
	to *lanConn
	b  []byte
}

func newLAN() *lan { return &lan{hosts: map[netip.Addr]*lanHost{}} }

func (l *lan) host(ctx context.Context, n int, up, down float64) *lanHost {
	h := &lanHost{lan: l, addr: netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), up: up, down: down,
		stirred: make(chan struct{}, 1), inbox: make(chan lanPacket, 1<<16)}
	h.ln = &lanListener{host: h, accept: make(chan net.Conn, 1024), closed: make(chan struct{})}
	l.mu.Lock()
	l.hosts[h.addr] = h
	l.mu.Unlock()
	l.wg.Go(func() { h.uplink(ctx) })
	l.wg.Go(func() { h.downlink(ctx) })
	return h
}

// uplink sends a packet of each connection in turn.
func (h *lanHost) uplink(ctx context.Context) {
	free := time.Now()
	for {
		h.mu.Lock()
		var c *lanConn
		if len(h.sending) > 0 {
			c = h.sending[0]
			h.sending = h.sending[1:]
		}
		h.mu.Unlock()
		if c == nil {
			select {
			case <-h.stirred:
				continue
			case <-ctx.Done():
				return
			}
		}
		b := c.take()
		if b == nil {
			continue
		}
		if now := time.Now(); free.Before(now) {
			free = now
		}
		free = free.Add(time.Duration(float64(len(b)+overhead) / h.up * 1e9))
		h.sent += int64(len(b) + overhead)
		time.Sleep(time.Until(free))
		c.peer.host.inbox <- lanPacket{c.peer, b}
	}
}

func (h *lanHost) downlink(ctx context.Context) {
	free := time.Now()
	for {
		select {
		case p := <-h.inbox:
			if now := time.Now(); free.Before(now) {
				free = now
			}
			free = free.Add(time.Duration(float64(len(p.b)+overhead) / h.down * 1e9))
			h.recv += int64(len(p.b) + overhead)
			time.Sleep(time.Until(free))
			p.to.deliver(p.b)
		case <-ctx.Done():
			return
		}
	}
}

// A lanConn is one end of a connection.
type lanConn struct {
	host *lanHost
	peer *lanConn
	at   net.Addr

	mu       sync.Mutex
	out      []byte // written and not sent
	flying   int    // sent and not read by the peer
	queued   bool
	in       []byte
	eof      bool
	closed   bool
	changed  chan struct{}
	deadline time.Time
}

func (c *lanConn) stir() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// offer puts the connection into the queue of its uplink; c.mu is held.
func (c *lanConn) offer() {
	if c.queued || len(c.out) == 0 || c.flying >= window {
		return
	}
	c.queued = true
	h := c.host
	h.mu.Lock()
	h.sending = append(h.sending, c)
	h.mu.Unlock()
	select {
	case h.stirred <- struct{}{}:
	default:
	}
}

func (c *lanConn) take() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queued = false
	n := min(packet, len(c.out))
	if n == 0 {
		return nil
	}
	b := slices.Clone(c.out[:n])
	c.out = c.out[n:]
	c.flying += n
	c.stir()
	c.offer()
	return b
}

func (c *lanConn) deliver(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in = append(c.in, b...)
	c.stir()
}

func (c *lanConn) Read(b []byte) (int, error) {
	for {
		c.mu.Lock()
		if len(c.in) > 0 {
			n := copy(b, c.in)
			c.in = c.in[n:]
			c.mu.Unlock()
			p := c.peer
			p.mu.Lock()
			p.flying -= n
			p.offer()
			p.mu.Unlock()
			return n, nil
		}
		if c.closed || c.eof {
			c.mu.Unlock()
			return 0, io.EOF
		}
		changed := c.changed
		c.mu.Unlock()
		<-changed
	}
}

func (c *lanConn) Write(b []byte) (int, error) {
	for done := 0; ; {
		c.mu.Lock()
		if c.closed || c.eof {
			c.mu.Unlock()
			return done, net.ErrClosed
		}
		n := min(len(b)-done, sndbuf-len(c.out))
		c.out = append(c.out, b[done:done+n]...)
		c.offer()
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
	c.mu.Lock()
	c.closed = true
	c.stir()
	c.mu.Unlock()
	c.peer.mu.Lock()
	c.peer.eof = true
	c.peer.stir()
	c.peer.mu.Unlock()
	return nil
}

func (c *lanConn) LocalAddr() net.Addr              { return c.at }
func (c *lanConn) RemoteAddr() net.Addr             { return c.peer.at }
func (c *lanConn) SetDeadline(time.Time) error      { return nil }
func (c *lanConn) SetReadDeadline(time.Time) error  { return nil }
func (c *lanConn) SetWriteDeadline(time.Time) error { return nil }

type lanListener struct {
	host   *lanHost
	accept chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *lanListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *lanListener) Close() error { l.once.Do(func() { close(l.closed) }); return nil }
func (l *lanListener) Addr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(l.host.addr, 6881))
}

func (h *lanHost) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	to := netip.MustParseAddrPort(addr)
	h.lan.mu.Lock()
	other := h.lan.hosts[to.Addr()]
	h.lan.mu.Unlock()
	if other == nil {
		return nil, errors.New("no route")
	}
	time.Sleep(2 * propagate)
	port := uint16(1024 + rand.IntN(60000))
	a := &lanConn{host: h, at: net.TCPAddrFromAddrPort(netip.AddrPortFrom(h.addr, port)), changed: make(chan struct{})}
	b := &lanConn{host: other, at: other.ln.Addr(), peer: a, changed: make(chan struct{})}
	a.peer = b
	select {
	case other.ln.accept <- b:
		return a, nil
	case <-other.ln.closed:
		return nil, errors.New("connection refused")
	}
}

func intEnv(name string, def int) int {
	if v, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return v
	}
	return def
}

func TestVirtual(t *testing.T) {
	for _, field := range strings.Fields(os.Getenv("VN")) {
		n, _ := strconv.Atoi(field)
		synctest.Test(t, func(t *testing.T) { virtual(t, n) })
	}
}

func virtual(t *testing.T, nodes int) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	size := intEnv("VSIZE", 16) << 20
	rate := float64(intEnv("VRATE", 5)) * 1e6 / 8
	content, info := transporttest.Layer(t, 1, size)
	if p := intEnv("VPIECE", 0); p > 0 {
		info = rehash(info, content, p<<10)
	}
	l := newLAN()
	var ran sync.WaitGroup
	peer := func(n int, up, down float64) (*lanHost, *Peer) {
		h := l.host(ctx, n, up, down)
		p := NewPeer(h.ln, slog.New(slog.DiscardHandler))
		p.dial = h.dial
		ran.Go(func() { p.Run(ctx) })
		return h, p
	}
	sh, server := peer(1, rate, rate)
	seed := transporttest.Seed(info, content)
	server.Add(seed, Options{Seeder: true})
	at := func(n int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 6881)
	}
	start := time.Now()
	ideal := float64(size) / rate
	done := make([]float64, nodes)
	pieces := make([]*transport.Pieces, nodes)
	hosts := make([]*lanHost, nodes)
	tors := make([]*Torrent, nodes)
	var fetched sync.WaitGroup
	for i := range nodes {
		down := rate
		if i == 0 && os.Getenv("VSLOW") != "" {
			down = rate / 5
		}
		h, p := peer(2+i, down, down)
		hosts[i] = h
		pieces[i] = transport.NewPieces(info, transporttest.NewMemory(nil))
		fetched.Go(func() {
			time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond)
			tor := p.Add(pieces[i], Options{})
			tors[i] = tor
			known := []netip.AddrPort{at(1)}
			for _, j := range rand.Perm(i) {
				known = append(known, at(2+j))
			}
			tor.learn(known)
			<-pieces[i].Done()
			done[i] = time.Since(start).Seconds() / ideal
		})
	}
	if os.Getenv("VCURVE") != "" {
		go func() {
			last := make([]int64, nodes+1)
			for ctx.Err() == nil {
				time.Sleep(time.Duration(ideal / 40 * 1e9))
				line := fmt.Sprintf("%.3f seed %.2f up", time.Since(start).Seconds()/ideal, float64(sh.sent-last[nodes])/rate/(ideal/40))
				last[nodes] = sh.sent
				total := 0.0
				var low []float64
				for i, h := range hosts {
					u := float64(h.sent-last[i]) / rate / (ideal / 40)
					last[i] = h.sent
					total += u
					low = append(low, u)
				}
				var lines []string
				for i, tor := range tors {
					if tor == nil {
						continue
					}
					tor.mu.Lock()
					open, queue := 0, int64(0)
					for c := range tor.conns {
						open += len(c.open)
						c.mu.Lock()
						queue += c.queued
						c.mu.Unlock()
					}
					lines = append(lines, fmt.Sprintf("up %.2f conns %d open %d queue %d have %d inbox %d", low[i], len(tor.conns), open, queue, tor.seen, len(hosts[i].inbox)))
					tor.mu.Unlock()
				}
				slices.Sort(lines)
				if os.Getenv("VCURVE") == "2" && len(lines) > 10 {
					for _, i := range []int{0, 1, 2, 3, 10, 20, 30, 40, 48, 49} {
						if i < len(lines) {
							fmt.Println("   ", lines[i])
						}
					}
				}
				slices.Sort(low)
				fmt.Printf("%s mean %.3f min %.2f med %.2f max %.2f\n", line, total/float64(nodes), low[0], low[nodes/2], low[nodes-1])
			}
		}()
	}
	fetched.Wait()
	slices.Sort(done)
	_, _, _, sent := seed.Transfer()
	var up int64
	for _, h := range hosts {
		up += h.sent
	}
	fmt.Printf("n=%d pieces %d of %d KiB: first %.3f median %.3f last %.3f; seed payload %.3f bytes %.3f; peers up %.3f\n", nodes, len(info.Hashes), info.PieceLength>>10,
		done[0], done[nodes/2], done[nodes-1], float64(sent)/float64(size), float64(sh.sent)/float64(size), float64(up)/float64(nodes)/float64(size))
	cancel()
	ran.Wait()
	l.wg.Wait()
}

var (
	sndbuf = intEnv("SNDBUF", 16) << 10
	window = intEnv("WINDOW", 256) << 10
)
