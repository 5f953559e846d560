package rules

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A taker is a peer that is offered pieces and never gets any.
type taker struct {
	Client
	has Set
}

func (t *taker) Offers() *Client { return &t.Client }
func (t *taker) Has(n int) bool  { return t.has.Has(n) }

// Each piece is given out once. Of what others have, one of few is given all the
// same, and so is one of many when others give it nothing.
func TestWhomAServerHelps(t *testing.T) {
	const pieces = 4
	for _, tt := range []struct {
		peers  int
		copies int32
		quiet  time.Duration // since the peers told of a piece
		want   bool
	}{
		{maxHelped + 1, 0, 0, true},
		{maxHelped + 1, 1, 0, false},
		{maxHelped + 1, 1, offerIdle, false},
		{maxHelped + 1, 1, offerIdle + 1, true},
		{maxHelped, 1, 0, true},
	} {
		start := time.Now()
		var peers []*taker
		for i := range tt.peers {
			host := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			p := &taker{NewClient(pieces, host, start), NewSet(pieces)}
			p.Met = true
			peers = append(peers, p)
		}
		h := NewHandout[*taker](make([]bool, pieces))
		told := 0
		h.Offer(slices.Values(peers), slices.Repeat([]int32{tt.copies}, pieces), 64<<10, 0, start.Add(tt.quiet), func(*taker, int) { told++ })
		if (told > 0) != tt.want {
			t.Errorf("%d peers, %d copies, quiet for %s: %d offers, want any: %v", tt.peers, tt.copies, tt.quiet, told, tt.want)
		}
	}
}
