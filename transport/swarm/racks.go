package swarm

import (
	"maps"
	"time"

	"rookery/transport"
	"rookery/transport/swarm/rules"
)

// rackKey is a key of our own in the handshake of BEP 10: the rack that a node
// stands in, as its tracker says.
const rackKey = "rookery_rack"

// rackOf is what the first tracker says that knows it.
func rackOf(said []heard) string {
	for _, h := range said {
		if h.rack != "" {
			return h.rack
		}
	}
	return ""
}

// stands notes in what rack this node is, and tells its peers.
func (t *Torrent) stands(rack string) {
	if t.seeder || rack == t.rack {
		return
	}
	t.rack = rack
	for c := range t.conns {
		c.place()
		c.extend()
	}
	t.fill(time.Now())
}

// moves notes in what rack a peer says that it is.
func (c *conn) moves(rack string) {
	if rack == c.rack || len(rack) > rules.MaxRack {
		return
	}
	c.rack = rack
	if c.t.seeder {
		c.t.handout.Stand(c, rack)
		return
	}
	c.place()
}

// place notes whether a peer is near.
func (c *conn) place() {
	c.recount(func() { c.Stand(c.rack, c.t.rack) })
	c.Mate = c.Mate && c.ours
	c.t.abroad = c.t.abroad || c.Far
	c.t.nearby.Redraw()
}

// recount has what a peer has counted anew where that depends on what changes.
func (c *conn) recount(change func()) {
	t, now := c.t, time.Now()
	was := c.Feed
	change()
	if !t.conns[c] || was.Far == c.Far && was.Stalled > 0 == (c.Stalled > 0) {
		return
	}
	for n := range t.copies {
		if c.has.Has(n) {
			t.nearby.Count(&was, n, -1, now)
			t.nearby.Count(&c.Feed, n, 1, now)
		}
	}
}

// counts adds d to the number of peers that have a piece.
func (t *Torrent) counts(c *conn, n, d int) {
	t.copies[n] += int32(d)
	t.nearby.Count(&c.Feed, n, d, time.Now())
}

// mates are the ids of those with whom this node shares what is to be brought in.
func (t *Torrent) mates() (ids [][20]byte) {
	for c := range t.conns {
		if c.Mate && !c.Sleeps {
			ids = append(ids, c.id)
		}
	}
	return ids
}

// mayBeMate says whether a place is to be found for a peer if it stands here.
func (t *Torrent) mayBeMate(c *conn) bool {
	return t.rack != "" && c.ours && c.ltep && c.origin != transport.FromServer
}

// crowd closes a connection where there are more than places, when a peer has just
// said where it stands.
func (t *Torrent) crowd(c *conn) {
	if len(t.conns) <= t.max || c.origin == transport.FromServer {
		return
	}
	leaves := rules.Crowded(c, maps.Keys(t.conns))
	leaves.close()
	t.detachLocked(leaves)
}
