// Package http fills in the pieces of a layer by HTTP ranges from a server.
package http

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"rookery/transport"
	"rookery/wire"
)

// maxRun is how much one request asks for: long enough that the round trip
// does not count, short enough to leave work for other sources.
const maxRun = 16 << 20

type source struct {
	base   string
	client *http.Client
}

// New is the source at baseURL ("http://10.0.0.1:80"). Any error of the server
// or the connection ends its Fetch; what has arrived by then is kept. A client
// without a timeout is right: transport.FirstOf notices silence.
func New(baseURL string, client *http.Client) transport.Source {
	return &source{base: strings.TrimRight(baseURL, "/"), client: client}
}

func (s *source) String() string { return "http" }

func (s *source) Fetch(ctx context.Context, p *transport.Pieces) error {
	for {
		select {
		case <-p.Done():
			return nil
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
		_, more := p.Since(0)
		first, end := claim(p)
		if first == end {
			// Another source has the rest in hand, and may give it up again;
			// or it is not known yet what else is wanted.
			timer := time.NewTimer(time.Second)
			select {
			case <-p.Done():
			case <-more:
			case <-ctx.Done():
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		if err := s.run(ctx, p, first, end); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
	}
}

// claim takes the pieces [first, end), which follow each other.
func claim(p *transport.Pieces) (first, end int) {
	first, ok := p.Claim(func(n int) (int64, bool) { return int64(n), true })
	if !ok {
		return 0, 0
	}
	limit := first + int(max(1, maxRun/p.Info().PieceLength))
	for end = first + 1; end < limit; end++ {
		if _, ok := p.Claim(func(n int) (int64, bool) { return 0, n == end }); !ok {
			break
		}
	}
	return first, end
}

// run fetches the claimed pieces [first, end) with one request.
func (s *source) run(ctx context.Context, p *transport.Pieces, first, end int) error {
	defer func() {
		for ; first < end; first++ {
			p.Release(first)
		}
	}()
	info := p.Info()
	from := int64(first) * info.PieceLength
	to := min(int64(end)*info.PieceLength, info.Length) - 1
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.base+wire.PathLayers+string(info.Layer), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, to))
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	want := fmt.Sprintf("bytes %d-%d/%d", from, to, info.Length)
	if got := resp.Header.Get("Content-Range"); resp.StatusCode != http.StatusPartialContent || got != want {
		return fmt.Errorf("%s: %s, range %.80q, want %q", req.URL, resp.Status, got, want)
	}
	buf := make([]byte, info.PieceLength)
	for ; first < end; first++ {
		piece := buf[:info.PieceSize(first)]
		if _, err := io.ReadFull(counted{resp.Body, p}, piece); err != nil {
			return fmt.Errorf("%s: piece %d: %w", req.URL, first, err)
		}
		if err := p.Put(first, piece, transport.FromServer); err != nil {
			return fmt.Errorf("%s: %w", req.URL, err)
		}
	}
	return nil
}

// counted tells p of every byte, so that a slow piece does not look like silence.
type counted struct {
	r io.Reader
	p *transport.Pieces
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.p.Received(n)
	return n, err
}
