package httpd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"

	"rookery/server/fleet"
	"rookery/wire"
)

// A Client speaks the admin API. Its errors are the server's words.
type Client struct{ http http.Client }

// Dial returns a client of the server whose admin API is at a unix socket. It
// connects with each call; the error without a server is the system's (ENOENT,
// ECONNREFUSED).
func Dial(socket string) *Client {
	return &Client{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true, // nothing to close in the end
	}}}
}

// InProcess returns a client of a handler in this process.
func InProcess(admin http.Handler) *Client {
	return &Client{http.Client{Transport: inProcess{admin}}}
}

// Nodes are all nodes by name, then the new machines by MAC address.
func (c *Client) Nodes(ctx context.Context) (all []fleet.View, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/nodes", nil, &all)
	return all, err
}

// Node is one node.
func (c *Client) Node(ctx context.Context, name string) (v fleet.View, err error) {
	err = c.call(ctx, http.MethodGet, nodePath(name), nil, &v)
	return v, err
}

// Put creates or replaces a node's record.
func (c *Client) Put(ctx context.Context, n fleet.Node) error {
	return c.call(ctx, http.MethodPut, nodePath(n.Name), n, nil)
}

// Edit changes the keys of a node's record that are in keys.
func (c *Client) Edit(ctx context.Context, name string, keys map[string]any) error {
	return c.call(ctx, http.MethodPatch, nodePath(name), keys, nil)
}

// Delete forgets a node.
func (c *Client) Delete(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, nodePath(name), nil, nil)
}

// Accept makes a node of a new machine.
func (c *Client) Accept(ctx context.Context, mac string, n fleet.Node) error {
	return c.call(ctx, http.MethodPost, nodePath(mac)+"/accept", n, nil)
}

// Install asks for a new installation of a node.
func (c *Client) Install(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodPost, nodePath(name)+"/install", nil, nil)
}

// Plan is what an installation would do to a node's disk.
func (c *Client) Plan(ctx context.Context, name string) (p fleet.Plan, err error) {
	err = c.call(ctx, http.MethodGet, nodePath(name)+"/plan", nil, &p)
	return p, err
}

// Groups are all groups by name, with the nodes in each.
func (c *Client) Groups(ctx context.Context) (all []fleet.GroupView, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/groups", nil, &all)
	return all, err
}

// DeleteGroup forgets a group that no node is in.
func (c *Client) DeleteGroup(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, "/v1/groups/"+url.PathEscape(name), nil, nil)
}

// Records are the records of a kind and of a name, "" for all, as JSON that is a
// document for Apply, too.
func (c *Client) Records(ctx context.Context, kind, name string) (all []json.RawMessage, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/records?"+url.Values{"kind": {kind}, "name": {name}}.Encode(), nil, &all)
	return all, err
}

// Needed are the versions of images that nodes need, and why.
func (c *Client) Needed(ctx context.Context) (needed []fleet.Need, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/images/needed", nil, &needed)
	return needed, err
}

// Tree has the files of the image with that manifest made ready for rsync.
func (c *Client) Tree(ctx context.Context, manifest wire.Digest) (t wire.Tree, err error) {
	err = c.call(ctx, http.MethodPost, wire.PathTrees+string(manifest), nil, &t)
	return t, err
}

// Apply saves the records of all files, or none; it returns what was changed.
func (c *Client) Apply(ctx context.Context, files ...fleet.File) (done []string, err error) {
	var a applied
	err = c.call(ctx, http.MethodPost, "/v1/apply", files, &a)
	return a.Done, err
}

// Diff says what Apply would change.
func (c *Client) Diff(ctx context.Context, files ...fleet.File) (lines []string, err error) {
	var a applied
	err = c.call(ctx, http.MethodPost, "/v1/diff", files, &a)
	return a.Done, err
}

// Events calls do with each event after number after, of one node or, for "",
// of all; with follow it goes on until ctx ends or the server stops. Its error
// is do's, or the context's, or nil at the end.
func (c *Client) Events(ctx context.Context, node string, after int64, follow bool, do func(fleet.NodeEvent) error) error {
	q := url.Values{"node": {node}, "after": {strconv.FormatInt(after, 10)}}
	if follow {
		q.Set("follow", "1")
	}
	resp, err := c.send(ctx, http.MethodGet, "/v1/events?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for lines := json.NewDecoder(resp.Body); ; {
		var e fleet.NodeEvent
		if err := lines.Decode(&e); errors.Is(err, io.EOF) {
			return ctx.Err()
		} else if err != nil {
			return fmt.Errorf("events: %w", err)
		}
		if err := do(e); err != nil {
			return err
		}
	}
}

func nodePath(name string) string { return "/v1/nodes/" + url.PathEscape(name) }

// call sends in as JSON, or nothing for nil, and decodes the answer into out.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.send(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("%s: answer: %w", path, err)
	}
	return nil
}

// send returns the answer to a request when it is a good one.
func (c *Client) send(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var content io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://rookery"+path, content)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var where *url.Error // the address is made up
		if errors.As(err, &where) {
			err = where.Err
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	var said struct{ Error string }
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&said); err != nil || said.Error == "" {
		said.Error = path + ": " + resp.Status
	}
	return nil, errors.New(said.Error)
}

// inProcess carries requests to a handler, and its answer back as it is written.
type inProcess struct{ handler http.Handler }

func (t inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(r.Context())
	out, in := io.Pipe()
	w := &pipeWriter{header: http.Header{}, pipe: in, begun: make(chan struct{})}
	b := &pipeBody{PipeReader: out, cancel: cancel, ended: make(chan struct{})}
	r = r.Clone(ctx)
	if r.Body == nil {
		r.Body = http.NoBody
	}
	go func() {
		defer close(b.ended)
		t.handler.ServeHTTP(w, r)
		r.Body.Close()
		w.WriteHeader(http.StatusOK)
		in.Close()
	}()
	<-w.begun
	return &http.Response{
		Status: http.StatusText(w.status), StatusCode: w.status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: w.sent, Body: b, ContentLength: -1, Request: r,
	}, nil
}

type pipeWriter struct {
	header, sent http.Header
	status       int
	begun        chan struct{} // closed once sent and status are there
	pipe         *io.PipeWriter
}

func (w *pipeWriter) Header() http.Header { return w.header }

func (w *pipeWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.sent, w.status = w.header.Clone(), status
		close(w.begun)
	}
}

func (w *pipeWriter) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.pipe.Write(b)
}

func (w *pipeWriter) Flush() { w.WriteHeader(http.StatusOK) }

// pipeBody is an answer whose Close ends the handler and waits for it.
type pipeBody struct {
	*io.PipeReader
	cancel context.CancelFunc
	ended  chan struct{}
}

func (b *pipeBody) Close() error {
	b.cancel()
	b.PipeReader.Close()
	<-b.ended
	return nil
}
