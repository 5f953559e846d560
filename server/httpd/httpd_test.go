package httpd_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"rookery/boot/netboot"
	"rookery/disklayout"
	images "rookery/image/store"
	"rookery/server/fleet"
	"rookery/server/httpd"
	"rookery/server/store"
	"rookery/transport"
	"rookery/transport/tracker"
	"rookery/wire"
)

const (
	mac1 = "52:54:00:00:00:01"
	mac2 = "52:54:00:00:00:02"
)

var (
	siteKey = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	boot    = strings.Repeat("a", 32)
	layer   = bytes.Repeat([]byte("0123456789abcdef"), 10<<20/16) // more than one piece of sending
)

func newServer(t testing.TB) *httpd.Server {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	f, err := fleet.New(t.Context(), fleet.Config{
		Store: store.Memory(), Key: siteKey, TokenKey: []byte("tokens"), Log: log,
		Images: func(_ context.Context, name string) (fleet.Image, error) {
			if name != "debian12" {
				return fleet.Image{}, fmt.Errorf("image %q: %w", name, fleet.ErrNotFound)
			}
			return fleet.Image{Image: wire.Image{Name: "debian12:1", Manifest: wire.DigestOf(nil)}}, nil
		},
	})
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	return &httpd.Server{
		Fleet: f,
		Boot: fstest.MapFS{
			"vmlinuz":       {Data: []byte("kernel")},
			"initramfs":     {Data: []byte("initramfs")},
			"secret/things": {Data: []byte("x")},
		},
		Tracker: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "tracker ", r.URL.Path) }),
		Site:    netboot.Site{HTTP: "http://10.0.0.1:80", API: "https://10.0.0.1:443"},
		Log:     log,
	}
}

func apply(t testing.TB, s *httpd.Server, yaml string) {
	t.Helper()
	if _, err := s.Fleet.Apply(t.Context(), fleet.File{Name: "f.yaml", Data: yaml}); err != nil {
		t.Fatalf("Apply: %v", err)
	}
}

const twoNodes = `
kind: Node
name: n1
macs: [52:54:00:00:00:01]
image: debian12
---
kind: Node
name: n2
macs: [52:54:00:00:00:02]
boot: local
`

type blob struct{ *os.File }

func (blob) Size() int64 { return int64(len(layer)) }

