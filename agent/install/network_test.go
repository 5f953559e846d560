package install_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"rookery/agent/install"
)

// A server may name a node for the file that it is asked for, and nothing else.
func TestNamedNode(t *testing.T) {
	node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/torrents/on" {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
			return
		}
		w.Write([]byte(r.URL.Path))
	}))
	defer node.Close()
	to := ""
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, to, http.StatusTemporaryRedirect)
	}))
	defer server.Close()
	site := install.Site{Base: server.URL, Client: http.DefaultClient}
	for _, tt := range []struct{ path, to, wrong string }{
		{"/torrents/a", node.URL + "/torrents/a", ""},
		{"/torrents/a", node.URL + "/torrents/b", "names"},
		{"/torrents/a", strings.Replace(node.URL, "http:", "https:", 1) + "/torrents/a", "names"},
		{"/torrents/on", node.URL + "/torrents/on", "names"},
	} {
		to = tt.to
		b, err := site.Get(t.Context(), tt.path, 100)
		switch {
		case tt.wrong == "" && (err != nil || string(b) != tt.path):
			t.Errorf("%s: %q, %v", tt.to, b, err)
		case tt.wrong != "" && (!errors.Is(err, install.ErrElsewhere) || !strings.Contains(err.Error(), tt.wrong)):
			t.Errorf("%s: %q, %v; want an error with %q", tt.to, b, err, tt.wrong)
		}
	}
}

// A named node that does not answer is not waited for as a server is.
func TestNamedNodeIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		end := make(chan struct{})
		defer close(end)
		client := &http.Client{Transport: &http.Transport{DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			if !strings.HasPrefix(addr, "server") {
				<-end // the client goes on without
				return nil, errors.New("no route to host")
			}
			here, there := net.Pipe()
			go func() {
				defer there.Close()
				if _, err := there.Read(make([]byte, 4096)); err != nil {
					return
				}
				there.Write([]byte("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://node/torrents/a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"))
			}()
			return here, nil
		}}}
		begin := time.Now()
		_, err := (&install.Site{Base: "http://server", Client: client}).Get(t.Context(), "/torrents/a", 100)
		if took := time.Since(begin); !errors.Is(err, install.ErrElsewhere) || took != 3*time.Second || !strings.Contains(err.Error(), "nothing in 3s") {
			t.Errorf("%v after %s, want an error after 3s", err, took)
		}
	})
}
