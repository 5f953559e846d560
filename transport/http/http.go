// Package http fills in the pieces of a layer by HTTP ranges: from Rookery
// servers, OCI registries, and whoever else has the file.
package http

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	neturl "net/url"
	"time"

	"rookery/transport"
)

const (
	// aloneRun is how much one request asks for when nobody else brings pieces:
	// long enough that the round trip does not count.
	aloneRun = 16 << 20
	// besideRun is the same beside a swarm, where besideShare of the layer is
	// the most: what others ask for meanwhile is not to be asked for twice.
	besideRun   = 2 << 20
	besideShare = 256
	// portion is read at a time, so that a limit is shared fairly.
	portion = 64 << 10
)

var errSilent = errors.New("no byte")

// A Source asks one of several URLs at a time, and the next when that one fails
// or falls silent. It begins with any of them, so that many nodes share them.
type Source struct {
	// URLs are of the layer without its digest: "http://192.0.2.1/layers/" of
	// a Rookery server, "http://192.0.2.2:5000/v2/NAME/blobs/" of a registry.
	URLs   []string
	Client *http.Client // without a timeout for the whole
	Limit  *transport.Limiter
	Silent time.Duration // without a byte: a URL has failed (0: 15 s)
	Moved  func(error)   // told why a URL was left for the next; may be nil
}

func (s *Source) String() string { return "http" }

// Fetch fails when all URLs did, one after the other. What has arrived by then
// is kept.
func (s *Source) Fetch(ctx context.Context, p *transport.Pieces) error {
	var errs []error
	for at := rand.IntN(len(s.URLs)); ; {
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
		before := p.Brought(transport.FromHTTP)
		err := s.run(ctx, s.URLs[at]+string(p.Info().Layer), p, first, end)
		if p.Brought(transport.FromHTTP) > before {
			errs = nil
		}
		switch {
		case err == nil:
			continue
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, transport.ErrStorage):
			return err
		}
		at = (at + 1) % len(s.URLs)
		if errs = append(errs, err); len(errs) >= len(s.URLs) {
			return errors.Join(errs...)
		}
		if s.Moved != nil {
			s.Moved(err)
		}
	}
}

// claim takes the pieces [first, end), which follow each other. Beside a swarm
// they are of those that the fewest peers have, at a place that other nodes
// hardly choose, too.
func claim(p *transport.Pieces) (first, end int) {
	info, copies := p.Info(), p.Copies()
	rank, run := func(n int) (int64, bool) { return int64(n), true }, int64(aloneRun)
	if copies != nil {
		rank = func(n int) (int64, bool) { return int64(copies[n])<<32 | int64(rand.Uint32()), true }
		run = min(besideRun, info.Length/besideShare)
	}
	first, ok := p.Claim(rank)
	if !ok {
		return 0, 0
	}
	limit := min(first+int(max(1, run/info.PieceLength)), len(info.Hashes))
	for end = first + 1; end < limit; end++ {
		if copies != nil && copies[end] > copies[first] {
			break
		}
		if _, ok := p.Claim(func(n int) (int64, bool) { return 0, n == end }); !ok {
			break
		}
	}
	return first, end
}

// run fetches the claimed pieces [first, end) with one request.
func (s *Source) run(ctx context.Context, url string, p *transport.Pieces, first, end int) (err error) {
	defer func() {
		for ; first < end; first++ {
			p.Release(first)
		}
	}()
	silent := cmp.Or(s.Silent, 15*time.Second)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(silent, func() { cancel(errSilent) })
	defer timer.Stop()
	defer func() {
		if err != nil && context.Cause(ctx) == errSilent {
			err = fmt.Errorf("%s: %w for %s", url, errSilent, silent)
		}
	}()
	info := p.Info()
	from := int64(first) * info.PieceLength
	to := min(int64(end)*info.PieceLength, info.Length) - 1
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, to))
	resp, err := s.Client.Do(req)
	if err != nil {
		if e := (*neturl.Error)(nil); errors.As(err, &e) {
			err = e.Err // where it was sent last, which may be a path alone
		}
		return fmt.Errorf("%s: %w", url, err)
	}
	defer resp.Body.Close()
	want := fmt.Sprintf("bytes %d-%d/%d", from, to, info.Length)
	switch got := resp.Header.Get("Content-Range"); {
	case resp.StatusCode == http.StatusOK:
		return fmt.Errorf("%s: gives the whole file when asked for a range", url)
	case resp.StatusCode != http.StatusPartialContent:
		return fmt.Errorf("%s: %s", url, resp.Status)
	case got != want:
		return fmt.Errorf("%s: range %.80q, want %q", url, got, want)
	}
	buf := make([]byte, info.PieceLength)
	for ; first < end; first++ {
		if p.Has(first) { // found elsewhere meanwhile, and perhaps more after it
			return nil
		}
		piece := buf[:info.PieceSize(first)]
		for done := 0; done < len(piece); {
			timer.Reset(silent)
			n, err := resp.Body.Read(piece[done:min(done+portion, len(piece))])
			timer.Stop()
			p.Received(n) // so that a slow piece does not look like silence
			if done += n; err != nil && done < len(piece) {
				return fmt.Errorf("%s: piece %d: %d of %d bytes: %w", url, first, done, len(piece), err)
			}
			if err := s.Limit.Wait(ctx, n); err != nil {
				return err
			}
		}
		if err := p.Put(first, piece, transport.FromHTTP); err != nil {
			return fmt.Errorf("%s: %w", url, err)
		}
	}
	return nil
}
