package http_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"rookery/image/registry/registrytest"
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

func source(servers ...*httptest.Server) *httpsource.Source {
	s := &httpsource.Source{Client: http.DefaultClient}
	for _, server := range servers {
		s.URLs = append(s.URLs, server.URL+wire.PathLayers)
	}
	return s
}

func TestSource(t *testing.T) {
	transporttest.Run(t, func(t *testing.T, info transport.Info, content []byte) transport.Source {
		server := serve(t, info, content)
		return source(server)
	})
}

func TestPreferredPiecesComeFirst(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 40*64<<10)
	server := serve(t, info, content)
	p := transport.NewPieces(info, transporttest.NewMemory(nil))
	p.Prefer(30*64<<10, 1)
	if err := source(server).Fetch(t.Context(), p); err != nil {
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
			err := source(server).Fetch(t.Context(), p)
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
	src := &transport.Policy{Steps: []transport.Step{{Name: "http", Source: source(server), From: []transport.Origin{transport.FromHTTP}}}}
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

// One of two servers has a fault; the layer comes all the same, and the error
// says which one it was.
func TestTheNextURL(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 40*64<<10)
	whole := func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		says   string
	}{
		"no such layer":  {http.NotFound, "404 Not Found"},
		"busy":           {func(w http.ResponseWriter, r *http.Request) { http.Error(w, "later", http.StatusServiceUnavailable) }, "503 Service Unavailable"},
		"ignores ranges": {func(w http.ResponseWriter, r *http.Request) { w.Write(content) }, "gives the whole file when asked for a range"},
		"wrong range": {func(w http.ResponseWriter, r *http.Request) {
			r.Header.Set("Range", "bytes=1-9")
			whole(w, r)
		}, `range "bytes 1-9/2621440", want "bytes `},
		"cut off": {func(w http.ResponseWriter, r *http.Request) {
			whole(&cutter{w, 100_000}, r)
		}, "piece 1: 34464 of 65536 bytes: "},
		"wrong bytes": {func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(make([]byte, len(content))))
		}, "piece 0: piece hash differs"},
		"silent": {func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
		}, "no byte for 1s"},
		"round in circles": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		}, "stopped after 10 redirects"},
	} {
		t.Run(name, func(t *testing.T) {
			bad, good := httptest.NewServer(tt.answer), serve(t, info, content)
			defer bad.Close()
			for range 100 { // it begins with either
				store := transporttest.NewMemory(nil)
				src, left := source(bad, good), ""
				if name == "silent" {
					src.Silent = time.Second
				}
				src.Moved = func(err error) { left = err.Error() }
				if err := src.Fetch(t.Context(), transport.NewPieces(info, store)); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(store.Bytes(), content) {
					t.Fatal("not the layer")
				}
				if left != "" {
					if !strings.Contains(left, bad.URL) || !strings.Contains(left, tt.says) {
						t.Errorf("left for the next because %q, want %q", left, tt.says)
					}
					return
				}
			}
			t.Error("100 times it began with the other")
		})
	}
}

// cutter ends the connection after so many bytes.
type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b[:min(len(b), c.left)])
	if c.left -= n; c.left == 0 {
		c.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

func TestAllURLsFail(t *testing.T) {
	_, info := transporttest.Layer(t, 1, 100_000)
	one, two := httptest.NewServer(http.HandlerFunc(http.NotFound)), httptest.NewServer(http.HandlerFunc(http.NotFound))
	defer one.Close()
	defer two.Close()
	err := source(one, two).Fetch(t.Context(), transport.NewPieces(info, transporttest.NewMemory(nil)))
	if err == nil || !strings.Contains(err.Error(), one.URL) || !strings.Contains(err.Error(), two.URL) {
		t.Errorf("Fetch: %v, want both URLs named", err)
	}
}

// Registries often send their clients elsewhere for the bytes.
func TestRedirect(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 40*64<<10)
	store := serve(t, info, content)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, store.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	defer front.Close()
	if err := source(front).Fetch(t.Context(), transport.NewPieces(info, transporttest.NewMemory(nil))); err != nil {
		t.Fatal(err)
	}
}

func TestRegistry(t *testing.T) {
	host := registrytest.Start(t, registrytest.Options{}).Host
	transporttest.Run(t, func(t *testing.T, info transport.Info, content []byte) transport.Source {
		// The bytes under their own digest; where they are wrong, no registry
		// takes them under the layer's.
		digest := wire.DigestOf(content)
		resp, err := http.Post("http://"+host+"/v2/rookery/tiny/blobs/uploads/", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		req, err := http.NewRequest(http.MethodPut, resp.Header.Get("Location")+"&digest="+string(digest), bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		if resp, err = http.DefaultClient.Do(req); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusCreated {
			t.Fatalf("upload: %s", resp.Status)
		}
		return &httpsource.Source{Client: http.DefaultClient, URLs: []string{"http://" + host + "/v2/rookery/tiny/blobs/"}}
	})
}

// Beside a swarm: what no peer has first, in short runs, each time elsewhere.
func TestBesideASwarm(t *testing.T) {
	const pieces, run = 160, 1 // of 64 KiB; a 256th of the layer is less than one
	content, info := transporttest.Layer(t, 1, pieces*64<<10)
	var mu sync.Mutex
	var ranges [][2]int
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var from, to int
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to)
		mu.Lock()
		ranges = append(ranges, [2]int{from >> 16, (to + 1) >> 16})
		mu.Unlock()
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}))
	defer server.Close()
	starts := map[int]bool{}
	for range 8 {
		ranges = nil
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		p.SetCopies(func() []int32 { // the first half has been seen
			copies := make([]int32, pieces)
			for n := range pieces / 2 {
				copies[n] = 3
			}
			return copies
		})
		if err := source(server).Fetch(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		rare := 0
		for _, r := range ranges {
			if r[1]-r[0] > run {
				t.Errorf("%d pieces in one run, want at most %d", r[1]-r[0], run)
			}
			if rare < pieces/2 && r[0] < pieces/2 {
				t.Errorf("pieces %v were asked for after %d of those that nobody has", r, rare)
			}
			rare += max(0, r[1]-max(r[0], pieces/2))
		}
		starts[ranges[0][0]] = true
	}
	if len(starts) < 5 {
		t.Errorf("8 nodes begin at %d places", len(starts))
	}

	ranges = nil
	if err := source(server).Fetch(t.Context(), transport.NewPieces(info, transporttest.NewMemory(nil))); err != nil {
		t.Fatal(err)
	}
	if len(ranges) != 1 || ranges[0] != [2]int{0, pieces} {
		t.Errorf("alone it asks for %v, want all in one", ranges)
	}
}

func TestLimit(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 1<<20)
	src, begin := source(serve(t, info, content)), time.Now()
	src.Limit = transport.NewLimiter(4 << 20)
	if err := src.Fetch(t.Context(), transport.NewPieces(info, transporttest.NewMemory(nil))); err != nil {
		t.Fatal(err)
	}
	if took, least := time.Since(begin), 230*time.Millisecond; took < least { // 64 KiB are free
		t.Errorf("took %s, want at least %s", took, least)
	}
}
