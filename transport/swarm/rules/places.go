package rules

import (
	"iter"
	"time"
)

// Whom a node serves. It feeds as many others as it is fed by, and each for as
// long as it asks. It says no to the rest, and unchokes who was turned away when
// there is a place. Who finds none for long gets that of who was fed longest, which
// then looks for another: on the way of such moves, nodes without a place and places
// without a node come together.
const (
	MaxFed      = 4                      // nodes that get something at a time
	FedFor      = 50 * time.Millisecond  // after a block has left: the next request is on its way
	HungryAfter = 500 * time.Millisecond // of asking in vain
	StuckAfter  = time.Second            // who takes nothing for so long keeps nobody else out

	// Blocks that leave at a time, of all torrents: each has its turn until it has
	// left, so that pieces are complete one after the other, and fifty
	// connections do not overflow the queues on the way.
	MaxTurns  = 4
	turnAhead = 50 * time.Millisecond // what leaves in that time needs no turn
	turnLeast = 48 << 10              // bytes that need none
)

// A Place is what a node knows of a peer that asks it for pieces.
type Place struct {
	since time.Time // when it was taken on
	leave bool      // it has been fed for long enough: others want its place
	waits time.Time // in vain, for a place, since then; zero: it does not
}

// A Taker is a peer that may ask for pieces.
type Taker interface {
	comparable
	Takes() *Place
	Fed(now time.Time) bool // it has a place
}

// Fed says whether a peer has a place, of which queued bytes have not left, a
// block is leaving since writing, unless that is zero, and the last one had left
// at left.
func Fed(queued int64, writing, left, now time.Time) bool {
	stuck := !writing.IsZero() && now.Sub(writing) > StuckAfter
	return !stuck && (queued > 0 || now.Sub(left) < FedFor)
}

// TakesOn says whether a peer gets the piece that it asks for.
func TakesOn[P Taker](p P, peers iter.Seq[P], now time.Time) bool {
	place := p.Takes()
	switch fed := p.Fed(now); {
	case fed && place.leave:
		place.leave, place.waits = false, now
		return false
	case fed:
		if Places(peers, now) < 0 && !leaving(peers, now) {
			makeRoom(peers, now)
		}
		return true
	case Places(peers, now) > 0:
	case place.waits.IsZero():
		place.waits = now
		return false
	case now.Sub(place.waits) < HungryAfter || !makeRoom(peers, now):
		return false
	}
	place.since, place.leave, place.waits = now, false, time.Time{}
	return true
}

// Places is how many more peers there is a place for.
func Places[P Taker](peers iter.Seq[P], now time.Time) int {
	places := MaxFed
	for p := range peers {
		places -= btoi(p.Fed(now))
	}
	return places
}

// leaving says whether one with a place is about to lose it. Who was stuck and
// moves again is one too many, and all have less than they could have elsewhere
// until one has gone.
func leaving[P Taker](peers iter.Seq[P], now time.Time) bool {
	for p := range peers {
		if p.Takes().leave && p.Fed(now) {
			return true
		}
	}
	return false
}

// makeRoom lets the peer that has been fed longest look for another place. What
// it has asked for by now, it gets.
func makeRoom[P Taker](peers iter.Seq[P], now time.Time) bool {
	var longest *Place
	for p := range peers {
		if place := p.Takes(); !place.leave && p.Fed(now) && (longest == nil || place.since.Before(longest.since)) {
			longest = place
		}
	}
	if longest != nil {
		longest.leave = true
	}
	return longest != nil
}

// Rest is how many bytes more than need no turn have not arrived, of a peer that
// sends so many a second.
func Rest(unacked int, rate int64) int64 {
	return int64(unacked) - max(turnLeast, rate*int64(turnAhead)/int64(time.Second))
}