func TestPublic(t *testing.T) {
	s := newServer(t)
	blobs := t.TempDir()
	path := func(d wire.Digest) string { return filepath.Join(blobs, d.Hex()) }
	if err := os.WriteFile(path(wire.DigestOf(layer)), layer, 0o644); err != nil {
		t.Fatal(err)
	}
	s.Blobs = func(_ context.Context, d wire.Digest) (images.Blob, error) {
		file, err := os.Open(path(d))
		if errors.Is(err, fs.ErrNotExist) {
			err = images.ErrNotFound
		}
		return blob{file}, err
	}
	apply(t, s, twoNodes)
	public, _, _ := s.Routes()
	server := httptest.NewServer(public)
	defer server.Close()
	digest := string(wire.DigestOf(layer))
	for _, tt := range []struct {
		name, method, path string
		header             string // "Key: value"
		status             int
		body               string // "/" before it: contained in the answer
	}{
		{name: "healthz", path: "/healthz", status: 200, body: `{"ok":true}` + "\n"},
		{name: "kernel", path: "/boot/vmlinuz", status: 200, body: "kernel"},
		{name: "kernel's size", method: "HEAD", path: "/boot/vmlinuz", status: 200},
		{name: "part of the initramfs", path: "/boot/initramfs", header: "Range: bytes=4-", status: 206, body: "ramfs"},
		{name: "no such boot file", path: "/boot/nothing", status: 404},
		{name: "no list of files", path: "/boot/", status: 404},
		{name: "no list of a directory", path: "/boot/secret", status: 404},
		{name: "no way out", path: "/boot/..%2f..%2fetc/passwd", status: 404},
		{name: "unknown machine", path: "/boot/script.ipxe?mac=52-54-00-00-00-09", status: 200, body: "/unknown machine (52:54:00:00:00:09) starts the agent"},
		{name: "node to be installed", path: "/boot/script.ipxe?mac=" + mac1, status: 200, body: "/kernel http://10.0.0.1:80/boot/vmlinuz"},
		{name: "node that is installed", path: "/boot/script.ipxe?mac=" + mac2, status: 200, body: "/n2 (52:54:00:00:00:02) starts from its own disk"},
		{name: "boot program", path: "/boot/of/" + mac1 + "/vmlinuz", status: 200, body: "kernel"},
		{name: "boot program of a node that is installed", path: "/boot/of/" + mac2 + "/vmlinuz", status: 404},
		{name: "boot program of no machine", path: "/boot/of/x/vmlinuz", status: 400},
		{name: "no machine", path: "/boot/script.ipxe", status: 400, body: `/{"error":"query: MAC address`},
		{name: "layer", path: "/layers/" + digest, status: 200, body: string(layer)},
		{name: "part of a layer", path: "/layers/" + digest, header: "Range: bytes=5242870-9437200", status: 206, body: string(layer[5242870:9437201])},
		{name: "past the layer", path: "/layers/" + digest, header: "Range: bytes=99999999-", status: 416},
		{name: "layer that is known already", path: "/layers/" + digest, header: `If-None-Match: "` + digest + `"`, status: 304},
		{name: "manifest", path: "/manifests/" + digest, status: 200, body: string(layer)},
		{name: "torrent", path: "/torrents/" + digest, status: 200, body: string(layer)},
		{name: "unknown layer", path: "/layers/" + string(wire.DigestOf([]byte("x"))), status: 404},
		{name: "no digest", path: "/layers/passwd", status: 404, body: `/want sha256:`},
		{name: "digest that is a path", path: "/layers/sha256:..%2f..%2fetc%2fpasswd", status: 404},
		{name: "announce", path: "/announce?info_hash=x", status: 200, body: "tracker /announce"},
		{name: "scrape", path: "/scrape", status: 200, body: "tracker /scrape"},
		{name: "the agents' API is elsewhere", method: "POST", path: "/v1/hello", status: 404},
		{name: "the admin API is elsewhere", path: "/v1/nodes", status: 404},
		{name: "wrong method", method: "POST", path: "/boot/vmlinuz", status: 405},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequest(tt.method, server.URL+tt.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			if k, v, ok := strings.Cut(tt.header, ": "); ok {
				req.Header.Set(k, v)
			}
			resp, err := server.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != tt.status {
				t.Fatalf("%s: %s, %v, want %d; body %.200q", tt.path, resp.Status, err, tt.status, body)
			}
			if part, ok := strings.CutPrefix(tt.body, "/"); ok {
				if !strings.Contains(string(body), part) {
					t.Errorf("%s: %.200q, want %q in it", tt.path, body, part)
				}
			} else if tt.body != "" && string(body) != tt.body {
				t.Errorf("%s: %d bytes %.100q, want %d bytes %.100q", tt.path, len(body), body, len(tt.body), tt.body)
			}
			if strings.HasPrefix(tt.path, "/layers/"+digest) && resp.StatusCode < 400 &&
				(!strings.Contains(resp.Header.Get("Cache-Control"), "immutable") || resp.Header.Get("ETag") != `"`+digest+`"`) {
				t.Errorf("%s: header %v, want immutable content with the digest as its tag", tt.path, resp.Header)
			}
			if tt.method == "HEAD" && resp.ContentLength != int64(len("kernel")) { // OVMF asks for it
				t.Errorf("%s: length %d, want %d", tt.path, resp.ContentLength, len("kernel"))
			}
		})
	}
}

