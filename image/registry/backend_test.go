package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"

	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/oci"
	"rookery/image/registry"
	"rookery/image/registry/registrytest"
	"rookery/image/store"
	"rookery/image/store/storetest"
	"rookery/wire"
)

func open(t *testing.T, place string) *store.Store {
	t.Helper()
	b, err := registry.New(place, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return store.New(b)
}

// publish publishes a tree as a layer above those of lower.
func publish(t *testing.T, s *store.Store, name string, lower []oci.Layer, tree *imagetest.Tree) store.Version {
	t.Helper()
	v, err := s.Publish(t.Context(), name, store.Publication{
		Lower:  lower,
		Layer:  func(w io.Writer) (image.Descriptor, error) { return image.Write(w, tree.Entries, tree.Open) },
		Config: store.Config{Architecture: "amd64", Labels: map[string]string{oci.LabelHost: "golden"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func names(t *testing.T, s *store.Store) string {
	t.Helper()
	all, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, v := range all {
		if v.Err != nil {
			t.Errorf("%s: %v", v.Name, v.Err)
		}
		slices.Sort(v.Tags)
		names = append(names, strings.Join(append([]string{v.Name}, v.Tags...), "="))
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

func small() *imagetest.Tree { return imagetest.New().Dir("etc").File("etc/hostname", []byte("a\n")) }

// A registry keeps the promises of every backend. All tests have it in one, each
// under a prefix of its own.
func TestBackend(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	n := 0
	storetest.Run(t, func(t *testing.T) store.Backend {
		n++
		b, err := registry.New(fmt.Sprintf("%s/site/%d", r.Host, n), registry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return b
	})
}

// Tags go one by one, though the registry can only delete manifests with all
// of their tags.
func TestUntag(t *testing.T) {
	for _, tt := range []struct {
		name  string
		keeps bool
		err   string
	}{
		{"a registry that deletes", false, ""},
		{"one that does not", true, "HTTP 405"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, registrytest.Start(t, registrytest.Options{Keeps: tt.keeps}).Host+"/site/images")
			publish(t, s, "debian:1", nil, small())
			if err := s.Tag(t.Context(), "debian:1", "debian:good"); err != nil {
				t.Fatal(err)
			}
			if got, want := names(t, s), "debian:1=debian:good=debian:latest"; got != want {
				t.Fatalf("names %s, want %s", got, want)
			}
			err := s.Untag(t.Context(), "debian:good")
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Fatalf("Untag: %v, want %q", err, tt.err)
			}
			if got, want := names(t, s), "debian:1=debian:latest"; got != want {
				t.Errorf("names %s, want %s", got, want)
			}
		})
	}
}

// A layer that another repository has is mounted, not sent.
func TestMount(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	var sent, mounted atomic.Int64
	proxy := &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = "http", r.Host // Host stays: uploads go on where the answer says
			switch {
			case p.In.Method == http.MethodPatch:
				sent.Add(p.In.ContentLength)
			case p.In.URL.Query().Has("mount") && p.In.URL.Query().Get("from") == "site/a":
				mounted.Add(1)
			}
		},
	}
	web := httptest.NewServer(proxy)
	defer web.Close()
	s := open(t, strings.TrimPrefix(web.URL, "http://")+"/site")
	v := publish(t, s, "a:1", nil, imagetest.New().File("big", imagetest.Noise(1, 3<<20)))
	if n := sent.Load(); n < 3<<20 {
		t.Fatalf("%d bytes were sent, want 3 MiB and more", n)
	}
	sent.Store(0)
	if _, err := s.Publish(t.Context(), "b:1", store.Publication{Lower: v.Layers}); err != nil {
		t.Fatal(err)
	}
	if n := sent.Load(); n > 2000 || mounted.Load() == 0 {
		t.Errorf("%d bytes were sent, want a config; %d blobs mounted", n, mounted.Load())
	}
	if got, want := names(t, s), "a:1=a:latest b:1=b:latest"; got != want {
		t.Errorf("names %s, want %s", got, want)
	}
}

// The password is what docker login or podman login left.
func TestCredentials(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{Password: "nest"})
	home := t.TempDir()
	for _, name := range []string{"HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE"} {
		t.Setenv(name, filepath.Join(home, "none"))
	}
	login := func(password string) []byte {
		return fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, r.Host, base64.StdEncoding.EncodeToString([]byte("rookery:"+password)))
	}
	for _, tt := range []struct{ name, variable, file, password, err string }{
		{"nobody", "HOME", "x", "", "HTTP 401"},
		{"docker", "DOCKER_CONFIG", "config.json", "nest", ""},
		{"podman", "XDG_RUNTIME_DIR", "containers/auth.json", "nest", ""},
		{"wrong", "DOCKER_CONFIG", "config.json", "egg", "HTTP 401"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, tt.file)
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, login(tt.password), 0o600)); err != nil {
				t.Fatal(err)
			}
			if tt.password != "" {
				t.Setenv(tt.variable, dir)
			}
			s := open(t, r.Host+"/site")
			if tt.err != "" {
				if _, err := s.List(t.Context()); err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), r.Host) {
					t.Errorf("List: %v, want %s", err, tt.err)
				}
				return
			}
			v := publish(t, s, tt.name+":1", nil, small())
			if err := s.Tag(t.Context(), v.Name, tt.name+":good"); err != nil {
				t.Error(err)
			}
			if err := s.Untag(t.Context(), tt.name+":good"); err != nil {
				t.Error(err)
			}
			layers, closeAll, err := s.Layers(t.Context(), v)
			if err != nil {
				t.Fatal(err)
			}
			defer closeAll()
			if _, err := image.ReadView(layers...); err != nil {
				t.Error(err)
			}
		})
	}
}

