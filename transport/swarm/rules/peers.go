package rules

import "time"

// Connections of a torrent.
const (
	MaxNode    = 20   // on a node, besides those to servers
	Wanted     = 16   // of these that a node looks for
	MaxServers = 8    // that have room besides the others
	MaxServed  = 1000 // at a server
)

// Redial is how long a peer is left alone whose connection has ended, or did not
// come about, after so many that ended soon.
func Redial(fails int) time.Duration {
	return time.Second << min(fails, 2) // servers come back
}

// A torrent file, which comes before all else, goes from hand to hand.
const (
	MaxGiving = 4           // who get it from the server and have not come with it yet
	GivingFor = time.Second // until these are not waited for
	NamedTo   = 8           // others, to whom the server names each that came with it, in GivingFor
)
