package swarm

import (
	"fmt"
	"maps"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport/swarm/rules"
)

// handOut offers pieces as long as the uplink has too little to do: which and to
// whom is decided in package rules. It is called for every message.
func (t *Torrent) handOut(now time.Time) {
	if !t.seeder || t.gone || t.quiet {
		return
	}
	t.handout.Offer(maps.Keys(t.conns), t.copies, t.info.PieceLength, t.up, now, func(c *conn, n int) {
		c.send(pp.Message{Type: pp.Have, Index: pp.Integer(n)})
	})
}

// Offers and Has are for rules.Handout.
func (c *conn) Offers() *rules.Client { return &c.Client }
func (c *conn) Has(n int) bool        { return c.has.Has(n) }

// greetLate no longer waits for what peers may have to say.
func (t *Torrent) greetLate(now time.Time) {
	if !t.seeder {
		return
	}
	t.handout.Idle = false
	for c := range t.conns {
		c.GreetLate(now)
	}
}

// uses notes what a peer has a use for: a bitfield, or nothing for everything.
func (c *conn) uses(field string) error {
	count := len(c.t.copies)
	defer c.t.handout.Uses(c)
	c.Met, c.All, c.Use = true, false, nil
	c.t.handout.Idle = false
	if field == "" {
		return nil
	}
	if len(field) != (count+7)/8 {
		return fmt.Errorf("%s: %d bytes for %d pieces", usesKey, len(field), count)
	}
	c.Use = make([]bool, count)
	for n := range c.Use {
		c.Use[n] = field[n/8]>>(7-n%8)&1 == 1
	}
	return nil
}

// Quiet keeps a seeder from offering anything, while all get it in another way and
// what some of them lack others have.
func (t *Torrent) Quiet(quiet bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.quiet = quiet
	t.handOut(time.Now())
}
