// Package rules decides for package swarm: whom a node asks for what, whom it
// serves, and what a server offers to whom. It knows no connections, locks and
// clocks, so that a simulation of ten thousand nodes decides as they would.
package rules

import (
	"iter"
	"time"
)

// Whom a node asks. It stays with the few nodes that give it something: when as
// many streams leave each uplink as come in by each downlink, all links are full.
// Who asks here and there finds some that are busy and leaves others idle, and a no
// takes as long to come as a piece.
const (
	MaxFeeds    = 4                      // nodes that are asked at a time
	feedsBeside = 2                      // the same, beside a stream that nobody asks for
	minAsking   = 2                      // pieces asked of each, or
	askLeast    = 96 << 10               // bytes of pieces, or
	AskAhead    = 100 * time.Millisecond // what it sends in that time, when that is more
	QuietFor    = 2 * time.Second        // without a byte: another is asked beside it
	Breather    = time.Second            // before who refused is asked again, unless it unchokes us

	StallAfter = 5 * time.Second // without a byte: the piece is asked elsewhere
	MaxStalls  = 6               // one after the other: the connection is given up
	MaxTaken   = 2               // times that a piece is taken from one peer for another
	SlowAfter  = time.Second     // a piece is not taken from anybody before that
)

// A Feed is what a node knows of a peer that may give it pieces.
type Feed struct {
	Server  bool // it offers no more than it can send
	Open    int  // pieces that it is asked for
	Useful  int  // pieces that it has and the node wants
	Choked  bool
	Stalled int       // times, one after the other
	Heard   time.Time // when it last sent anything of a piece
	Paused  time.Time // nothing is asked for until then
	Invited bool      // it has said that it has room, and not refused since
	Dry     bool      // there was nothing to ask it for, a moment ago
	Far     bool      // it stands in another rack
	Mate    bool      // it stands in the node's own
	Sleeps  bool      // and gets nothing lately
	Gained  time.Time // when it last told of a piece, or came
}

// A Giver is a peer that may give pieces.
type Giver interface {
	comparable
	Gives() *Feed
}

// Can says whether there may be something to ask of a peer. Who stalled is
// trusted with one piece until it sends something.
func (f *Feed) Can(now time.Time) bool {
	return !f.Choked && f.Useful > 0 && !f.Dry && !now.Before(f.Paused) && (f.Stalled == 0 || f.Open == 0)
}

// Refused notes that it said no.
func (f *Feed) Refused(now time.Time) { f.Paused, f.Invited = now.Add(Breather), false }

// Unchoked notes that it has said that it has room.
func (f *Feed) Unchoked() { f.Choked, f.Paused, f.Invited = false, time.Time{}, true }

// Silent says whether it was asked for something and brings nothing.
// What comes from another rack may wait in a line for as long.
func (f *Feed) Silent(now time.Time) bool {
	return f.Open > 0 && now.Sub(f.Heard) > StallAfter*time.Duration(1+btoi(f.Far))
}

// Stalls notes that pieces were taken back from a silent peer, and says whether it
// is given up. Each time it takes longer until it is asked again, unless it says
// something.
func (f *Feed) Stalls(now time.Time) bool {
	f.Stalled++
	f.Paused = now.Add(StallAfter << f.Stalled)
	return f.Stalled >= MaxStalls
}

// Fill asks peers for as many pieces as keep the link busy, ahead of each node.
// What a server offers is taken whatever else is asked. Of another rack's nodes few
// are asked, but before others: what they have is on nobody's way here. ask asks for one more
// piece, counts it in Open, and says whether the peer had one for us; lot is a
// number below n; most is of nodes that are asked at a time. Fill is false when more
// nodes could be asked and none has anything.
func Fill[P Giver](peers iter.Seq[P], most, ahead int, now time.Time, lot func(n int) int, ask func(P) bool) bool {
	mates := 0
	for p := range peers {
		mates += btoi(p.Gives().Mate)
	}
	feed := func(p P, f *Feed) {
		pieces := ahead
		if f.Far && mates > 0 {
			pieces = 1 // the mates ask, too, and it is a long way
		}
		for f.Open < pieces && f.Can(now) && ask(p) {
		}
	}
	feeds, far := 0, 0
	for p := range peers {
		switch f := p.Gives(); {
		case f.Server:
			for f.Can(now) && ask(p) {
			}
		case f.Open > 0:
			feed(p, f)
			feeds += btoi(now.Sub(f.Heard) < QuietFor)
			far += btoi(f.Far && f.Open > 0)
		}
	}
	for feeds < most {
		p, ok := another(peers, far < farFeeds(mates), now, lot)
		if !ok {
			return false
		}
		feed(p, p.Gives())
		feeds += btoi(p.Gives().Open > 0)
		far += btoi(p.Gives().Far && p.Gives().Open > 0)
	}
	return true
}

