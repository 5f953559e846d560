// Package tracker tells the peers of a swarm about each other over HTTP
// (BEP 3, 7, 23 and 48). It keeps everything in memory: peers announce every
// few seconds, so after a restart it knows them again at once.
package tracker

import (
	"errors"
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
	maxPeers   = 20_000 // of one torrent
	maxServers = 8      // of these, told to everybody
	maxAnswer  = 50     // peers in one answer
	maxScrape  = 64     // torrents in one scrape
)

// A peer that is not heard of for this long is gone: several intervals, for
// nodes whose network or processor is slow.
const forget = 45 * time.Second

// A Tracker answers wire.PathAnnounce and wire.PathScrape.
type Tracker struct {
	known func(infohash [20]byte) bool

	mu     sync.Mutex
	swarms map[[20]byte]*group
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
	s := t.swarms[infohash]
	if s == nil {
		return 0, 0
	}
	s.sweep(time.Now())
	return s.complete, len(s.peers) - s.complete
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
	stopped  bool
}

// response is in the order of its keys, as bencode wants it.
type response struct {
	Complete   int    `bencode:"complete"`
	Incomplete int    `bencode:"incomplete"`
	Interval   int    `bencode:"interval"`
	Min        int    `bencode:"min interval"`
	Peers      string `bencode:"peers"`
	Peers6     string `bencode:"peers6,omitempty"`
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
	from, local := remote.Addr().Unmap(), localAddr(r)
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.swarms[a.infohash]
	if s == nil {
		s = &group{at: map[netip.AddrPort]int{}, servers: map[netip.AddrPort]bool{}}
		t.swarms[a.infohash] = s
	}
	return s.announce(a, from, local, time.Now())
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
	values, err := parseQuery(query)
	if err != nil {
		return a, err
	}
	for _, id := range []struct {
		key string
		to  *[20]byte
	}{{"info_hash", &a.infohash}, {"peer_id", &a.id}} {
		v := values.Get(id.key)
		if len(v) != 20 {
			return a, fmt.Errorf("%s has %d bytes, want 20", id.key, len(v))
		}
		copy(id.to[:], v)
	}
	port, err := strconv.ParseUint(values.Get("port"), 10, 16)
	if err != nil || port == 0 {
		return a, fmt.Errorf("port %.20q", values.Get("port"))
	}
	a.port = uint16(port)
	if a.left, err = strconv.ParseInt(values.Get("left"), 10, 64); err != nil || a.left < 0 {
		return a, fmt.Errorf("left %.20q", values.Get("left"))
	}
	a.want = maxAnswer
	if n, err := strconv.Atoi(values.Get("numwant")); err == nil && n >= 0 {
		a.want = min(n, maxAnswer)
	}
	a.stopped = values.Get("event") == "stopped"
	return a, nil
}

// scrape counts the peers of the torrents asked for.
func (t *Tracker) scrape(query string) (any, error) {
	values, err := parseQuery(query)
	if err != nil {
		return nil, err
	}
	hashes := values["info_hash"]
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

func parseQuery(query string) (url.Values, error) {
	if len(query) > 8<<10 {
		return nil, errors.New("query too long")
	}
	return url.ParseQuery(query)
}

// A peer is where and how far a member of a swarm is.
type peer struct {
	addr     netip.AddrPort
	here     bool // on this very machine
	complete bool
	seen     time.Time
}

// A group is the peers of one torrent. They are in a slice, to draw lots.
type group struct {
	peers    []peer
	at       map[netip.AddrPort]int  // index in peers
	servers  map[netip.AddrPort]bool // Rookery servers, by their peer ids
	complete int
	swept    time.Time
}

func (s *group) announce(a announcement, from, local netip.Addr, now time.Time) (response, error) {
	s.sweep(now)
	self := netip.AddrPortFrom(from, a.port)
	i, old := s.at[self]
	switch {
	case a.stopped && old:
		s.remove(i)
	case a.stopped:
	case !old && len(s.peers) >= maxPeers:
		return response{}, fmt.Errorf("%d peers are enough", maxPeers)
	default:
		if !old {
			i = len(s.peers)
			s.at[self] = i
			s.peers = append(s.peers, peer{})
		}
		s.complete += btoi(a.left == 0) - btoi(s.peers[i].complete)
		s.peers[i] = peer{
			addr:     self,
			here:     from == local,
			complete: a.left == 0,
			seen:     now,
		}
		if strings.HasPrefix(string(a.id[:]), "-RKS") && len(s.servers) < maxServers {
			s.servers[self] = true
		}
	}
	answer := response{Complete: s.complete, Incomplete: len(s.peers) - s.complete, Interval: s.interval()}
	answer.Min = answer.Interval
	for _, p := range s.draw(self, a.want, a.left == 0) {
		addr := p.addr.Addr()
		if p.here && local.IsValid() {
			addr = local // the address under which the asker reaches this machine
		}
		b, _ := netip.AddrPortFrom(addr, p.addr.Port()).MarshalBinary() // never fails
		b[len(b)-1], b[len(b)-2] = b[len(b)-2], b[len(b)-1]             // it writes the port little-endian
		if addr.Is4() {
			answer.Peers += string(b)
		} else {
			answer.Peers6 += string(b)
		}
	}
	return answer, nil
}

// draw chooses up to want peers for the one at self: servers first, then by
// lot, so that the swarm has no islands. Who is complete needs no one who is.
func (s *group) draw(self netip.AddrPort, want int, complete bool) []peer {
	me, member := s.at[self]
	if !member {
		return nil // it has just said goodbye
	}
	var out []peer
	drawn := map[int]bool{me: true}
	take := func(i int) {
		if len(out) < want && !drawn[i] && !(complete && s.peers[i].complete) {
			out = append(out, s.peers[i])
		}
		drawn[i] = true
	}
	for addr := range s.servers {
		take(s.at[addr])
	}
	if len(s.peers) <= 4*maxAnswer {
		for _, i := range rand.Perm(len(s.peers)) {
			take(i)
		}
		return out
	}
	for range 4 * maxAnswer {
		take(rand.IntN(len(s.peers)))
	}
	return out
}

// interval is short, so that a server or tracker that comes back is found
// again, and grows with the swarm to bound the load.
func (s *group) interval() int {
	seconds := 10
	if len(s.peers) > s.complete {
		seconds = 5
	}
	return seconds + len(s.peers)/400
}

// sweep removes who was not heard of for long, looking once a second.
func (s *group) sweep(now time.Time) {
	if now.Sub(s.swept) < time.Second {
		return
	}
	s.swept = now
	for i := len(s.peers) - 1; i >= 0; i-- {
		if now.Sub(s.peers[i].seen) > forget+time.Duration(s.interval())*time.Second {
			s.remove(i)
		}
	}
}

// remove takes peer i out; the last one gets its place.
func (s *group) remove(i int) {
	s.complete -= btoi(s.peers[i].complete)
	delete(s.at, s.peers[i].addr)
	delete(s.servers, s.peers[i].addr)
	last := len(s.peers) - 1
	if i != last {
		s.peers[i] = s.peers[last]
		s.at[s.peers[i].addr] = i
	}
	s.peers = s.peers[:last]
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