// Somebody else's images in the same place are not ours to list.
func TestForeignNeighbours(t *testing.T) {
	r := registrytest.Start(t, registrytest.Options{})
	s := open(t, r.Host+"/site")
	v := publish(t, s, "ours:1", nil, small())
	for _, other := range []string{"/other:1", "/site/deeper/ours:1", "/sitenot/ours:1"} {
		if err := registry.Export(t.Context(), s, v, "docker://"+r.Host+other, nil, registry.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := names(t, s), "ours:1=ours:latest"; got != want {
		t.Errorf("names %s, want %s", got, want)
	}
}

// A registry that dies while a layer is written leaves no name.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	r := registrytest.Start(t, registrytest.Options{Dir: dir})
	s := open(t, r.Host+"/site")
	s.Torrent = func(io.Reader, int64, wire.Digest) ([]byte, error) { // the layer is made, and not sent yet
		r.Kill()
		return []byte("torrent"), nil
	}
	tree := small()
	_, err := s.Publish(t.Context(), "debian:1", store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) {
		return image.Write(w, tree.Entries, tree.Open)
	}})
	if err == nil || !strings.Contains(err.Error(), r.Host+"/site/debian") || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("Publish: %v", err)
	}
	if _, err := s.List(t.Context()); err == nil || !strings.Contains(err.Error(), r.Host) {
		t.Errorf("List: %v", err)
	}
	again := open(t, registrytest.Start(t, registrytest.Options{Dir: dir}).Host+"/site")
	if got := names(t, again); got != "" {
		t.Errorf("names %s, want none", got)
	}
}

// A connection that breaks is taken up where it broke; one that keeps breaking
// is an error that says where.
func TestBrokenConnections(t *testing.T) {
	content := imagetest.Noise(3, 500<<10)
	breaks, asked := 0, 0
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return
		}
		if r.Method == http.MethodGet {
			asked++
			if breaks > 0 {
				breaks--
				w = &breaking{w, 100 << 10}
			}
		}
		http.ServeContent(w, r, "", imagetest.When, bytes.NewReader(content))
	}))
	defer web.Close()
	b, err := registry.New(strings.TrimPrefix(web.URL, "http://")+"/site", registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := "sha256:" + strings.Repeat("0", 64)
	read := func(broken int) ([]byte, error) {
		breaks, asked = broken, 0
		blob, err := b.Open(t.Context(), store.Ref{Repo: "x", Digest: wire.Digest(d)})
		if err != nil {
			t.Fatal(err)
		}
		defer blob.Close()
		return io.ReadAll(io.NewSectionReader(blob, 0, blob.Size()))
	}
	got, err := read(2)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("broken twice: %d bytes of %d, %v", len(got), len(content), err)
	}
	if asked != 3 {
		t.Errorf("%d requests, want 3: read onward by one as long as it holds", asked)
	}
	if _, err := read(3); err == nil || !strings.Contains(err.Error(), "unexpected EOF") || !strings.Contains(err.Error(), "of 512000") {
		t.Errorf("broken for good: %v", err)
	}
}

// Who knows no ranges is read from begin to end all the same, and no bytes are
// taken for others.
func TestNoRanges(t *testing.T) {
	content := imagetest.Noise(3, 100<<10)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			w.Write(content)
		}
	}))
	defer web.Close()
	b, err := registry.New(strings.TrimPrefix(web.URL, "http://")+"/site", registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	blob, err := b.Open(t.Context(), store.Ref{Repo: "x", Digest: wire.DigestOf(content)})
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	got, err := io.ReadAll(io.NewSectionReader(blob, 0, blob.Size()))
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("read onward: %d bytes, %v", len(got), err)
	}
	if n, err := blob.ReadAt(make([]byte, 10), 50); n != 0 || err == nil || !strings.Contains(err.Error(), "knows no ranges") {
		t.Errorf("ReadAt: %d, %v", n, err)
	}
}

// A breaking is a connection that ends after some bytes.
type breaking struct {
	http.ResponseWriter
	left int
}

func (b *breaking) Write(p []byte) (int, error) {
	if len(p) > b.left {
		b.ResponseWriter.Write(p[:b.left])
		panic(http.ErrAbortHandler)
	}
	b.left -= len(p)
	return b.ResponseWriter.Write(p)
}

// Plain HTTP is for this machine alone, unless somebody wants it.
func TestPlainHTTP(t *testing.T) {
	for _, host := range []string{"192.168.255.254", "10.255.255.254:5000", "registry.local"} {
		s := open(t, host+"/x")
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // the first request was to be in HTTPS: that is not waited for
		_, err := s.List(ctx)
		if err == nil || strings.Contains(err.Error(), "http://"+host) && !strings.Contains(err.Error(), "not asked in plain HTTP") {
			t.Errorf("%s: %v", host, err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for _, place := range []string{"", "/x", "host/UPPER", "host:port:port/x", "host/a//b", "ho st/x"} {
		if _, err := registry.New(place, registry.Options{}); err == nil {
			t.Errorf("%q: taken", place)
		}
	}
}
