package report

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"rookery/wire"
)

// An API is the server's API as an agent sees it.
type API struct {
	base   string
	client *http.Client
	token  atomic.Value // string, of the last Welcome
}

// NewAPI talks to the server at base, "https://192.0.2.1:443". The server must
// show a certificate of the CA (PEM) for wire.ServerName, whatever its address.
// base may be plain http only when there is no CA: in tests.
func NewAPI(base, ca string) (*API, error) {
	transport := &http.Transport{
		TLSHandshakeTimeout: 30 * time.Second, ResponseHeaderTimeout: time.Minute, MaxIdleConns: 2, IdleConnTimeout: 30 * time.Second,
	}
	switch {
	case ca != "":
		if !strings.HasPrefix(base, "https://") {
			return nil, fmt.Errorf("api %s: the site has a CA, want https://", base)
		}
		config, err := TLS(ca)
		if err != nil {
			return nil, err
		}
		transport.TLSClientConfig = config
	case !strings.HasPrefix(base, "http://"):
		return nil, fmt.Errorf("api %s: the site has no CA", base)
	}
	return &API{base: strings.TrimSuffix(base, "/"), client: &http.Client{Transport: transport, Timeout: 2 * time.Minute,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}, nil
}

// TLS trusts the CA (PEM) alone, for wire.ServerName.
func TLS(ca string) (*tls.Config, error) { return tlsConfig(ca, time.Now) }

// tlsConfig trusts the CA alone. A machine without a battery believes it is
// 1970 or 2106: time counts as the nearest one in the CA's validity, so that
// such a clock does not lock the machine out.
func tlsConfig(ca string, now func() time.Time) (*tls.Config, error) {
	block, _ := pem.Decode([]byte(ca))
	if block == nil {
		return nil, errors.New("site: CA is not PEM")
	}
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("site: CA: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	return &tls.Config{
		RootCAs: pool, ServerName: wire.ServerName, MinVersion: tls.VersionTLS12,
		Time: func() time.Time { return clamp(now(), root.NotBefore, root.NotAfter) },
	}, nil
}

func clamp(t, first, last time.Time) time.Time {
	switch {
	case t.Before(first):
		return first
	case t.After(last):
		return last
	}
	return t
}

// Hello says what machine this is and keeps the token of the answer.
func (a *API) Hello(ctx context.Context, hello wire.Hello) (wire.Welcome, error) {
	body, err := a.do(ctx, http.MethodPost, wire.PathHello, hello, wire.MaxHello)
	if err != nil {
		return wire.Welcome{}, err
	}
	welcome, err := wire.DecodeWelcome(body)
	if err != nil {
		return wire.Welcome{}, fmt.Errorf("%s: answer: %w", wire.PathHello, err)
	}
	a.token.Store(welcome.Token)
	return welcome, nil
}

// Script is this machine's install script, in its envelope.
func (a *API) Script(ctx context.Context) ([]byte, error) {
	return a.do(ctx, http.MethodGet, wire.PathScript, nil, wire.MaxScript)
}

// Send gives events to the server; nil means that it has them. ErrRefused is
// in the error when it makes no sense to try again.
func (a *API) Send(ctx context.Context, events []wire.Event) error {
	_, err := a.do(ctx, http.MethodPost, wire.PathEvents, events, 0)
	return err
}

func (a *API) do(ctx context.Context, method, path string, in any, limit int64) ([]byte, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if token, _ := a.token.Load().(string); token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err // names method and URL already
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(io.LimitReader(resp.Body, max(limit, 4<<10)+1))
	if resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s%s: %s: %s", a.base, path, resp.Status, firstLine(out))
		switch resp.StatusCode {
		case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
			err = fmt.Errorf("%w: %w", ErrRefused, err)
		}
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%s%s: %w", a.base, path, err)
	}
	if limit > 0 && int64(len(out)) > limit {
		return nil, fmt.Errorf("%s%s: answer has more than %d bytes", a.base, path, limit)
	}
	return out, nil
}

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return line[:min(len(line), 300)]
}
