package install

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"rookery/transport"
	bulk "rookery/transport/http"
	"rookery/transport/multicast"
	"rookery/transport/rsync"
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
	TLS      *tls.Config        // that trusts the server for files; nil: they do not come over TLS
	SSH      ssh.PublicKey      // the authority of its host keys, for files; nil: they do not come by ssh
}

// getFor is for the whole of a file, which has a few MiB at the most: a server
// that goes silent in the middle is asked again.
const getFor = time.Minute

// Get fetches a file.
func (s *Site) Get(ctx context.Context, path string, limit int64) ([]byte, error) {
	return s.do(ctx, http.MethodGet, path, limit)
}

// Hear fetches a file that the server sends to a group.
func (s *Site) Hear(ctx context.Context, file wire.Digest, limit int64) ([]byte, error) {
	if s.Groups == nil {
		return nil, multicast.ErrNotSent
	}
	b, err := s.group(true).File(ctx, file, limit)
	if err != nil && !errors.Is(err, multicast.ErrNotSent) {
		err = fmt.Errorf("%w: %w", ErrElsewhere, err)
	}
	return b, err
}

// group is what the server sends; alone is whether nobody else fills holes.
func (s *Site) group(alone bool) *multicast.Source {
	return &multicast.Source{Config: *s.Groups, Wants: s.url(wire.PathMulticast), Client: s.Client, Via: s.via(), Alone: alone}
}

// namedFor is how long a node has for a file that the server says it has.
const namedFor = 3 * time.Second

// mayName says whether a server may name a node, once, for the file it was asked for.
func mayName(node *http.Request, via []*http.Request) error {
	if asked := via[0]; len(via) > 1 || node.Method != http.MethodGet || node.URL.Scheme != "http" || node.URL.Path != asked.URL.Path {
		return fmt.Errorf("%s names %s", via[len(via)-1].URL, node.URL)
	}
	return nil
}

func (s *Site) do(ctx context.Context, method, path string, limit int64) (b []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, getFor)
	defer cancel()
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	where := s.url(path)
	req, err := http.NewRequestWithContext(ctx, method, where, nil)
	if err != nil {
		return nil, err
	}
	var named *time.Timer // a node, which has less time than a server
	client := *s.Client
	client.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		if named == nil {
			named = time.AfterFunc(namedFor, func() { giveUp(fmt.Errorf("nothing in %s", namedFor)) })
		}
		return mayName(req, via)
	}
	defer func() {
		if named == nil {
			return
		}
		named.Stop()
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrElsewhere, err)
		}
	}()
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err = io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	if resp.StatusCode != http.StatusOK {
		var said struct{ Error string }
		if json.Unmarshal(b, &said) == nil && said.Error != "" {
			return nil, fmt.Errorf("%s: %s: %.500s", where, resp.Status, said.Error)
		}
		return nil, fmt.Errorf("%s: %s", where, resp.Status)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes", where, limit)
	}
	return b, nil
}

// Join takes the script's transports in their order. The index comes by HTTP
// where the files come by rsync.
func (s *Site) Join(p *transport.Pieces, transports []string, patience time.Duration) (transport.Source, Swarm, error) {
	tell := func(text string) {
		if s.Switched != nil {
			s.Switched(fmt.Sprintf("%s (layer %.12s)", text, p.Info().Layer.Hex()))
		}
	}
	policy := &transport.Policy{Switched: tell, Patience: patience}
	var member Swarm
	for _, name := range transports {
		switch {
		case name == "http", name == byFiles:
			policy.Steps = append(policy.Steps, transport.Step{
				Name: "http", From: []transport.Origin{transport.FromHTTP},
				Source: &bulk.Source{
					URLs: append([]string{s.url(wire.PathLayers)}, s.Mirrors...), Client: s.Client, Limit: s.Download,
					Moved: func(err error) { tell(fmt.Sprintf("http goes on elsewhere: %v", err)) },
				},
			})
		case name == "multicast" && s.Groups != nil:
			policy.Steps = append(policy.Steps, transport.Step{
				Name: name, From: []transport.Origin{transport.FromMulticast},
				Source: s.group(s.Peer == nil || !slices.Contains(transports, "bittorrent")),
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

// Files fetches them by ssh where both sides can, else over TLS, else plainly.
func (s *Site) Files(ctx context.Context, manifest wire.Digest, job rsync.Job) error {
	tree, err := s.tree(ctx, manifest)
	if err != nil {
		return err
	}
	base, err := url.Parse(s.Base)
	if err != nil {
		return err
	}
	port, dial := tree.Port, (&net.Dialer{}).DialContext
	switch {
	case s.SSH != nil && tree.SSHPort != 0:
		port, dial = tree.SSHPort, s.dialSSH
	case s.TLS != nil && tree.TLSPort != 0:
		port, dial = tree.TLSPort, (&tls.Dialer{Config: s.TLS}).DialContext
	case port == 0:
		return fmt.Errorf("%s: files: no port that this node can use: plain %d, TLS %d (authority: %t), ssh %d (authority: %t)",
			s.Base, tree.Port, tree.TLSPort, s.TLS != nil, tree.SSHPort, s.SSH != nil)
	}
	job.Module, job.Limit = tree.Module, s.Download
	job.Dial = func(ctx context.Context) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, dialFor)
		defer cancel()
		return dial(ctx, "tcp", net.JoinHostPort(base.Hostname(), strconv.Itoa(port)))
	}
	return rsync.Run(ctx, job)
}

// dialFor is for a connection, with the handshakes of TCP, and of TLS or ssh.
const dialFor = 20 * time.Second

func (s *Site) dialSSH(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return rsync.SSH(ctx, conn, s.SSH)
}

// madeFor is how long the server may make files ready without getting on.
const madeFor = 2 * time.Minute

// tree asks the server for the image's files until it has made them.
func (s *Site) tree(ctx context.Context, manifest wire.Digest) (wire.Tree, error) {
	done, alive := int64(-1), time.Now()
	for {
		b, err := s.do(ctx, http.MethodPost, wire.PathTrees+string(manifest), 64<<10)
		if err != nil {
			return wire.Tree{}, err
		}
		tree, err := wire.DecodeTree(b)
		if err != nil || tree.Module != "" {
			return tree, err
		}
		if tree.Done != done {
			done, alive = tree.Done, time.Now()
		}
		if time.Since(alive) >= madeFor {
			return tree, fmt.Errorf("the server makes the files ready and is at %d of %d bytes for %s", tree.Done, tree.Total, madeFor)
		}
		select {
		case <-time.After(time.Second / 2):
		case <-ctx.Done():
			return tree, context.Cause(ctx)
		}
	}
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