// Who takes a torrent file from nodes is sent to one, if there is one.
func TestTorrents(t *testing.T) {
	s := newServer(t)
	file := filepath.Join(t.TempDir(), "torrent")
	if err := os.WriteFile(file, layer, 0o644); err != nil {
		t.Fatal(err)
	}
	s.Blobs = func(context.Context, wire.Digest) (images.Blob, error) {
		f, err := os.Open(file)
		return blob{f}, err
	}
	node := netip.MustParseAddrPort("[fd00::7]:6881")
	torrent, other := wire.DigestOf(layer), wire.DigestOf(nil)
	s.Giver = func(_ context.Context, d wire.Digest) netip.AddrPort {
		if d == torrent {
			return node
		}
		return netip.AddrPort{}
	}
	public, _, _ := s.Routes()
	for _, tt := range []struct {
		path, to string
	}{
		{wire.PathTorrents + string(torrent) + "?" + wire.FromNodes, "http://[fd00::7]:6881" + wire.PathTorrents + string(torrent)},
		{wire.PathTorrents + string(torrent), ""},
		{wire.PathTorrents + string(other) + "?" + wire.FromNodes, ""},
	} {
		w := httptest.NewRecorder()
		public.ServeHTTP(w, httptest.NewRequest("GET", tt.path, nil))
		to := w.Result().Header.Get("Location")
		if to != tt.to || tt.to == "" && !bytes.Equal(w.Body.Bytes(), layer) {
			t.Errorf("%s: %d to %q with %d bytes, want %q", tt.path, w.Code, to, w.Body.Len(), tt.to)
		}
	}
}

// All who fetch layers share one limit, and get the right bytes.
func TestEgressLimit(t *testing.T) {
	s := newServer(t)
	file := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(file, layer, 0o644); err != nil {
		t.Fatal(err)
	}
	s.Blobs = func(context.Context, wire.Digest) (images.Blob, error) {
		f, err := os.Open(file)
		return blob{f}, err
	}
	s.Egress = transport.NewLimiter(8 << 20)
	public, _, _ := s.Routes()
	server := httptest.NewServer(public)
	defer server.Close()
	begin := time.Now()
	var both sync.WaitGroup
	for i := range 2 {
		both.Go(func() {
			req, _ := http.NewRequest("GET", server.URL+wire.PathLayers+string(wire.DigestOf(layer)), nil)
			from := i<<20 + 7
			req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, from+1<<20-1))
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, layer[from:from+1<<20]) {
				t.Errorf("%s: %d bytes, %v; want the 1 MiB from %d", resp.Status, len(got), err, from)
			}
		})
	}
	both.Wait()
	if took, least := time.Since(begin), 240*time.Millisecond; took < least { // 64 KiB are free
		t.Errorf("2 MiB at 8 MiB/s took %s, want at least %s", took, least)
	}
}

func helloFrom(mac string) string {
	b, _ := json.Marshal(wire.Hello{Boot: boot, Inventory: wire.Inventory{
		Firmware: disklayout.UEFI, Arch: "amd64",
		NICs:  []wire.NIC{{Name: "eth0", MAC: mac, Carrier: true}},
		Disks: []disklayout.Disk{{Name: "vda", Path: "/dev/vda", Size: 8 << 30}},
	}})
	return string(b)
}

