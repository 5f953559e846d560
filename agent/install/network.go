package install

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"rookery/transport"
	bulk "rookery/transport/http"
	"rookery/transport/swarm"
	"rookery/wire"
)

// A Site is the network of a Rookery server at Base ("http://192.0.2.1:80").
type Site struct {
	Base   string
	Client *http.Client
	Peer   *swarm.Peer                   // runs; nil: this node takes no part in swarms
	Moved  func(transport.Source, error) // told of each source that is given up, and why
}

// getFor is for the whole of a file, which has a few MiB at the most: a server
// that goes silent in the middle is asked again.
const getFor = time.Minute

// Get fetches a file.
func (s *Site) Get(ctx context.Context, path string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, getFor)
	defer cancel()
	url := strings.TrimSuffix(s.Base, "/") + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.Client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, resp.Status)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes", url, limit)
	}
	return b, nil
}

// Join takes the script's transports in their order.
func (s *Site) Join(p *transport.Pieces, transports []string) (transport.Source, Swarm, error) {
	var sources []transport.Source
	var member Swarm
	for _, name := range transports {
		switch {
		case name == "http":
			sources = append(sources, bulk.New(s.Base, s.Client))
		case name == "bittorrent" && s.Peer != nil:
			options := swarm.Options{Trackers: []string{strings.TrimSuffix(s.Base, "/") + wire.PathAnnounce}}
			torrent := s.Peer.Add(p, options)
			member = joined{torrent, s.Peer}
			sources = append(sources, swarm.Source(s.Peer, options))
		}
	}
	if len(sources) == 0 {
		return nil, nil, fmt.Errorf("none of the transports %s can be used here", strings.Join(transports, ", "))
	}
	first := transport.FirstOf(sources...)
	first.Moved = s.Moved
	return first, member, nil
}

// joined is a swarm that can be left.
type joined struct {
	*swarm.Torrent
	peer *swarm.Peer
}

func (j joined) Leave() { j.peer.Remove(j.Pieces().Info().InfoHash) }
