// Package swarm is Rookery's BitTorrent peer: one engine that seeds and
// fetches any number of layers over one listener. It speaks BEP 3, 6, 10 and
// 23, so stock clients can take part, passes torrent files on by HTTP, and looks for nobody but whom the
// trackers name.
package swarm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"rookery/transport"
	"rookery/transport/swarm/rules"
)

// Prefixes of the peer ids. What comes from a server counts as from the server.
const (
	serverPrefix = "-RKS1-"
	nodePrefix   = "-RKP1-"
)

// Bounds. The nodes may be virtual machines without hardware support, so every
// time is generous.
const (
	maxHandshakes = 256 // connections that have not said what they want
	maxOfAddress  = 16  // of these
	shake         = 30 * time.Second
	dialFor       = 15 * time.Second
	silence       = 4 * time.Minute // without a message: the connection is dead
	keepAlive     = time.Minute
	writeFor      = 2 * time.Minute
	banFor        = 10 * time.Minute
	castBatch     = 5 * time.Second // new pieces are told together, while all get the same at the same time, and need not hear of them: who does asks for them, on links that have no room
)

// A Peer takes part in the swarms of the torrents added to it.
type Peer struct {
	ln   net.Listener
	log  *slog.Logger
	port uint16
	dial func(ctx context.Context, network, addr string) (net.Conn, error)
	http *http.Client

	upload, download *transport.Limiter
	turns            chan struct{} // held by who sends a block

	buffers atomic.Int64 // bytes, of all torrents
	vain    atomic.Int32 // torrent files given to who did not come, since the last who did

	mu        sync.Mutex
	ctx       context.Context // of Run, nil before
	ended     bool
	torrents  map[[20]byte]*Torrent
	banned    map[netip.Addr]time.Time // until
	greeting  map[netip.Addr]int       // connections that have not said what they want
	greetings int                      // of all addresses
	wg        sync.WaitGroup
}

// Options say how a torrent is served.
type Options struct {
	Seeder   bool     // this is a Rookery server
	Trackers []string // announce URLs, besides those in the torrent
}

// NewPeer is a peer that others reach at ln. Where ln has an address of its
// own, connections are made from that address, too.
func NewPeer(ln net.Listener, log *slog.Logger) *Peer {
	p := &Peer{ln: ln, log: log, turns: make(chan struct{}, rules.MaxTurns), torrents: map[[20]byte]*Torrent{}, banned: map[netip.Addr]time.Time{}, greeting: map[netip.Addr]int{}}
	dialer := net.Dialer{}
	dialer.KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 6}
	if addr, ok := ln.Addr().(*net.TCPAddr); ok {
		p.port = uint16(addr.Port)
		if !addr.IP.IsUnspecified() {
			dialer.LocalAddr = &net.TCPAddr{IP: addr.IP}
		}
	}
	p.dial = dialer.DialContext
	p.http = trackerClient(p.dial)
	return p
}

// Limit bounds what is sent and received in all swarms together. It is called
// before Run.
func (p *Peer) Limit(upload, download *transport.Limiter) {
	p.upload, p.download = upload, download
}

// Run takes part until ctx ends, then closes the listener, says goodbye to the
// trackers and returns nil. It fails only when the listener does.
func (p *Peer) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p.mu.Lock()
	p.ctx = ctx
	for _, t := range p.torrents {
		p.goLocked(func() { t.run(ctx) })
	}
	p.mu.Unlock()

	stop := context.AfterFunc(ctx, func() { p.ln.Close() })
	defer stop()
	err := p.accept(ctx)
	cancel()
	p.ln.Close()

	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	p.wg.Wait()
	p.http.CloseIdleConnections()
	return err
}

