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
