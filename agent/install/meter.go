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

	files    int64 // bytes of all files, once it is these that come
	written  int64 // of them
	received int64 // for them
}

func (m *meter) watch(layers []*layer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.layers, m.at = layers, time.Now()
}

// copy is told that from now on it is files that come, of that many bytes.
func (m *meter) copy(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.files = size
}

func (m *meter) receive(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.received += int64(n)
}

func (m *meter) write(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.written = min(n, m.files)
}

// extract is told that it is pieces again.
func (m *meter) extract() { m.copy(0) }

// pieces is how many verified bytes of layers have come.
func (m *meter) pieces() (came int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.layers {
		_, server, peers, _ := l.pieces.Transfer()
		came += server + peers
	}
	return came
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
	t.FromServer += m.received
	if m.files > 0 {
		t.Done, t.Total = m.written, m.files
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