// request is one request to a handler; token may be "".
func request(t testing.TB, h http.Handler, method, path, token, body string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func welcome(t testing.TB, agent http.Handler, mac string) wire.Welcome {
	t.Helper()
	w := request(t, agent, "POST", wire.PathHello, "", helloFrom(mac))
	answer, err := wire.DecodeWelcome(w.Body.Bytes())
	if w.Code != 200 || err != nil {
		t.Fatalf("hello: %d, %v: %s", w.Code, err, w.Body)
	}
	return answer
}

func events(es ...wire.Event) string {
	b, _ := json.Marshal(es)
	return string(b)
}

func TestTrees(t *testing.T) {
	s := newServer(t)
	made := wire.DigestOf([]byte("made"))
	s.Trees = func(_ context.Context, d wire.Digest) (wire.Tree, error) {
		switch d {
		case made:
			return wire.Tree{Module: d.Hex(), Port: 873}, nil
		case wire.DigestOf([]byte("off")):
			return wire.Tree{}, errors.New("rsync: the server runs without it")
		}
		return wire.Tree{}, fmt.Errorf("image: %w", images.ErrNotFound)
	}
	public, _, admin := s.Routes()
	for path, want := range map[string]string{
		string(made):                          "200 {\"module\":\"" + made.Hex() + "\",\"port\":873}",
		string(wire.DigestOf([]byte("off"))):  "500 {\"error\":\"rsync: the server runs without it\"}",
		string(wire.DigestOf([]byte("none"))): "404 {\"error\":\"image: " + images.ErrNotFound.Error() + "\"}",
		"sha256:x":                            "404 ",
	} {
		for _, h := range []http.Handler{public, admin} {
			w := request(t, h, "POST", wire.PathTrees+path, "", "")
			if got := fmt.Sprintf("%d %s", w.Code, strings.Join(strings.Fields(w.Body.String()), " ")); !strings.HasPrefix(got, want) {
				t.Errorf("%s: %s, want %s", path, got, want)
			}
		}
	}
}

// Anybody may say what he wants; the answer is whether it is sent.
func TestWant(t *testing.T) {
	s := newServer(t)
	layer := wire.DigestOf([]byte("layer"))
	body := `{"client":"00112233445566ff","lost":0,"layer":"` + string(layer) + `"}`
	post := func(body, want string) {
		t.Helper()
		public, _, _ := s.Routes()
		w := request(t, public, "POST", wire.PathMulticast, "", body)
		if got := fmt.Sprintf("%d %s", w.Code, w.Body); !strings.HasPrefix(got, want) {
			t.Errorf("%.80s: %s, want %s", body, got, want)
		}
	}
	post(body, "404 ") // there is no multicast
	size, err := int64(0), error(nil)
	s.Want = func(w wire.Want) (int64, error) {
		if w.Layer != layer {
			t.Errorf("%s is wanted, want %s", w.Layer, layer)
		}
		return size, err
	}
	post(body, "204 ")
	size = 36012
	post(body, `202 {"size":36012}`)
	err = errors.New("no such layer")
	post(body, `404 {"error":"no such layer"}`)
	post(`{"client":"n1"}`, "400 ")
	post(body+strings.Repeat(" ", wire.MaxWant), "413 ")
}

func TestAgent(t *testing.T) {
	s := newServer(t)
	apply(t, s, twoNodes)
	_, agent, _ := s.Routes()
	if w := welcome(t, agent, "52:54:00:00:00:99"); w.Do != wire.Wait {
		t.Errorf("an unknown machine is told to %s, want %s", w.Do, wire.Wait)
	}
	token := welcome(t, agent, mac1).Token
	w := request(t, agent, "GET", wire.PathScript, token, "")
	script, err := wire.Open(w.Body.Bytes(), siteKey.Public().(ed25519.PublicKey))
	if w.Code != 200 || err != nil || script.Node != "n1" {
		t.Fatalf("script: %d, %v, %+v", w.Code, err, script)
	}
	end := events(wire.Event{Boot: boot, Seq: 1, Phase: wire.PhaseEnd, State: wire.Finished})
	for _, tt := range []struct {
		name, method, path, token, body string
		status                          int
	}{
		{"no token", "GET", wire.PathScript, "", "", 401},
		{"foreign token", "GET", wire.PathScript, token + "x", "", 401},
		{"events without a token", "POST", wire.PathEvents, "", end, 401},
		{"hello that is no JSON", "POST", wire.PathHello, "", "hello", 400},
		{"hello with an unknown key", "POST", wire.PathHello, "", `{"boot":"` + boot + `","name":"n1"}`, 400},
		{"hello without end", "POST", wire.PathHello, "", strings.Repeat(" ", wire.MaxHello+1), 413},
		{"events without end", "POST", wire.PathEvents, token, strings.Repeat(" ", wire.MaxEvents+1), 413},
		{"events that are none", "POST", wire.PathEvents, token, `[{"boot":"x"}]`, 400},
		{"no such path", "GET", "/v1/nodes", token, "", 404},
		{"the end", "POST", wire.PathEvents, token, end, 204},
		{"the end again", "POST", wire.PathEvents, token, end, 204},
		{"nothing to install any more", "GET", wire.PathScript, token, "", 409},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := request(t, agent, tt.method, tt.path, tt.token, tt.body)
			if w.Code != tt.status {
				t.Errorf("%s %s: %d %s, want %d", tt.method, tt.path, w.Code, w.Body, tt.status)
			}
		})
	}
}

