package tracker

import "slices"

const (
	maxAnswer = 50 // peers in one answer
	first     = 2  // of these, servers that are named before all others
	farEvery  = 3  // of the others, every third stands in another rack
	tries     = 4  // for each place in an answer, in a swarm that is larger
)

// choose names up to want of the members of a swarm to one of them, me, in the
// order in which it had best connect: servers, then two of its own rack for
// each of another, by lot, so that most bytes stay below one switch and the
// swarm has no islands. Where one kind runs out the other goes on. Newcomers
// come before the others of their kind. Who is complete is told of no one who
// is. The work does not grow with the swarm; lot(n) is a number below n.
func choose(me *peer, all, near, servers, newcomers []*peer, want int, lot func(n int) int) []*peer {
	out := make([]*peer, 0, want)
	useful := func(p *peer) bool { return p != me && !(me.complete && p.complete) }
	for p := range lots(servers, lot) {
		if len(out) < min(want, first) && useful(p) {
			out = append(out, p)
		}
	}
	named := len(out)
	queue := func(of []*peer, ours bool, most int) []*peer {
		q := make([]*peer, 0, most)
		take := func(p *peer) {
			if (p.rack == me.rack) == ours && useful(p) && !slices.Contains(out[:named], p) && !slices.Contains(q, p) {
				q = append(q, p)
			}
		}
		for _, p := range newcomers {
			take(p)
		}
		for p := range lots(of, lot) {
			if len(q) >= most {
				break
			}
			take(p)
		}
		return q
	}
	here := queue(near, true, want)
	far := queue(all, false, max(want/farEvery+1, want-len(here)))
	for len(out) < want && len(here)+len(far) > 0 {
		from := &here
		if len(here) == 0 || len(far) > 0 && (len(out)-named)%farEvery == farEvery-1 {
			from = &far
		}
		out, *from = append(out, (*from)[0]), (*from)[1:]
	}
	return out
}

// lots are all of a few peers in a random order, or many of more, some of them
// more than once.
func lots(of []*peer, lot func(n int) int) func(yield func(*peer) bool) {
	return func(yield func(*peer) bool) {
		const most = tries * maxAnswer
		if len(of) > most {
			for range most {
				if !yield(of[lot(len(of))]) {
					return
				}
			}
			return
		}
		var order [most]*peer
		n := copy(order[:], of)
		for ; n > 0; n-- {
			i := lot(n)
			p := order[i]
			order[i] = order[n-1]
			if !yield(p) {
				return
			}
		}
	}
}