// another is a node that nothing is asked of, a far one if it may be, and one that
// has said that it has room if there is one. Which of these is a matter of chance.
func another[P Giver](peers iter.Seq[P], far bool, now time.Time, lot func(n int) int) (best P, ok bool) {
	var count int
	likes := func(f *Feed) int { return 2*btoi(f.Far) + btoi(f.Invited) }
	for p := range peers {
		f := p.Gives()
		if f.Server || f.Open > 0 || f.Far && !far || !f.Can(now) {
			continue
		}
		switch {
		case !ok || likes(f) > likes(best.Gives()):
			best, count, ok = p, 1, true
		case likes(f) == likes(best.Gives()):
			if count++; lot(count) == 0 {
				best = p
			}
		}
	}
	return best, ok
}

// Rank is what a node claims the lowest of: the rarest piece, and of these the
// first in an order of its own.
func Rank(copies, own int32) int64 { return int64(copies)<<32 | int64(own) }

// TooSlow says whether a piece that was asked for at since, and is usually there
// after some time, may be taken from one peer for another.
func TooSlow(since time.Time, usually time.Duration, now time.Time) bool {
	return now.Sub(since) > max(SlowAfter, 3*usually)
}

// Slow is TooSlow for a piece that was asked of this peer. From another rack it waits
// in lines on its way, and a second one would only make them longer, unless somebody
// near has it by now.
func (f *Feed) Slow(since time.Time, usually time.Duration, here bool, now time.Time) bool {
	return TooSlow(since, usually, now) && (!f.Far || here || now.Sub(since) > StallAfter)
}

// Usually is how long a thing takes, after it took so long once more.
func Usually(usually, took time.Duration) time.Duration { return (7*usually + took) / 8 }

// Ahead is how many pieces of length bytes fit into a time at a rate in bytes a
// second, at least least.
func Ahead(least int, d time.Duration, rate, length int64) int {
	return max(least, int(rate*int64(d)/int64(time.Second)/length))
}

// Asking is how many nodes are asked at a time by one that gets down bytes a second,
// and for how many pieces of length bytes each. Beside a stream it is hardly anything:
// what is asked for waits in the same line, and a full one loses both.
func Asking(down, length int64, streams bool) (feeds, pieces int) {
	if streams {
		return feedsBeside, 1
	}
	return MaxFeeds, Ahead(max(minAsking, int(askLeast/length)), AskAhead, down/MaxFeeds, length)
}

// Measured is how often rates are measured.
const Measured = 250 * time.Millisecond

// Lately is a rate in bytes a second: what there was in the last moments, where
// a moment without anything does not count for much.
func Lately(rate, bytes int64) int64 {
	return max(bytes*int64(time.Second)/int64(Measured), rate-rate/8)
}

// New pieces are told together, those of so long or of two pieces.
const (
	minBatch = 50 * time.Millisecond
	maxBatch = 150 * time.Millisecond
)

// NewsBatch is how many times as long news waits for who is fed by others and would
// find something here: it has enough to choose from, and each packet costs as much as
// a dozen of news.
const NewsBatch = 3

// Waits says whether a peer hears of new pieces later than others: round counts how
// often they were told, wants is whether we have something that
// it has not, and fed whether it gets it.
func (f *Feed) Waits(round int, wants, fed bool) bool {
	switch {
	case f.Server:
		return false
	case f.Far:
		return round%FarBatch > 0
	}
	return wants && !fed && round%NewsBatch > 0
}

// TellServers is how often a server hears of pieces that it has not offered. It
// only counts them, and every packet costs its uplink one that says it has come.
const TellServers = time.Second

// Batch is for how long new pieces of length bytes are collected by who gets
// down bytes a second. A message to sixteen peers for each piece costs more than
// the piece; what is told with others costs less. The first pieces, which nobody
// has, go from hand to hand at once.
func Batch(down, length int64) time.Duration {
	if down <= 0 {
		return minBatch
	}
	return min(max(minBatch, time.Duration(float64(2*length)/float64(down)*float64(time.Second))), maxBatch)
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