func (p *Peer) accept(ctx context.Context) error {
	for {
		nc, err := p.ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				nc.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("swarm: %s: %w", p.ln.Addr(), err)
		case err != nil: // out of file descriptors: it passes
			p.log.Warn("swarm: accept", "err", err)
			sleep(ctx, time.Second)
			continue
		}
		addr := remote(nc).Addr()
		if !p.admit(addr) {
			nc.Close()
			continue
		}
		p.goRun(func() {
			c, err := p.greet(ctx, nc)
			p.greeted(addr)
			if err != nil {
				p.log.Debug("swarm: refused", "client", nc.RemoteAddr(), "err", err)
			}
			if c == nil {
				nc.Close()
				return
			}
			c.t.serve(ctx, c)
		})
	}
}

// admit says whether one more connection of an address may take its time to say
// what it wants. No address has all places: silence costs nothing.
func (p *Peer) admit(addr netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.greetings >= maxHandshakes || p.greeting[addr] >= maxOfAddress {
		return false
	}
	p.greetings++
	p.greeting[addr]++
	return true
}

func (p *Peer) greeted(addr netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.greetings--
	if p.greeting[addr]--; p.greeting[addr] == 0 {
		delete(p.greeting, addr)
	}
}

// goRun starts f, which Run waits for, unless Run has ended.
func (p *Peer) goRun(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.goLocked(f)
}

func (p *Peer) goLocked(f func()) {
	if !p.ended {
		p.wg.Go(f)
	}
}

// Add takes part in the swarm of a layer, from now on or from Run on. A layer
// that is there already stays as it is, and its Torrent is returned.
func (p *Peer) Add(pieces *transport.Pieces, o Options) *Torrent {
	p.mu.Lock()
	defer p.mu.Unlock()
	hash := pieces.Info().InfoHash
	if t := p.torrents[hash]; t != nil {
		return t
	}
	t := newTorrent(p, pieces, o)
	p.torrents[hash] = t
	if p.ctx != nil {
		p.goLocked(func() { t.run(p.ctx) })
	}
	return t
}

// Remove leaves the swarm of a layer and closes its connections.
func (p *Peer) Remove(infohash [20]byte) {
	p.mu.Lock()
	t := p.torrents[infohash]
	delete(p.torrents, infohash)
	p.mu.Unlock()
	if t != nil {
		t.leave()
	}
}

// Torrents are the swarms this peer takes part in.
func (p *Peer) Torrents() []*Torrent {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*Torrent
	for _, t := range p.torrents {
		out = append(out, t)
	}
	return out
}

func (p *Peer) torrent(infohash [20]byte) *Torrent {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.torrents[infohash]
}

// ban refuses an address for a while. On a LAN an address is a machine.
func (p *Peer) ban(addr netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.banned) > 10_000 {
		clear(p.banned) // whoever has so many addresses is not stopped by this
	}
	p.banned[addr] = time.Now().Add(banFor)
}

func (p *Peer) isBanned(addr netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	until, ok := p.banned[addr]
	if ok && time.Now().After(until) {
		delete(p.banned, addr)
		return false
	}
	return ok
}

// A source lets a Peer fetch.
type source struct {
	peer *Peer
	o    Options
}

// Source fetches with p. The swarm is not left when its Fetch ends: the peer
// serves what it has, and goes on fetching beside another source.
func Source(p *Peer, o Options) transport.Source { return &source{p, o} }

func (s *source) String() string { return "swarm" }

func (s *source) Fetch(ctx context.Context, pieces *transport.Pieces) error {
	t := s.peer.Add(pieces, s.o)
	if t.pieces != pieces {
		return fmt.Errorf("%s is being fetched to another place", pieces.Info().Layer)
	}
	select {
	case <-pieces.Done():
		return nil
	case <-t.failed:
		return t.failure
	case <-ctx.Done():
		return ctx.Err()
	}
}

// newID is random after its prefix, so that a restart is another peer.
func newID(seeder bool) (id [20]byte) {
	rand.Read(id[:])
	prefix := nodePrefix
	if seeder {
		prefix = serverPrefix
	}
	copy(id[:], prefix)
	return id
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
