package sim

import "rookery/transport/swarm/rules"

// stands is what both ends make of a hello, which says in what rack the peer is. A node knows from
// the start where it stands itself, as its tracker would say.
func (s *sim) stands(e *end) {
	if s.Rack == 0 || e.Server {
		return
	}
	if e.n.server {
		e.n.handout.Stand(e, s.rackName(e.peer.n))
		return
	}
	s.recount(e, func() { e.Stand(s.rackName(e.peer.n), s.rackName(e.n)) })
	e.n.abroad = e.n.abroad || e.Far
	e.n.nearby.Redraw()
	s.crowd(e)
}

// crowd ends a connection where there are more than places.
func (s *sim) crowd(e *end) {
	if len(e.n.ends) > rules.MaxNode {
		s.close(rules.Crowded(e, e.n.peers))
	}
}

// mates are the ids of those with whom a node shares what is to be brought in.
func (n *node) mates() (ids [][20]byte) {
	for _, e := range n.ends {
		if e.Mate && !e.Sleeps {
			ids = append(ids, e.peer.n.key)
		}
	}
	return ids
}

// counts adds d to the number of peers that have a piece.
func (s *sim) counts(e *end, p, d int) {
	n := e.n
	n.copies[p] += int32(d)
	if s.Rack > 0 && !n.server {
		n.nearby.Count(&e.Feed, p, d, s.clock)
	}
}

// recount has what a peer has counted anew where that depends on what changes.
func (s *sim) recount(e *end, change func()) {
	was := e.Feed
	change()
	if s.Rack == 0 || e.n.server || was.Far == e.Far && was.Stalled > 0 == (e.Stalled > 0) {
		return
	}
	for p := range s.pieces {
		if e.has.Has(p) {
			e.n.nearby.Count(&was, p, -1, s.clock)
			e.n.nearby.Count(&e.Feed, p, 1, s.clock)
		}
	}
}
