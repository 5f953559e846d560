package tracker

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"unique"
)

// members are so many peers in each rack, all incomplete.
func members(racks ...int) (all []*peer) {
	for r, n := range racks {
		for i := range n {
			ip := netip.AddrFrom4([4]byte{10, byte(r >> 8), byte(r), byte(i)})
			all = append(all, &peer{addr: netip.AddrPortFrom(ip, uint16(1+i>>8)), rack: unique.Make(fmt.Sprint(r))})
		}
	}
	return all
}

func near(of *peer, all []*peer) (out []*peer) {
	for _, p := range all {
		if p.rack == of.rack {
			out = append(out, p)
		}
	}
	return out
}

func TestChoose(t *testing.T) {
	complete := func(n ...int) func([]*peer) {
		return func(all []*peer) {
			for _, i := range n {
				all[i].complete = true
			}
		}
	}
	for _, tt := range []struct {
		name      string
		racks     []int
		change    func(all []*peer)
		servers   []int // in all; the first of all asks
		newcomers []int
		want      int
		kinds     string // s: a server, n: near, f: far, N and F: newcomers
	}{
		{name: "alone", racks: []int{1}, want: 50},
		{name: "few, and all are named", racks: []int{4, 3}, want: 50, kinds: "nnfnff"},
		{name: "nobody near", racks: []int{1, 2, 2}, want: 50, kinds: "ffff"},
		{name: "nobody far", racks: []int{5}, want: 50, kinds: "nnnn"},
		{name: "eight of few", racks: []int{8, 8, 8, 8}, want: 8, kinds: "nnfnnfnn"},
		{name: "eight of many", racks: []int{40, 1000}, want: 8, kinds: "nnfnnfnn"},
		{name: "nearly all are near", racks: []int{180, 4}, want: 20, kinds: "nnfnnfnnfnnfnnnnnnnn"},
		{name: "none", racks: []int{3, 3}, want: 0},
		{name: "a full answer", racks: []int{40, 1000}, want: 50, kinds: strings.Repeat("nnf", 16) + "nn"},
		{name: "a server far away is first", racks: []int{8, 8}, servers: []int{10}, want: 8, kinds: "snnfnnfn"},
		{name: "the third server is one of many", racks: []int{8, 3}, servers: []int{8, 9, 10}, want: 50, kinds: "ssnnsnnnnn"},
		{name: "one place", racks: []int{8, 8}, servers: []int{8, 9}, want: 1, kinds: "s"},
		{name: "the server asks", racks: []int{3, 1}, servers: []int{0}, want: 50, kinds: "nnf"},
		{name: "newcomers come before their kind", racks: []int{8, 8}, newcomers: []int{7, 15}, want: 8, kinds: "NnFnnfnn"},
		{name: "newcomers of many", racks: []int{40, 1000}, newcomers: []int{7, 100, 101}, want: 8, kinds: "NnFnnFnn"},
		{name: "who is complete needs no one who is", racks: []int{4, 4}, change: complete(0, 1, 2, 4, 5, 6), servers: []int{4}, want: 50, kinds: "nf"},
		{name: "who is not complete needs all", racks: []int{4, 4}, change: complete(1, 2, 4, 5, 6), servers: []int{4}, want: 50, kinds: "snnfnff"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			all := members(tt.racks...)
			if tt.change != nil {
				tt.change(all)
			}
			me := all[0]
			kind := map[*peer]string{}
			for _, p := range all {
				kind[p] = "f"
				if p.rack == me.rack {
					kind[p] = "n"
				}
			}
			pick := func(as func(string) string, of []int) (out []*peer) {
				for _, i := range of {
					kind[all[i]] = as(kind[all[i]])
					out = append(out, all[i])
				}
				return out
			}
			servers := pick(func(string) string { return "s" }, tt.servers)
			newcomers := pick(strings.ToUpper, tt.newcomers)
			for seed := range uint64(20) {
				lot := rand.New(rand.NewPCG(seed, 0)).IntN
				got, named := "", map[*peer]bool{me: true}
				for _, p := range choose(me, all, near(me, all), servers, newcomers, tt.want, lot) {
					if named[p] {
						t.Fatalf("%v is named twice, or to itself", p.addr)
					}
					got, named[p] = got+kind[p], true
				}
				if got != tt.kinds {
					t.Fatalf("%q, want %q", got, tt.kinds)
				}
			}
		})
	}
}

// Everyone connects to the first eight it is told of. That is one swarm, in
// which nobody has to serve a crowd.
func TestSwarmHasNoIslands(t *testing.T) {
	for _, tt := range []struct{ racks, size int }{{4, 8}, {30, 33}, {100, 1}, {2, 400}, {1, 500}} {
		for seed := range uint64(5) {
			t.Run(fmt.Sprintf("%d racks of %d, %d", tt.racks, tt.size, seed), func(t *testing.T) {
				sizes := make([]int, tt.racks)
				for i := range sizes {
					sizes[i] = tt.size
				}
				all := members(sizes...)
				lot := rand.New(rand.NewPCG(seed, 1)).IntN
				neighbours := map[*peer][]*peer{}
				told, far := map[*peer]int{}, 0
				for _, p := range all {
					for _, q := range choose(p, all, near(p, all), nil, nil, 8, lot) {
						neighbours[p] = append(neighbours[p], q)
						neighbours[q] = append(neighbours[q], p)
						told[q]++
						far += btoi(p.rack != q.rack)
					}
				}
				reached := map[*peer]bool{all[0]: true}
				for edge := all[:1:1]; len(edge) > 0; edge = edge[1:] {
					for _, q := range neighbours[edge[0]] {
						if !reached[q] {
							reached[q] = true
							edge = append(edge, q)
						}
					}
				}
				if len(reached) != len(all) {
					t.Errorf("%d of %d are reached", len(reached), len(all))
				}
				most := 0
				for _, n := range told {
					most = max(most, n)
				}
				t.Logf("one is named to %d, %d of %d connections leave a rack", most, far, 8*len(all))
				if most > 24 {
					t.Errorf("one is named to %d, want 8 on the average and 24 at the most", most)
				}
				if tt.size > 7 && far > 2*len(all) {
					t.Errorf("%d connections leave a rack, want %d at the most", far, 2*len(all))
				}
			})
		}
	}
}
