// Package tracker tells the peers of a swarm about each other over HTTP
// (BEP 3, 7, 23 and 48). It keeps everything in memory: peers announce every
// few seconds, so after a restart it knows them again at once.
package tracker

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/anacrolix/torrent/bencode"

	"rookery/wire"
)

// Bounds of what strangers can make it keep and send.
const (
	maxPeers     = 20_000  // of one torrent
	maxMembers   = 100_000 // of all torrents
	maxOfAddress = 64      // peers of one torrent: a machine is one address
	maxServers   = 8       // of one torrent
	maxRecent    = 64      // newcomers of one torrent that are remembered as such
	maxHeld      = 1000    // answers that are held
	maxScrape    = 64      // torrents in one scrape
	maxQuery     = 8 << 10
)

const (
	// A peer that is not heard of for this long beyond its interval is gone:
	// several intervals, for nodes whose network or processor is slow.
	forget = 45 * time.Second

	// Who is to come back later than this gets its connection closed: one that is
	// open costs more memory than the peer itself.
	keepOpen = 7 // seconds
)

// A Tracker answers wire.PathAnnounce and wire.PathScrape.
type Tracker struct {
	// Rack names the rack a machine stands in, at once. Where it is nil or says "",
	// that is the subnet: the /24 of an IPv4 address, the /64 of an IPv6 address.
	Rack func(netip.Addr) string

	known func(infohash [20]byte) bool

	mu      sync.Mutex
	swarms  map[[20]byte]*group
	members int // of all swarms
	held    int // answers
	swept   time.Time
}

// New is a tracker for the torrents that known says yes to.
func New(known func(infohash [20]byte) bool) *Tracker {
	return &Tracker{known: known, swarms: map[[20]byte]*group{}}
}

// Incomplete is the number of peers that still fetch the torrent.
func (t *Tracker) Incomplete(infohash [20]byte) int {
	_, incomplete := t.count(infohash)
	return incomplete
}

func (t *Tracker) count(infohash [20]byte) (complete, incomplete int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweep(time.Now())
	s := t.swarms[infohash]
	if s == nil {
		return 0, 0
	}
	return s.complete, s.incomplete()
}

// sweep removes peers that are gone, and swarms of nobody, looking once a second.
func (t *Tracker) sweep(now time.Time) {
	if now.Sub(t.swept) < time.Second {
		return
	}
	t.swept = now
	members := 0
	for hash, s := range t.swarms {
		s.sweep(now, forget+time.Duration(s.interval(t.members))*time.Second)
		if members += len(s.peers); len(s.peers) == 0 {
			delete(t.swarms, hash)
		}
	}
	t.members = members
}

func (t *Tracker) rack(addr netip.Addr) string {
	if t.Rack != nil {
		if rack := t.Rack(addr); rack != "" {
			return rack
		}
	}
	bits := 24
	if addr.Is6() {
		bits = 64
	}
	subnet, _ := addr.Prefix(bits) // fails for no address
	return subnet.String()
}

func (t *Tracker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var answer any
	var err error
	switch r.URL.Path {
	case wire.PathAnnounce:
		answer, err = t.announce(r)
	case wire.PathScrape:
		answer, err = t.scrape(r.URL.RawQuery)
	default:
		http.NotFound(w, r)
		return
	}
	if err != nil { // BEP 3: said in the body of a 200
		answer = map[string]string{"failure reason": err.Error()}
	}
	b, err := bencode.Marshal(answer)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if a, ok := answer.(response); ok && a.Interval > keepOpen {
		w.Header().Set("Connection", "close")
	}
	w.Header().Set("Content-Type", "text/plain")
	w.Write(b) // a client that went away is no news
}

// An announcement is what one peer says of itself.
type announcement struct {
	infohash [20]byte
	id       [20]byte
	port     uint16
	left     int64
	want     int
	wait     int // seconds for which it likes to wait for news; no standard has this
	event    string
}

// response is in the order of its keys, as bencode wants it.
type response struct {
	Complete   int    `bencode:"complete"`
	Incomplete int    `bencode:"incomplete"`
	Interval   int    `bencode:"interval"`
	Min        int    `bencode:"min interval"`
	Peers      []byte `bencode:"peers"`
	Peers6     []byte `bencode:"peers6,omitempty"`
	Rack       string `bencode:"rack,omitempty"` // of the asker; no standard has this
	Wait       int    `bencode:"wait,omitempty"` // seconds for which the next answer would be held
}

func (t *Tracker) announce(r *http.Request) (response, error) {
	a, err := parse(r.URL.RawQuery)
	if err != nil {
		return response{}, err
	}
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return response{}, fmt.Errorf("address: %w", err)
	}
	if !t.known(a.infohash) {
		return response{}, fmt.Errorf("torrent %x is not served here", a.infohash)
	}
	from, local := remote.Addr().Unmap().WithZone(""), localAddr(r)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweep(time.Now())
	s := t.swarms[a.infohash]
	if s == nil {
		s = newGroup()
		t.swarms[a.infohash] = s
	}
	p, err := t.take(s, a, netip.AddrPortFrom(from, a.port), from == local)
	if err != nil {
		return response{}, err
	}
	var newcomers []*peer
	switch {
	case p == nil:
	case a.wait > 0 && a.event == "" && p.told > 0 && !p.waits && t.held < maxHeld:
		newcomers = t.hold(r.Context(), s, p, time.Duration(min(a.wait, s.interval(t.members)))*time.Second)
		if r.Context().Err() == nil {
			p.seen = time.Now()
		}
	default:
		newcomers = s.newcomers(p, rand.IntN)
	}
	answer := s.answer(p, newcomers, a.want, local)
	answer.Interval = s.interval(t.members)
	answer.Min = answer.Interval
	if t.held < maxHeld {
		answer.Wait = answer.Interval
	}
	return answer, nil
}

