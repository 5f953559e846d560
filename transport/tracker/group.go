package tracker

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
	"unique"
)

// A peer is where and how far a member of a swarm is.
type peer struct {
	addr     netip.AddrPort
	rack     unique.Handle[string] // compared often
	seen     time.Time
	index    int    // in the swarm's peers; -1 when it has left
	joined   uint64 // the swarm's joins when it came
	told     uint64 // the swarm's joins when it was last answered
	here     bool   // on this very machine
	complete bool
	lingers  bool // it was told last that somebody else is incomplete
	waits    bool // an answer to it is held
}

// A group is the peers of one torrent.
type group struct {
	peers    []*peer                           // in no order, to draw lots
	racks    map[unique.Handle[string]][]*peer // the same
	at       map[netip.Addr][]*peer            // the same
	servers  []*peer                           // Rookery servers, by their peer ids
	complete int
	joins    uint64        // that there have been
	recent   []*peer       // who joined last, in that order; some may have left
	stirred  chan struct{} // closed when somebody joins or all are complete; nil when nobody looks
}

func newGroup() *group {
	return &group{racks: map[unique.Handle[string]][]*peer{}, at: map[netip.Addr][]*peer{}}
}

func (s *group) incomplete() int { return len(s.peers) - s.complete }

func (s *group) find(addr netip.AddrPort) *peer {
	for _, p := range s.at[addr.Addr()] {
		if p.addr.Port() == addr.Port() {
			return p
		}
	}
	return nil
}

// join is the peer at addr, which is a member from now on.
func (s *group) join(addr netip.AddrPort, rack func(netip.Addr) string) (*peer, error) {
	if p := s.find(addr); p != nil {
		return p, nil
	}
	ip := addr.Addr()
	if n := len(s.at[ip]); n >= maxOfAddress {
		return nil, fmt.Errorf("%d peers of %s are enough", n, ip)
	}
	if n := len(s.peers); n >= maxPeers {
		return nil, fmt.Errorf("%d peers are enough", n)
	}
	p := &peer{addr: addr, rack: unique.Make(rack(ip)), index: len(s.peers)}
	s.peers = append(s.peers, p)
	s.racks[p.rack] = append(s.racks[p.rack], p)
	s.at[ip] = append(s.at[ip], p)
	return p, nil
}

// came notes that p is new, or begins anew.
func (s *group) came(p *peer) {
	s.joins++
	p.joined, p.told = s.joins, 0
	s.recent = slices.DeleteFunc(s.recent, func(q *peer) bool { return q == p || q.index < 0 })
	s.recent = append(s.recent[max(0, len(s.recent)+1-maxRecent):], p)
	s.stir()
}

// is sets how far p is.
func (s *group) is(p *peer, complete bool) {
	s.complete += btoi(complete) - btoi(p.complete)
	if complete && !p.complete && s.incomplete() == 0 {
		s.stir()
	}
	p.complete = complete
}

// heard notes what p says of itself.
func (s *group) heard(p *peer, server, complete, started bool) {
	if server && len(s.servers) < maxServers && !slices.Contains(s.servers, p) {
		s.servers = append(s.servers, p)
	}
	s.is(p, complete)
	if started {
		s.came(p)
	}
}

// interval is for how many seconds a peer of one of the swarms, which have so many
// members, need not come again. It is short, so that a server or tracker that comes
// back is found again, and grows with the swarms to bound the load.
func (s *group) interval(members int) int {
	seconds := 10
	if s.incomplete() > 0 {
		seconds = 5
	}
	return min(60, seconds+members/400)
}

// gathers is for how long all who join are told together to each of so many who
// wait: a crowd that comes and comes is answered a thousand times a second at the
// most.
func gathers(held int) time.Duration {
	return 100*time.Millisecond + time.Duration(held)*time.Millisecond
}

// leave takes p out; the last one gets its place.
func (s *group) leave(p *peer) {
	last := len(s.peers) - 1
	s.peers[p.index] = s.peers[last]
	s.peers[p.index].index = p.index
	s.peers[last] = nil
	s.peers = s.peers[:last]
	p.index = -1
	cut(s.racks, p.rack, p)
	cut(s.at, p.addr.Addr(), p)
	if i := slices.Index(s.servers, p); i >= 0 {
		s.servers = slices.Delete(s.servers, i, i+1)
	}
	s.complete -= btoi(p.complete)
	if !p.complete && s.incomplete() == 0 {
		s.stir()
	}
}

// cut takes a peer out of one list of m.
func cut[K comparable](m map[K][]*peer, key K, p *peer) {
	list := m[key]
	i, last := slices.Index(list, p), len(list)-1
	list[i], list[last] = list[last], nil
	if m[key] = list[:last]; last == 0 {
		delete(m, key)
	}
}

// stir wakes those who wait for news.
func (s *group) stir() {
	if s.stirred != nil {
		close(s.stirred)
		s.stirred = nil
	}
}

// changed is closed at the next news.
func (s *group) changed() <-chan struct{} {
	if s.stirred == nil {
		s.stirred = make(chan struct{})
	}
	return s.stirred
}

// settled says whether p lingers for nobody any more, and does not know it.
func (s *group) settled(p *peer) bool { return p.lingers && s.incomplete() == 0 }

// newcomers are those who came since p was last answered, as far as it should
// hear of them; from now on it is taken to have. In a swarm larger than one answer they are drawn by lot: each
// newcomer is told to about as many as there are places in one, or all would
// connect to it.
func (s *group) newcomers(p *peer, lot func(n int) int) (out []*peer) {
	for _, q := range s.recent {
		if p.told == 0 || q.joined <= p.told || q.index < 0 || q == p || q.complete && p.complete {
			continue
		}
		if lot(len(s.peers)) < maxAnswer || slices.Contains(s.servers, q) {
			out = append(out, q)
		}
	}
	p.told = s.joins
	return out
}

// sweep removes who was not heard of for long.
func (s *group) sweep(now time.Time, long time.Duration) {
	for i := len(s.peers) - 1; i >= 0; i-- {
		if p := s.peers[i]; now.Sub(p.seen) > long {
			s.leave(p)
		}
	}
}

// names are the peers that p is told of.
func (s *group) names(p *peer, newcomers []*peer, want int, lot func(n int) int) []*peer {
	return choose(p, s.peers, s.racks[p.rack], s.servers, newcomers, want, lot)
}

// answer names peers to p, which reaches this machine at local. A p that has
// left is named nobody.
func (s *group) answer(p *peer, newcomers []*peer, want int, local netip.Addr) response {
	out := response{Complete: s.complete, Incomplete: s.incomplete()}
	if p == nil || p.index < 0 {
		return out
	}
	out.Rack = p.rack.Value()
	p.lingers = s.incomplete() > btoi(!p.complete)
	for _, q := range s.names(p, newcomers, want, rand.IntN) {
		ip := q.addr.Addr()
		if q.here && local.IsValid() {
			ip = local // the address under which the asker reaches this machine
		}
		to := &out.Peers
		if !ip.Is4() {
			to = &out.Peers6
		}
		*to = append(*to, ip.AsSlice()...)
		*to = append(*to, byte(q.addr.Port()>>8), byte(q.addr.Port()))
	}
	return out
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
