package http_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"rookery/transport"
	httpsource "rookery/transport/http"
	"rookery/transport/swarm"
	"rookery/transport/tracker"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// Nodes without a seeder, and a server that gives ranges: each brings a part,
// and the swarm carries it on.
func TestNodesShareWhatTheServerGives(t *testing.T) {
	const nodes, pieces = 8, 200
	content, info := transporttest.Layer(t, 1, pieces*64<<10)
	track := httptest.NewServer(tracker.New(func([20]byte) bool { return true }))
	defer track.Close()
	egress := transport.NewLimiter(5 << 20)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(slowly{w, r, egress}, r, "", time.Time{}, bytes.NewReader(content))
	}))
	defer server.Close()
	ctx, stop := context.WithCancel(t.Context())
	var all, peers sync.WaitGroup
	defer peers.Wait()
	defer stop()
	var mu sync.Mutex
	var sum int64
	for range nodes {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		peer := swarm.NewPeer(ln, slog.New(slog.DiscardHandler))
		peers.Go(func() { _ = peer.Run(ctx) })
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		o := swarm.Options{Trackers: []string{track.URL + wire.PathAnnounce}}
		y := &transport.Policy{Stall: time.Second, Steps: []transport.Step{
			{Name: "bittorrent", Source: swarm.Source(peer, o), From: []transport.Origin{transport.FromServer, transport.FromPeer}},
			{Name: "http", Source: &httpsource.Source{URLs: []string{server.URL + "/"}, Client: http.DefaultClient}, From: []transport.Origin{transport.FromHTTP}},
		}}
		all.Go(func() {
			if err := y.Fetch(ctx, p); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			sum += p.Brought(transport.FromHTTP)
		})
	}
	all.Wait()
	if most := int64(len(content)) * 3 / 2; sum > most {
		t.Errorf("%d bytes came by HTTP, want at most %d", sum, most)
	}
}

// slowly shares a limit.
type slowly struct {
	http.ResponseWriter
	r     *http.Request
	limit *transport.Limiter
}

func (s slowly) Write(b []byte) (int, error) {
	if err := s.limit.Wait(s.r.Context(), len(b)); err != nil {
		return 0, err
	}
	return s.ResponseWriter.Write(b)
}
