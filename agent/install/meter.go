package install

import (
	"sync"
	"time"

	"rookery/wire"
)

// A meter reads the transfer of all layers for the report.
type meter struct {
	mu     sync.Mutex
	layers []*layer
	rate   int64
	came   int64 // when rate was computed
	at     time.Time
}

func (m *meter) watch(layers []*layer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.layers, m.at = layers, time.Now()
}

// read is how far the image is, or nil while there is nothing to fetch yet.
func (m *meter) read() *wire.Transfer {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.layers == nil {
		return nil
	}
	t := &wire.Transfer{}
	for _, l := range m.layers {
		left := l.pieces.Left() // first, so that Total is not less than Done
		done, server, peers, uploaded := l.pieces.Transfer()
		t.Done += done
		t.Total += done + left
		t.FromServer += server
		t.FromPeers += peers
		t.Uploaded += uploaded
		if l.swarm != nil {
			t.Peers = max(t.Peers, l.swarm.Peers()) // they are mostly the same for each layer
		}
	}
	if past := time.Since(m.at); past >= time.Second {
		came := t.FromServer + t.FromPeers // staging may have had more
		now := int64(float64(came-m.came) / past.Seconds())
		m.rate = (m.rate + now) / 2 // of the last seconds, mostly of the last
		if t.Done == t.Total {
			m.rate = 0
		}
		m.came, m.at = came, time.Now()
	}
	t.Rate = m.rate
	return t
}
