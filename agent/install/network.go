package install

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"rookery/transport"
	bulk "rookery/transport/http"
	"rookery/transport/multicast"
	"rookery/transport/swarm"
	"rookery/wire"
)

// A Site is the network of a Rookery server at Base ("http://192.0.2.1:80").
type Site struct {
	Base     string
	Client   *http.Client
	Peer     *swarm.Peer        // runs; nil: this node takes no part in swarms
	Groups   *wire.Multicast    // what the server sends there; nil: nothing
	Mirrors  []string           // URLs of layers without their digest, besides the server's own
	Download *transport.Limiter // of what comes by HTTP
	Switched func(text string)  // told how layers come from now on, and why; may be nil
}

// getFor is for the whole of a file, which has a few MiB at the most: a server
// that goes silent in the middle is asked again.
const getFor = time.Minute

// Get fetches a file.
func (s *Site) Get(ctx context.Context, path string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, getFor)
	defer cancel()
	where := s.url(path)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, where, nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.Client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", where, resp.Status)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes", where, limit)
	}
	return b, nil
}

// Join takes the script's transports in their order.
func (s *Site) Join(p *transport.Pieces, transports []string) (transport.Source, Swarm, error) {
	tell := func(text string) {
		if s.Switched != nil {
			s.Switched(fmt.Sprintf("%s (layer %.12s)", text, p.Info().Layer.Hex()))
		}
	}
	policy := &transport.Policy{Switched: tell}
	var member Swarm
	for _, name := range transports {
		switch {
		case name == "http":
			policy.Steps = append(policy.Steps, transport.Step{
				Name: name, From: []transport.Origin{transport.FromHTTP},
				Source: &bulk.Source{
					URLs: append([]string{s.url(wire.PathLayers)}, s.Mirrors...), Client: s.Client, Limit: s.Download,
					Moved: func(err error) { tell(fmt.Sprintf("http goes on elsewhere: %v", err)) },
				},
			})
		case name == "multicast" && s.Groups != nil:
			policy.Steps = append(policy.Steps, transport.Step{
				Name: name, From: []transport.Origin{transport.FromMulticast},
				Source: &multicast.Source{
					Config: *s.Groups, Wants: s.url(wire.PathMulticast), Client: s.Client, Via: s.via(),
					Alone: s.Peer == nil || !slices.Contains(transports, "bittorrent"),
				},
			})
		case name == "bittorrent" && s.Peer != nil:
			options := swarm.Options{Trackers: []string{s.url(wire.PathAnnounce)}}
			torrent := s.Peer.Add(p, options)
			member = joined{torrent, s.Peer}
			policy.Steps = append(policy.Steps, transport.Step{
				Name: name, From: []transport.Origin{transport.FromServer, transport.FromPeer},
				Source: swarm.Source(s.Peer, options),
			})
		}
	}
	if len(policy.Steps) == 0 {
		return nil, nil, fmt.Errorf("none of the transports %s can be used here", strings.Join(transports, ", "))
	}
	return policy, member, nil
}

// via names the interface by which the server is reached; "" when that cannot be
// told from its URL.
func (s *Site) via() string {
	base, err := url.Parse(s.Base)
	if err != nil {
		return ""
	}
	addr, err := netip.ParseAddr(base.Hostname())
	if err != nil {
		return ""
	}
	card, err := multicast.Via(addr)
	if err != nil {
		return ""
	}
	return card.Name
}

func (s *Site) url(path string) string { return strings.TrimSuffix(s.Base, "/") + path }

// joined is a swarm that can be left.
type joined struct {
	*swarm.Torrent
	peer *swarm.Peer
}

func (j joined) Leave() { j.peer.Remove(j.Pieces().Info().InfoHash) }
