package tracker

import (
	"math/rand/v2"
	"net/netip"
	"time"
)

// A Swarm is what a Tracker knows and decides of one torrent, for who has no
// sockets and a clock of its own.
type Swarm struct{ group *group }

// A Member is a peer that has announced itself.
type Member struct{ peer *peer }

// NewSwarm is one of nobody.
func NewSwarm() *Swarm { return &Swarm{newGroup()} }

// Announce takes note of what the peer at addr says of itself. The error says why
// there is no room for it.
func (s *Swarm) Announce(addr netip.AddrPort, rack string, server, complete, started bool) (Member, error) {
	before := len(s.group.peers)
	p, err := s.group.join(addr, func(netip.Addr) string { return rack })
	if err != nil {
		return Member{}, err
	}
	s.group.heard(p, server, complete, started || len(s.group.peers) > before)
	return Member{p}, nil
}

// Leave forgets a member.
func (s *Swarm) Leave(m Member) {
	if m.peer.index >= 0 {
		s.group.leave(m.peer)
	}
}

// News says whether an answer to m need not be held any more.
func (s *Swarm) News(m Member) bool { return m.peer.told != s.group.joins || s.group.settled(m.peer) }

// Held says whether an answer to m may be held beside so many others.
func (s *Swarm) Held(m Member, held int) bool { return m.peer.told > 0 && held < maxHeld }

// Answer names peers to m, in the order in which to connect to them, and says
// how many of them it had not heard of.
func (s *Swarm) Answer(m Member, chance *rand.Rand) (peers []netip.AddrPort, newcomers int) {
	come := s.group.newcomers(m.peer, chance.IntN)
	m.peer.lingers = s.group.incomplete() > btoi(!m.peer.complete)
	for _, p := range s.group.names(m.peer, come, maxAnswer, chance.IntN) {
		peers = append(peers, p.addr)
	}
	return peers, len(come)
}

// Interval is the time between announces of a peer.
func (s *Swarm) Interval() time.Duration {
	return time.Duration(s.group.interval(len(s.group.peers))) * time.Second
}

// Gathers is for how long all who join are told together to each of so many who
// wait.
func Gathers(held int) time.Duration { return gathers(held) }
