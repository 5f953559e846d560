package multicast

import (
	"math"
	"time"
)

// A pace is how fast to send. The zero value is the set rate, which is kept for as
// long as anybody who listens keeps up with it, or may.
type pace struct {
	rate  int64     // bytes a second; 0: the set one
	since time.Time // it is
	stays time.Time // until then: slower was no better
}

const (
	settles    = 10 * time.Second // until all have said what they lose at a new rate
	triesAgain = time.Minute
	keepsUp    = 0.05 // who loses less may get more
	raise      = 1.1
	slowest    = 32 // part of the set rate
)

// next is the pace at what nodes have said by now. Where all lose much, as those do
// that are left with slow links, it is what the quickest of them gets. Who has
// not said yet what it loses may be quick; who comes back because it lost much has.
func (p pace) next(set int64, clients []client, now time.Time) pace {
	best, fresh, newcomer := 1.0, !now.Before(p.stays), false
	for _, c := range clients {
		newcomer = newcomer || c.Lacks == nil && c.Lost == 0
		fresh = fresh && (p.since.IsZero() || c.before.Sub(p.since) >= settles)
		best = min(best, c.Lost)
	}
	switch {
	case len(clients) == 0:
		return pace{}
	case newcomer && p.rate > 0:
		return pace{since: now}
	case newcomer || !fresh:
		return p
	case best > tooMuch && p.rate > 0:
		return pace{since: now, stays: now.Add(triesAgain)}
	case best > tooMuch:
		return pace{rate: max(set/slowest, int64(math.Round(float64(set)*(1-best)))), since: now}
	case best < keepsUp && p.rate > 0:
		if p.rate = int64(float64(p.rate) * raise); p.rate >= set {
			p.rate = 0
		}
		p.since = now
	}
	return p
}