// socket serves the admin API at a unix socket until the test ends.
func socket(t *testing.T, admin http.Handler) *httpd.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "admin.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- httpd.Serve(ctx, ln, admin, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return httpd.Dial(path)
}

// The same story over a socket and without one.
func TestAdmin(t *testing.T) {
	for world, dial := range map[string]func(*testing.T, http.Handler) *httpd.Client{
		"socket":     socket,
		"in process": func(_ *testing.T, admin http.Handler) *httpd.Client { return httpd.InProcess(admin) },
	} {
		t.Run(world, func(t *testing.T) {
			s := newServer(t)
			_, agent, admin := s.Routes()
			c, ctx := dial(t, admin), t.Context()
			refused := func(what string, err error, want string) {
				t.Helper()
				if fmt.Sprint(err) != want {
					t.Errorf("%s: %v, want %s", what, err, want)
				}
			}

			done, err := c.Apply(ctx, fleet.File{Name: "a.yaml", Data: "kind: Defaults\ndomain: example.org\n"}, fleet.File{Name: "b.yaml", Data: twoNodes})
			if err != nil || len(done) != 3 {
				t.Fatalf("Apply: %q, %v", done, err)
			}
			_, err = c.Apply(ctx, fleet.File{Name: "a.yaml", Data: "kind: Defaults\ndomian: example.org\n"})
			refused("Apply", err, "a.yaml:2: defaults: domian: unknown key")

			welcome(t, agent, "52:54:00:00:00:03")
			all, err := c.Nodes(ctx)
			if err != nil || len(all) != 3 || !all[2].New || all[0].Name != "n1" {
				t.Fatalf("Nodes: %+v, %v", all, err)
			}
			refused("Accept", c.Accept(ctx, all[2].MAC, fleet.Node{Name: "n3", Settings: fleet.Settings{Image: "debian13"}}),
				`node n3: image: "debian13": not found`)
			if err := c.Accept(ctx, all[2].MAC, fleet.Node{Name: "n3", Settings: fleet.Settings{Image: "debian12"}}); err != nil {
				t.Errorf("Accept: %v", err)
			}
			if p, err := c.Plan(ctx, "n3"); err != nil || p.Disk.Name != "vda" || len(p.Partitions) == 0 || p.From != "the program's own layout" {
				t.Errorf("Plan: %+v, %v", p, err)
			}
			_, err = c.Plan(ctx, "n1")
			refused("Plan", err, "node n1: its disks are not known: it never said hello; start it from the network")

			if err := c.Edit(ctx, "n1", map[string]any{"seedFor": 7, "macs": []string{mac1, "52:54:00:00:00:11"}}); err != nil {
				t.Errorf("Edit: %v", err)
			}
			if err := c.Edit(ctx, "n1", map[string]any{"console": "ttyS0,115200"}); err != nil {
				t.Errorf("Edit: %v", err)
			}
			refused("Edit", c.Edit(ctx, "n1", map[string]any{"consle": "ttyS0"}), `unknown field "consle"`)
			v, err := c.Node(ctx, "n1")
			if err != nil || v.Record.Image != "debian12" || *v.Record.SeedFor != 7 || v.Record.Console != "ttyS0,115200" || len(v.Record.MACs) != 2 {
				t.Errorf("Node: %+v, %v", v.Record, err)
			}
			if err := c.Put(ctx, fleet.Node{Name: "n4", UUID: "12345678-9ABC-def0-1234-56789abcdef0", Settings: fleet.Settings{Image: "debian12"}}); err != nil {
				t.Errorf("Put: %v", err)
			}
			if err := c.Install(ctx, "n1"); err != nil {
				t.Errorf("Install: %v", err)
			}
			again, err := c.Node(ctx, "n1")
			if err != nil || again.ID == v.ID {
				t.Errorf("Install: %v, ID is still %s", err, again.ID)
			}
			request(t, agent, "GET", wire.PathScript, welcome(t, agent, mac1).Token, "")
			needed, err := c.Needed(ctx)
			want := fleet.Need{Name: "debian12:1", Manifest: wire.DigestOf(nil), Why: "n1 is being installed"}
			if err != nil || len(needed) != 4 || needed[0] != want || needed[3].Why != "node n4" {
				t.Errorf("Needed: %+v, %v, want for all nodes with an image, and for n1 twice", needed, err)
			}

			a := fleet.File{Name: "a.yaml", Data: "kind: Group\nname: a\ntransports: [http]\n"}
			if lines, err := c.Diff(ctx, a); err != nil || fmt.Sprint(lines) != "[group a: new]" {
				t.Errorf("Diff: %q, %v", lines, err)
			}
			if _, err := c.Apply(ctx, a); err != nil {
				t.Errorf("Apply: %v", err)
			}
			if err := c.Edit(ctx, "n4", map[string]any{"groups": []string{"a"}}); err != nil {
				t.Errorf("Edit: %v", err)
			}
			if all, err := c.Groups(ctx); err != nil || len(all) != 1 || all[0].Name != "a" || all[0].Transports[0] != "http" || fmt.Sprint(all[0].Nodes) != "[n4]" {
				t.Errorf("Groups: %+v, %v", all, err)
			}
			refused("DeleteGroup", c.DeleteGroup(ctx, "a"), "group a: node n4 is in it")
			if docs, err := c.Records(ctx, "group", "a"); err != nil || len(docs) != 1 || string(docs[0]) != `{"kind":"Group","name":"a","transports":["http"]}` {
				t.Errorf("Records: %s, %v", docs, err)
			}
			_, err = c.Records(ctx, "group", "b")
			refused("Records", err, "group b: not found")
			_, err = c.Records(ctx, "host", "")
			refused("Records", err, `kind: "host" is not one of Node, Group, Layout, Defaults`)
			if err := c.Edit(ctx, "n4", map[string]any{"groups": nil}); err != nil {
				t.Errorf("Edit: %v", err)
			}
			if err := c.DeleteGroup(ctx, "a"); err != nil {
				t.Errorf("DeleteGroup: %v", err)
			}
			if err := c.Delete(ctx, "n4"); err != nil {
				t.Errorf("Delete: %v", err)
			}
			_, err = c.Node(ctx, "n4")
			refused("Node", err, "node n4: not found")
			refused("Install", c.Install(ctx, "n/4"), "node n/4: not found")
			refused("Events", c.Events(ctx, "n4", 0, true, nil), "node n4: not found")
		})
	}
}

