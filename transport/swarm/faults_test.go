package swarm

import (
	"testing"
	"testing/synctest"
	"time"

	"rookery/transport"
	"rookery/transport/transporttest"
)

// What may be claimed only later is asked of peers that have nothing new to say.
func TestNodesWithTheWholeLayerAreAskedAgain(t *testing.T) {
	tests := map[string]func(p *transport.Pieces) (later func()){
		"held": func(p *transport.Pieces) func() {
			p.Prefer(0, 1)
			p.Hold()
			return func() { p.Want(transport.Range{Size: p.Info().Length}) }
		},
		"given up by another source": func(p *transport.Pieces) func() {
			var claimed []int
			for range p.Info().Hashes[1:] {
				n, _ := p.Claim(func(n int) (int64, bool) { return 0, n > 0 })
				claimed = append(claimed, n)
			}
			return func() {
				for _, n := range claimed {
					p.Release(n)
				}
			}
		},
	}
	for name, begin := range tests {
		synctest.Test(t, func(t *testing.T) {
			s, end := newSite(t, 64)
			defer end()
			server := s.server()
			s.done(t, s.node(s.rate))
			server.off()
			pieces := transport.NewPieces(s.info, transporttest.NewMemory(nil))
			later := begin(pieces)
			node := s.join(pieces, Options{}, s.rate)
			if err := pieces.Wait(s.ctx, 0, 1); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			t.Log(name)
			later()
			s.done(t, node)
		})
	}
}
