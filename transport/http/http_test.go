package http_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"rookery/transport"
	httpsource "rookery/transport/http"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// serve answers ranges of content and counts the bytes it was asked for.
func serve(t *testing.T, info transport.Info, content []byte) *httptest.Server {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != wire.PathLayers+string(info.Layer) {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}))
	t.Cleanup(server.Close)
	return server
}

func TestSource(t *testing.T) {
	transporttest.Run(t, func(t *testing.T, info transport.Info, content []byte) transport.Source {
		server := serve(t, info, content)
		return httpsource.New(server.URL+"/", server.Client())
	})
}

func TestPreferredPiecesComeFirst(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 40*64<<10)
	server := serve(t, info, content)
	p := transport.NewPieces(info, transporttest.NewMemory(nil))
	p.Prefer(30*64<<10, 1)
	if err := httpsource.New(server.URL, server.Client()).Fetch(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	for n := range p.Completed(t.Context()) {
		if n != 30 {
			t.Fatalf("piece %d came first, want 30", n)
		}
		break
	}
}

func TestAnswersThatAreNotTheRange(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 100_000)
	for name, answer := range map[string]http.HandlerFunc{
		"no such layer": http.NotFound,
		"the whole layer": func(w http.ResponseWriter, r *http.Request) {
			w.Write(content)
		},
		"another range": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 1-100000/100000")
			w.WriteHeader(http.StatusPartialContent)
		},
		"of another layer": func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, "", time.Time{}, strings.NewReader(strings.Repeat("x", 200_000)))
		},
		"less than promised": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 0-99999/100000")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[:70_000])
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(answer)
			defer server.Close()
			p := transport.NewPieces(info, transporttest.NewMemory(nil))
			err := httpsource.New(server.URL, server.Client()).Fetch(t.Context(), p)
			if err == nil || !strings.Contains(err.Error(), wire.PathLayers) {
				t.Fatalf("Fetch: %v, want an error that names the layer", err)
			}
			for n := range info.Hashes { // no claim is left behind
				if !p.Has(n) {
					if got, ok := p.Claim(func(i int) (int64, bool) { return 0, i == n }); !ok || got != n {
						t.Errorf("piece %d stays claimed", n)
					}
				}
			}
		})
	}
}

func TestGoesOnWhenTheServerIsBack(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 40*64<<10)
	var calls, bytesAsked atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if calls.Add(1) == 1 { // dies in the middle
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(content)-1, len(content)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[:len(content)/2])
			return
		}
		var from, to int64
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to)
		bytesAsked.Add(to - from + 1)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}))
	defer server.Close()
	store := transporttest.NewMemory(nil)
	p := transport.NewPieces(info, store)
	src := transport.FirstOf(httpsource.New(server.URL, server.Client()))
	if err := src.Fetch(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(store.Bytes(), content) {
		t.Fatal("not the layer")
	}
	if got, want := bytesAsked.Load(), int64(len(content)/2); got != want {
		t.Fatalf("asked for %d bytes again, want %d", got, want)
	}
}