func TestFollow(t *testing.T) {
	for world, dial := range map[string]func(*testing.T, http.Handler) *httpd.Client{
		"socket":     socket,
		"in process": func(_ *testing.T, admin http.Handler) *httpd.Client { return httpd.InProcess(admin) },
	} {
		t.Run(world, func(t *testing.T) {
			s := newServer(t)
			apply(t, s, twoNodes)
			_, agent, admin := s.Routes()
			c := dial(t, admin)
			token := welcome(t, agent, mac1).Token
			say := func(seq int, state wire.State) {
				t.Helper()
				e := wire.Event{Boot: boot, Seq: seq, Phase: wire.PhaseFetch, State: state}
				if w := request(t, agent, "POST", wire.PathEvents, token, events(e)); w.Code != 204 {
					t.Errorf("events: %d: %s", w.Code, w.Body)
				}
			}
			say(1, wire.Started)
			// Each event is said once the one before was heard.
			var heard []string
			ctx, stop := context.WithCancel(t.Context())
			err := c.Events(ctx, "n1", 0, true, func(e fleet.NodeEvent) error {
				heard = append(heard, string(e.State))
				switch e.State {
				case wire.Started:
					say(2, wire.Progress)
				case wire.Progress:
					say(3, wire.Finished)
				case wire.Finished:
					stop()
				}
				return nil
			})
			if !errors.Is(err, context.Canceled) || strings.Join(heard, " ") != "started progress finished" {
				t.Errorf("Events: %q, %v, want all three and that the context ended", heard, err)
			}
			heard = nil
			err = c.Events(t.Context(), "", 0, false, func(e fleet.NodeEvent) error {
				heard = append(heard, e.Node+" "+string(e.State))
				return nil
			})
			if err != nil || strings.Join(heard, ", ") != "n1 started, n1 finished" {
				t.Errorf("Events: %q, %v, want what is kept", heard, err)
			}
		})
	}
}

