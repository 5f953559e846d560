package multicast

import (
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"rookery/wire"
)

// StaleAfter is how long what a node said counts.
const StaleAfter = 30 * time.Second

// maxClients bounds memory; those beyond get what the others get.
const maxClients = 20_000

// A Demand is what nodes have said lately that they want of one layer. The zero
// value is ready; all methods may be called at any time.
type Demand struct {
	mu      sync.Mutex
	clients map[string]client
	changed chan struct{}
}

type client struct {
	wire.Want
	at     time.Time // it said so
	before time.Time // it had said something
}

// Hear takes note of what a node says, and says whether it is new.
func (d *Demand) Hear(w wire.Want, now time.Time) (news bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.clients == nil {
		d.clients = map[string]client{}
	}
	last, known := d.clients[w.Client]
	switch {
	case w.Done:
		delete(d.clients, w.Client)
	case known || len(d.clients) < maxClients:
		d.clients[w.Client] = client{w, now, last.at}
	}
	if d.changed != nil {
		close(d.changed)
		d.changed = nil
	}
	return !known && !w.Done
}

// Clients is how many nodes want the layer, and how many of these hear what is sent
// and have others who fill their holes.
func (d *Demand) Clients(now time.Time) (all, served int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forget(now)
	for _, c := range d.clients {
		if c.Helped && c.Lacks != nil {
			served++
		}
	}
	return len(d.clients), served
}

// Changed is closed with the next word of a node.
func (d *Demand) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.changed == nil {
		d.changed = make(chan struct{})
	}
	return d.changed
}

func (d *Demand) fresh(now time.Time) []client {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forget(now)
	return slices.Collect(maps.Values(d.clients))
}

// forget drops those who have not said anything for long. Called by who holds mu.
func (d *Demand) forget(now time.Time) {
	maps.DeleteFunc(d.clients, func(_ string, c client) bool { return now.Sub(c.at) > StaleAfter })
}

// needs is what of each block is lacked, as a share of its data rows, by the node
// that lacks most of it. What was sent of a block after a node said that it lacks
// it may have come: it says so again when it has not.
func needs(clients []client, sent []time.Time) []float64 {
	all := make([]float64, len(sent))
	for _, c := range clients {
		for b := range all {
			lack := 1.0
			if c.Lacks != nil {
				if lack = 0; b < len(c.Lacks) {
					lack = float64(c.Lacks[b]) / 255
				}
			}
			if c.at.After(sent[b]) {
				all[b] = max(all[b], lack)
			}
		}
	}
	return all
}

// pass is the blocks of one turn, beginning with block first. Those of which
// little is lacked come before all others: they are soon done, and free the
// memory of those who wait for it; unless it is the turn of all. Without a way back all that can be known is
// that somebody may lack everything.
func pass(needs []float64, first int, always, all bool) []order {
	var few, many []order
	for i := range needs {
		b := (first + i) % len(needs)
		switch need := needs[b]; {
		case need > little:
			many = append(many, order{b, need})
		case need > 0:
			few = append(few, order{b, need})
		case always:
			many = append(many, order{b, 1})
		}
	}
	if len(few) > 0 && !all {
		return few
	}
	return append(few, many...)
}

const (
	little = 0.25
	maxFew = 8 // passes in a row over what little is lacked of: anybody may say that he lacks some
)

// An order is to send so many rows of a block, as a share of its data rows.
type order struct {
	block int
	need  float64
}

// How many standard deviations of what is lost are sent beyond the mean. Where others
// help, less than the mean is: they fill the rest while the next blocks are sent, in what
// the sender leaves of the links, which a row for all would take from all. Of what is sent
// last there is no time for that. Of few nodes none may have what one lacks, and connections
// bear small losses only.
const (
	marginAlone  = 2.5
	marginHelped = -0.6
	marginLossy  = 1
	manyHelp     = 16
	lossy        = 0.1
	lastFor      = 4 * time.Second // before the end of a pass
)

// atFirst is what is sent beyond the first block, in which the index is, before
// anybody can say what is lost.
const atFirst = 0.1

// parity is what to send beyond what is lacked, as a share of it, so that most
// nodes have enough when they lose as much as they lately did. Who loses
// more is not waited for. last is what is sent last. Where no node is heard it is unheard.
func parity(clients []client, unheard float64, rows int, last bool) float64 {
	if len(clients) == 0 {
		return unheard
	}
	var lost []float64
	helped, part := 0, 0.75
	for _, c := range clients {
		if c.Lacks == nil {
			continue // it has not heard enough
		}
		lost = append(lost, c.Lost)
		if c.Helped {
			helped++
		}
	}
	if len(lost) == 0 {
		return max(unheard, atFirst)
	}
	if 2*helped > len(lost) {
		part = 0.5
	}
	slices.Sort(lost)
	q := min(lost[int(float64(len(lost)-1)*part)], 0.5)
	margin := marginAlone
	switch {
	case last:
	case 2*helped > len(lost) && helped >= manyHelp && q < lossy:
		margin = marginHelped
	case 2*helped > len(lost):
		margin = marginLossy
	}
	return max(0, q/(1-q)+margin*math.Sqrt(q/float64(rows)))
}

// count is how many rows of a block with so many of data that is.
func (o order) count(rows int, parity float64) int {
	n := int(math.Ceil(o.need * float64(rows) * (1 + parity)))
	if o.need < 1 {
		n++
	}
	return n
}
