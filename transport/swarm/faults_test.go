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

// A limit on what a node receives is no stall of those who send.
func TestALowLimit(t *testing.T) {
	for _, part := range []float64{0.5, 0.2} { // of the rate
		synctest.Test(t, func(t *testing.T) {
			s, end := newSite(t, 64)
			defer end()
			s.server()
			var nodes []member
			for range 8 {
				nodes = append(nodes, s.node(s.rate))
			}
			s.done(t, nodes...)
			start, limit := time.Now(), transport.NewLimiter(int64(part*s.rate))
			s.done(t, s.joinLimited(transport.NewPieces(s.info, transporttest.NewMemory(nil)), Options{}, s.rate, limit))
			took := time.Since(start).Seconds() / 30 * part
			t.Logf("%.1f of the rate: %.3f of the time that the limit needs", part, took)
			if took > 1.2 {
				t.Errorf("%.1f of the rate: %.3f of the time that the limit needs", part, took)
			}
		})
	}
}