func TestServeEndsWithItsFollowers(t *testing.T) {
	s := newServer(t)
	_, _, admin := s.Routes()
	path := filepath.Join(t.TempDir(), "admin.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- httpd.Serve(ctx, ln, admin, slog.New(slog.DiscardHandler)) }()
	apply(t, s, twoNodes)
	_, agent, _ := s.Routes()
	token := welcome(t, agent, mac1).Token
	request(t, agent, "POST", wire.PathEvents, token, events(wire.Event{Boot: boot, Seq: 1, Phase: wire.PhaseBoot, State: wire.Finished}))
	err = httpd.Dial(path).Events(t.Context(), "", 0, true, func(fleet.NodeEvent) error { stop(); return nil })
	if err != nil {
		t.Errorf("Events: %v, want that the stream ends with the server", err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// An announce that waits for news does not hold up the end.
func TestServeEndsWithItsPeers(t *testing.T) {
	s := newServer(t)
	track, waits := tracker.New(func([20]byte) bool { return true }), make(chan struct{})
	s.Tracker = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("wait") != "" {
			close(waits)
		}
		track.ServeHTTP(w, r)
	})
	public, _, _ := s.Routes()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- httpd.Serve(ctx, ln, public, slog.New(slog.DiscardHandler)) }()
	ask := func(more string) string {
		resp, err := http.Get("http://" + ln.Addr().String() + wire.PathAnnounce + "?info_hash=01234567890123456789&peer_id=01234567890123456789&port=1&left=1" + more)
		if err != nil {
			t.Error(err)
			return ""
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	ask("")
	held := make(chan string, 1)
	go func() { held <- ask("&wait=60") }()
	<-waits
	stopped := time.Now()
	stop()
	if got := <-held; !strings.Contains(got, "8:intervali5e") {
		t.Errorf("answered %q", got)
	}
	if err := <-ended; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if took := time.Since(stopped); took > 2*time.Second {
		t.Errorf("the end took %v", took)
	}
}

func TestServeTellsThatItsListenerBroke(t *testing.T) {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := httpd.Serve(t.Context(), ln, http.NotFoundHandler(), slog.New(slog.DiscardHandler)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v, want %v", err, net.ErrClosed)
	}
}

func TestDialWithoutAServer(t *testing.T) {
	_, err := httpd.Dial(filepath.Join(t.TempDir(), "admin.sock")).Nodes(t.Context())
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Nodes: %v, want %v", err, fs.ErrNotExist)
	}
}

// FuzzEdit changes a node by any JSON.
func FuzzEdit(f *testing.F) {
	for _, seed := range []string{`{}`, `{"macs":null,"uuid":"x"}`, `{"seedFor":-1}`, `{"Name":"n2"}`, `{"address":"10.0.0.7/24","gateway":"10.0.0.1"}`, `[]`, `null`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, patch string) {
		s := newServer(t)
		apply(t, s, twoNodes)
		public, agent, admin := s.Routes()
		switch w := request(t, admin, "PATCH", "/v1/nodes/n1", "", patch); w.Code {
		case 200, 400, 413, 422:
		default:
			t.Fatalf("PATCH: %d: %s", w.Code, w.Body)
		}
		welcome(t, agent, mac1)
		if w := request(t, public, "GET", "/boot/script.ipxe?mac="+mac1, "", ""); w.Code != 200 {
			t.Fatalf("boot script: %d: %s", w.Code, w.Body)
		}
	})
}
