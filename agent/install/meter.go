package install

import (
	"sync"
	"time"

	"rookery/transport"
	"rookery/wire"
)

// A meter reads a transfer for the report.
type meter struct {
	mu     sync.Mutex
	pieces *transport.Pieces
	swarm  Swarm
	rate   int64
	done   int64 // when rate was computed
	at     time.Time
}

func (m *meter) watch(pieces *transport.Pieces, swarm Swarm) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pieces, m.swarm, m.at = pieces, swarm, time.Now()
}

// read is how far the image is, or nil while there is nothing to fetch yet.
func (m *meter) read() *wire.Transfer {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pieces == nil {
		return nil
	}
	t := &wire.Transfer{Total: m.pieces.Info().Length}
	t.Done, t.FromServer, t.FromPeers, t.Uploaded = m.pieces.Transfer()
	if m.swarm != nil {
		t.Peers = m.swarm.Peers()
	}
	if past := time.Since(m.at); past >= time.Second {
		now := int64(float64(t.Done-m.done) / past.Seconds())
		m.rate = (m.rate + now) / 2 // of the last seconds, mostly of the last
		if t.Done == t.Total {
			m.rate = 0
		}
		m.done, m.at = t.Done, time.Now()
	}
	t.Rate = m.rate
	return t
}
