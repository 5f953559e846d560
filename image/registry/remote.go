// Package registry keeps images in OCI registries, takes images from wherever
// other tools keep theirs, and writes images that other tools read. It is about
// containers only as far as that: layers, configs and the formats around them.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"rookery/image/store"
	"rookery/wire"
)

// Options say how registries are spoken to.
type Options struct {
	// Insecure allows plain HTTP where the registry is not this machine itself.
	Insecure bool
}

func (o Options) names() []name.Option {
	if o.Insecure {
		return []name.Option{name.Insecure}
	}
	return nil
}

// A client speaks to registries, with what docker login or podman login left.
type client struct {
	plain  http.RoundTripper
	puller *remote.Puller

	mu    sync.Mutex
	repos map[string]*http.Client
}

func newClient(o Options) (*client, error) {
	c := &client{plain: onlyTLS{o.Insecure}, repos: make(map[string]*http.Client)}
	var err error
	c.puller, err = remote.NewPuller(c.options()...)
	return c, err
}

func (c *client) options() []remote.Option {
	return []remote.Option{remote.WithTransport(c.plain), remote.WithAuthFromKeychain(authn.DefaultKeychain)}
}

// onlyTLS keeps the library from trying plain HTTP on private addresses, where
// whoever is in between would be given the images and the password.
type onlyTLS struct{ insecure bool }

func (t onlyTLS) RoundTrip(r *http.Request) (*http.Response, error) {
	host := r.URL.Hostname()
	if r.URL.Scheme != "https" && !t.insecure && host != "localhost" && !net.ParseIP(host).IsLoopback() {
		return nil, fmt.Errorf("%s is not asked in plain HTTP", r.URL.Host)
	}
	return remote.DefaultTransport.RoundTrip(r)
}

// repo is what reads a repository's blobs.
func (c *client) repo(ctx context.Context, r name.Repository) (*http.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.repos[r.Name()]; h != nil {
		return h, nil
	}
	auth, err := authn.Resolve(ctx, authn.DefaultKeychain, r)
	if err != nil {
		return nil, err
	}
	t, err := transport.NewWithContext(ctx, r.Registry, auth, transport.NewRetry(c.plain), []string{r.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	h := &http.Client{Transport: t}
	c.repos[r.Name()] = h
	return h, nil
}

// open opens a blob that is no manifest.
func (c *client) open(ctx context.Context, r name.Repository, d wire.Digest) (*blob, error) {
	h, err := c.repo(ctx, r)
	if err != nil {
		return nil, said(r, err)
	}
	u := url.URL{Scheme: r.Scheme(), Host: r.RegistryStr(), Path: "/v2/" + r.RepositoryStr() + "/blobs/" + string(d)}
	b := &blob{ctx: ctx, http: h, repo: r, url: u.String()}
	resp, err := b.ask(http.MethodHead, "", http.StatusOK)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	if b.size = resp.ContentLength; b.size < 0 {
		return nil, said(r, fmt.Errorf("HEAD %s: does not say how long it is", b.url))
	}
	return b, nil
}

// A blob is read in ranges, but by one request as long as it is read onward.
type blob struct {
	ctx  context.Context
	http *http.Client
	repo name.Repository
	url  string
	size int64

	mu     sync.Mutex
	onward *section // nil: none
	end    int64    // of what was read last
}

func (b *blob) Size() int64 { return b.size }

func (b *blob) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.drop()
	return nil
}

func (b *blob) ask(method, bytes string, want ...int) (*http.Response, error) {
	req, err := http.NewRequestWithContext(b.ctx, method, b.url, nil)
	if err != nil {
		return nil, said(b.repo, err)
	}
	if bytes != "" {
		req.Header.Set("Range", bytes)
	}
	resp, err := b.http.Do(req)
	if err != nil {
		return nil, said(b.repo, err)
	}
	if err := transport.CheckError(resp, want...); err != nil {
		resp.Body.Close()
		return nil, said(b.repo, err)
	}
	return resp, nil
}

// get asks for what lies between two places.
func (b *blob) get(at, end int64) (io.ReadCloser, error) {
	if at == 0 && end == b.size {
		resp, err := b.ask(http.MethodGet, "", http.StatusOK)
		if err != nil {
			return nil, err
		}
		return resp.Body, nil
	}
	resp, err := b.ask(http.MethodGet, fmt.Sprintf("bytes=%d-%d", at, end-1), http.StatusOK, http.StatusPartialContent)
	if err != nil {
		return nil, err
	}
	want := fmt.Sprintf("bytes %d-%d/", at, end-1)
	if got := resp.Header.Get("Content-Range"); resp.StatusCode != http.StatusPartialContent || !strings.HasPrefix(got, want) {
		resp.Body.Close()
		return nil, said(b.repo, fmt.Errorf("GET %s: asked for %s, got HTTP %d %q: it knows no ranges", b.url, want, resp.StatusCode, got))
	}
	return resp.Body, nil
}

func (b *blob) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d", off)
	}
	end := min(off+int64(len(p)), b.size)
	if off >= end {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	r, onward := &section{b: b, at: off, end: end}, false
	if b.mu.TryLock() {
		defer b.mu.Unlock()
		if off == b.end {
			if b.onward == nil || b.onward.at != off {
				b.drop()
				b.onward = &section{b: b, at: off, end: b.size}
			}
			r, onward = b.onward, true
		}
		b.end = end
	}
	n, err := io.ReadFull(r, p[:end-off])
	switch {
	case !onward:
		r.Close()
	case err != nil:
		b.drop()
	}
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// drop ends what was read onward. The mutex is held.
func (b *blob) drop() {
	if b.onward != nil {
		b.onward.Close()
	}
	b.onward = nil
}

// breaks is how often in steady a connection may break before it is an error.
const (
	breaks = 3
	steady = 16 << 20 // bytes
)

// A section is a part of a blob. Where the connection breaks it asks for the rest.
type section struct {
	b       *blob
	at, end int64
	body    io.ReadCloser
	since   int64 // where body began
	broken  int
}

func (s *section) Read(p []byte) (int, error) {
	if s.at == s.end {
		return 0, io.EOF
	}
	if s.body == nil {
		var err error
		if s.body, err = s.b.get(s.at, s.end); err != nil {
			return 0, err
		}
		s.since = s.at
	}
	n, err := s.body.Read(p[:min(int64(len(p)), s.end-s.at)])
	s.at += int64(n)
	if err == nil || s.at == s.end {
		return n, nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	s.Close()
	if s.at-s.since >= steady {
		s.broken = 0
	}
	if s.broken++; s.broken < breaks && s.b.ctx.Err() == nil {
		return n, nil
	}
	return n, said(s.b.repo, fmt.Errorf("GET %s: at %d of %d: %w", s.b.url, s.at, s.b.size, err))
}

func (s *section) Close() error {
	if s.body == nil {
		return nil
	}
	err := s.body.Close()
	s.body = nil
	return err
}

// said names the repository, the HTTP status, and what is not there.
func said(where fmt.Stringer, err error) error {
	if err == nil {
		return nil
	}
	var t *transport.Error
	if !errors.As(err, &t) {
		return fmt.Errorf("registry: %s: %w", where, err)
	}
	if t.StatusCode == http.StatusNotFound {
		return fmt.Errorf("registry: %s: HTTP 404: %w: %w", where, store.ErrNotFound, err)
	}
	return fmt.Errorf("registry: %s: HTTP %d: %w", where, t.StatusCode, err)
}
