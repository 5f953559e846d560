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

// Who came first has all that is on offer. Those who come then get something all the
// same, and not each as much.
func TestTheFirstKeepsNobodyOut(t *testing.T) {
	const pieces = 256
	now := time.Now()
	h := NewHandout[*taker](make([]bool, pieces))
	var peers []*taker
	offered := func() (of []int) {
		h.Idle = false
		h.Offer(slices.Values(peers), make([]int32, pieces), 64<<10, 0, now, func(*taker, int) {})
		for _, p := range peers {
			of = append(of, p.count)
		}
		return of
	}
	join := func(n int) {
		for range n {
			p := &taker{NewClient(pieces, netip.AddrFrom4([4]byte{10, 0, 0, byte(len(peers))}), now), NewSet(pieces)}
			p.Met, p.took = true, true
			peers = append(peers, p)
		}
	}
	for _, tt := range []struct {
		join int
		want []int
	}{
		{1, []int{minOffers}},
		{1, []int{minOffers, 0}},
		{4, []int{minOffers, 1, 1, 1, 1, 0}},
		{18, slices.Concat([]int{minOffers}, slices.Repeat([]int{1}, 6), make([]int, 17))},
	} {
		join(tt.join)
		if got := offered(); !slices.Equal(got, tt.want) {
			t.Errorf("%d peers are offered %v, want %v", len(peers), got, tt.want)
		}
	}
	h.Forget(peers[0])
	peers = peers[1:]
	if got := offered(); !slices.Equal(got, slices.Concat(slices.Repeat([]int{1}, minOffers), make([]int, 15))) {
		t.Errorf("when the first is gone they are offered %v", got)
	}
	// Those who want nothing more have no share.
	h, peers = NewHandout[*taker](make([]bool, pieces)), nil
	join(9)
	for _, p := range peers[3:] {
		p.All = true
	}
	if got := offered(); got[0]+got[1]+got[2] != minOffers {
		t.Errorf("three of nine who want something are offered %v, want %d together", got, minOffers)
	}
	if got := offered(); got[0]+got[1]+got[2] != minOffers {
		t.Errorf("and once more: %v, want no more", got)
	}
}