// take notes what a peer says of itself. It is nil when it says goodbye.
func (t *Tracker) take(s *group, a announcement, addr netip.AddrPort, here bool) (*peer, error) {
	before := len(s.peers)
	defer func() { t.members += len(s.peers) - before }()
	if a.event == "stopped" {
		if p := s.find(addr); p != nil {
			s.leave(p)
		}
		return nil, nil
	}
	if t.members >= maxMembers && s.find(addr) == nil {
		return nil, fmt.Errorf("%d peers of all torrents are enough", t.members)
	}
	p, err := s.join(addr, t.rack)
	if err != nil {
		return nil, err
	}
	p.here, p.seen = here, time.Now()
	s.heard(p, bytes.HasPrefix(a.id[:], []byte("-RKS")), a.left == 0, len(s.peers) > before || a.event == "started")
	return p, nil
}

// hold waits until there is news for p, at most for d, or until ctx ends. It
// gives the lock away meanwhile.
func (t *Tracker) hold(ctx context.Context, s *group, p *peer, d time.Duration) (newcomers []*peer) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	p.waits = true
	t.held++
	defer func() {
		p.waits = false
		t.held--
	}()
	for ctx.Err() == nil && p.index >= 0 {
		if p.told == s.joins && !s.settled(p) {
			await(ctx, &t.mu, s.changed())
			continue
		}
		timer := time.NewTimer(gathers(t.held))
		await(ctx, &t.mu, timer.C)
		timer.Stop()
		if newcomers = s.newcomers(p, rand.IntN); len(newcomers) > 0 || s.settled(p) {
			break
		}
	}
	return newcomers
}

// await gives mu away until there is something in c or ctx ends.
func await[T any](ctx context.Context, mu *sync.Mutex, c <-chan T) {
	mu.Unlock()
	defer mu.Lock()
	select {
	case <-ctx.Done():
	case <-c:
	}
}

// localAddr is the server's address as the client sees it, if it is known.
func localAddr(r *http.Request) netip.Addr {
	if addr, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		return addr.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// parse reads the query of an announce. The peer's address is that of its
// connection: nobody can announce somebody else.
func parse(query string) (a announcement, err error) {
	a.want = maxAnswer
	var hash, id, port, left string
	err = eachField(query, func(key, value string) {
		switch key {
		case "info_hash":
			hash = value
		case "peer_id":
			id = value
		case "port":
			port = value
		case "left":
			left = value
		case "event":
			a.event = value
		case "numwant":
			if n, err := strconv.Atoi(value); err == nil && n >= 0 {
				a.want = min(n, maxAnswer)
			}
		case "wait":
			if n, err := strconv.Atoi(value); err == nil {
				a.wait = min(max(n, 0), 60)
			}
		}
	})
	if err != nil {
		return a, err
	}
	if len(hash) != 20 || len(id) != 20 {
		return a, fmt.Errorf("info_hash has %d bytes and peer_id %d, want 20 each", len(hash), len(id))
	}
	copy(a.infohash[:], hash)
	copy(a.id[:], id)
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return a, fmt.Errorf("port %.20q", port)
	}
	a.port = uint16(n)
	if a.left, err = strconv.ParseInt(left, 10, 64); err != nil || a.left < 0 {
		return a, fmt.Errorf("left %.20q", left)
	}
	return a, nil
}

// eachField reads a query without keeping it: it may have thousands of fields.
func eachField(query string, field func(key, value string)) error {
	if len(query) > maxQuery {
		return fmt.Errorf("query has %d bytes, want at most %d", len(query), maxQuery)
	}
	for pair := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		value, err := url.QueryUnescape(value)
		if err != nil {
			return fmt.Errorf("%.20s: %w", key, err)
		}
		field(key, value)
	}
	return nil
}

// scrape counts the peers of the torrents asked for.
func (t *Tracker) scrape(query string) (any, error) {
	var hashes []string
	err := eachField(query, func(key, value string) {
		if key == "info_hash" {
			hashes = append(hashes, value)
		}
	})
	if err != nil {
		return nil, err
	}
	if len(hashes) > maxScrape {
		return nil, fmt.Errorf("%d torrents, want at most %d", len(hashes), maxScrape)
	}
	type count struct {
		Complete   int `bencode:"complete"`
		Downloaded int `bencode:"downloaded"`
		Incomplete int `bencode:"incomplete"`
	}
	files := map[string]count{}
	for _, hash := range hashes {
		if len(hash) != 20 {
			return nil, fmt.Errorf("info_hash has %d bytes, want 20", len(hash))
		}
		infohash := [20]byte([]byte(hash))
		if t.known(infohash) {
			complete, incomplete := t.count(infohash)
			files[hash] = count{Complete: complete, Incomplete: incomplete}
		}
	}
	return map[string]any{"files": files}, nil
}
