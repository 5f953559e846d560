package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rookery/agent/install"
	"rookery/agent/install/installtest"
	"rookery/agent/netup"
	"rookery/disklayout"
	"rookery/disklayout/apply"
	"rookery/image"
	"rookery/image/store"
	"rookery/netnstest"
	"rookery/server/rsyncd"
	keys "rookery/server/site"
	"rookery/transport"
	"rookery/transport/rsync/rsynctest"
	"rookery/transport/swarm"
	"rookery/transport/tracker"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// asAgent makes the test binary be the agent.
const asAgent = "ROOKERY_TEST_AS_AGENT"

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" {
		main()
	}
	os.Exit(m.Run())
}

// site is a server with one image, a tracker and a seeder.
type site struct {
	*httptest.Server
	images  *store.Store
	version store.Version
	key     ed25519.PrivateKey
	file    string // site.json

	mu      sync.Mutex
	wait    int // hellos to be answered with wait
	hellos  []wire.Hello
	sealed  []byte // what /v1/script answers; nil: the right one
	served  int64  // bytes of layers
	deny    bool   // layers are not there
	events  []wire.Event
	more    chan struct{}                    // closed at the next hello or events
	trees   []wire.Tree                      // answers to who asks for files; the last stays
	refuse  int                              // requests with events to be answered with 503
	corrupt func(b []byte, off int64) []byte // bytes of layers on their way
	pace    func(served int64)               // asked before each piece of work on them
}

func newSite(t *testing.T) *site {
	t.Helper()
	dir := t.TempDir()
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &site{key: key, more: make(chan struct{}), file: filepath.Join(dir, "site.json")}
	b, _ := json.Marshal(wire.Site{Key: public})
	if err := os.WriteFile(s.file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s.images, s.version = installtest.Publish(t, filepath.Join(dir, "images"))

	track := tracker.New(func([20]byte) bool { return true })
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+wire.PathHello, s.hello)
	mux.HandleFunc("GET "+wire.PathScript, s.script)
	mux.HandleFunc("POST "+wire.PathEvents, s.take)
	mux.HandleFunc("GET "+wire.PathManifests+"{digest}", s.blob)
	mux.HandleFunc("GET "+wire.PathTorrents+"{digest}", s.blob)
	mux.HandleFunc("GET "+wire.PathLayers+"{digest}", s.blob)
	mux.HandleFunc("POST "+wire.PathTrees+"{digest}", s.tree)
	mux.Handle("GET "+wire.PathAnnounce, track)
	s.Server = httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

func (s *site) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// seed starts the server's peer.
func (s *site) seed(t *testing.T) {
	t.Helper()
	layer := s.version.Layers[0]
	torrent, err := os.ReadFile(s.images.Path(layer.Torrent))
	if err != nil {
		t.Fatal(err)
	}
	info, err := transport.ParseTorrent(torrent)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(s.images.Path(layer.Digest), os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	pieces := transport.NewPieces(info, f)
	pieces.AllDone()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	peer := swarm.NewPeer(ln, slog.New(slog.DiscardHandler))
	peer.Add(pieces, swarm.Options{Seeder: true, Trackers: []string{s.URL + wire.PathAnnounce}})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = peer.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done; f.Close() })
}

func (s *site) hello(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	hello, err := wire.DecodeHello(b)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hellos = append(s.hellos, hello)
	close(s.more)
	s.more = make(chan struct{})
	welcome := wire.Welcome{Do: wire.Install, Node: "n1", Token: "t"}
	if s.wait > 0 {
		s.wait--
		welcome = wire.Welcome{Do: wire.Wait, Why: "unknown machine"}
	}
	_ = json.NewEncoder(w).Encode(welcome)
}

func (s *site) seal(t testing.TB, change func(*wire.Script)) []byte {
	script := installtest.Script(s.version)
	script.SeedFor = 0
	if change != nil {
		change(&script)
	}
	b, err := wire.Seal(script, s.key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (s *site) script(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer t" {
		http.Error(w, "token", http.StatusUnauthorized)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = w.Write(s.sealed)
}

func (s *site) take(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	events, err := wire.DecodeEvents(b)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse > 0 {
		s.refuse--
		http.Error(w, "restarting", http.StatusServiceUnavailable)
		return
	}
	s.events = append(s.events, events...)
	close(s.more)
	s.more = make(chan struct{})
	w.WriteHeader(http.StatusNoContent)
}

func (s *site) tree(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.trees) == 0 || r.PathValue("digest") != string(s.version.Manifest) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, `{"error": "rsync: the server runs without it"}`)
		return
	}
	_ = json.NewEncoder(w).Encode(s.trees[0])
	if len(s.trees) > 1 {
		s.trees = s.trees[1:]
	}
}

func (s *site) blob(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	deny := s.deny && strings.HasPrefix(r.URL.Path, wire.PathLayers)
	s.mu.Unlock()
	if deny {
		http.NotFound(w, r)
		return
	}
	f, err := s.images.Blob(r.Context(), wire.Digest(path.Base(r.URL.Path)))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer f.Close()
	var content io.ReadSeeker = io.NewSectionReader(f, 0, f.Size())
	if strings.HasPrefix(r.URL.Path, wire.PathLayers) {
		content = io.NewSectionReader(layer{s, f}, 0, f.Size())
	}
	http.ServeContent(w, r, "", time.Time{}, content)
}

// layer counts, and corrupts what it is told to.
type layer struct {
	*site
	f io.ReaderAt
}

func (l layer) ReadAt(b []byte, off int64) (int, error) {
	l.mu.Lock()
	pace, served := l.pace, l.served
	l.mu.Unlock()
	if pace != nil {
		pace(served)
	}
	n, err := l.f.ReadAt(b, off)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.served += int64(n)
	if l.corrupt != nil {
		copy(b[:n], l.corrupt(b[:n], off))
	}
	return n, err
}

// agentProcess starts a real agent.
func agentProcess(t *testing.T, args ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), asAgent+"=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	return cmd, &out
}

func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

func checkInstalled(t *testing.T, root string) {
	t.Helper()
	for name, want := range installtest.Files {
		if name == "etc/hostname" {
			want = "n1\n" // the fixup's
		}
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
		}
	}
	if _, err := os.Stat(filepath.Join(root, install.StagingDir)); err == nil {
		t.Error("staging is still there")
	}
}

// The whole way as a plain process: unknown at first, then accepted; from the
// swarm, into a directory; a server that is away for a moment hears everything.
func TestRun(t *testing.T) {
	s := newSite(t)
	s.seed(t)
	s.set(func() { s.wait, s.refuse, s.sealed = 1, 2, s.seal(t, nil) })
	root := filepath.Join(t.TempDir(), "root")
	cmd, out := agentProcess(t, "run", "--api", s.URL, "--http", s.URL, "--site", s.file, "--root", root,
		"--mac", "52:54:00:AA:00:01", "--listen", "127.0.0.1:0")
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkInstalled(t, root)
	if !strings.Contains(out.String(), "rookery node accept 52:54:00:aa:00:01 --name NAME --image IMAGE") {
		t.Errorf("the console does not say how to accept the machine:\n%s", out)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.hellos) != 2 || s.hellos[0].Inventory.NICs[0].MAC != "52:54:00:aa:00:01" || s.hellos[0].Boot != s.hellos[1].Boot {
		t.Errorf("hellos: %+v", s.hellos)
	}
	if s.served != 0 {
		t.Errorf("%d bytes of the layer came by HTTP, want all from the swarm", s.served)
	}
	var finished []string
	for i, e := range s.events {
		if i > 0 && e.Seq <= s.events[i-1].Seq {
			t.Errorf("event %d after %d", e.Seq, s.events[i-1].Seq)
		}
		if e.State == wire.Finished {
			finished = append(finished, string(e.Phase))
		}
		if e.State == wire.Failed {
			t.Errorf("%s failed: %s", e.Phase, e.Text)
		}
	}
	want := []string{"hello", "script", "plan", "partition", "fetch", "fixup", "loader", "linger", "end"}
	if !slices.Equal(finished, want) {
		t.Errorf("the server has %v, want %v", finished, want)
	}
	last := s.events[len(s.events)-1]
	if last.Phase != wire.PhaseEnd || last.Fetch == nil || last.Fetch.Done != last.Fetch.Total || last.Fetch.FromServer != last.Fetch.Total {
		t.Errorf("last event: %+v %+v", last, last.Fetch)
	}
}

// A switch that speaks when the installation has begun: the server hears of it at once.
func TestRunTellsTheSwitch(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	const mac = "52:54:00:aa:00:01"
	for _, line := range []string{
		"link set lo up", "link add eth0 address " + mac + " type veth peer name swp7", "link set eth0 up", "link set swp7 up",
	} {
		if said, err := exec.CommandContext(t.Context(), "ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", line, err, said)
		}
	}
	swp7, err := net.InterfaceByName("swp7")
	if err != nil {
		t.Fatal(err)
	}
	speaker, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(speaker)
	const frame = "\x01\x80\xc2\x00\x00\x0e" + "\x00\x1b\x54\xc2\x03\x07" + "\x88\xcc" +
		"\x02\x07\x04\x00\x1b\x54\xc2\x03\x00" + "\x04\x08\x05Gi1/0/7" + "\x06\x02\x00\x78" + "\x0a\x06leaf07" + "\x00\x00"

	s := newSite(t)
	told := func() (bool, <-chan struct{}) {
		s.mu.Lock()
		defer s.mu.Unlock()
		at := s.hellos[len(s.hellos)-1].Inventory.NICs[0].Neighbor
		return at != nil && *at == wire.Neighbor{Switch: "leaf07", Port: "Gi1/0/7"}, s.more
	}
	var once sync.Once
	s.set(func() {
		s.sealed = s.seal(t, func(w *wire.Script) { w.Transports = []string{"http"} })
		s.pace = func(int64) {
			once.Do(func() {
				if known, _ := told(); known {
					t.Error("it is told what nobody said")
				}
				if err := syscall.Sendto(speaker, []byte(frame), 0, &syscall.SockaddrLinklayer{Ifindex: swp7.Index}); err != nil {
					t.Error(err)
				}
				limit := time.After(time.Minute)
				for {
					known, more := told()
					if known {
						return
					}
					select {
					case <-more:
					case <-limit:
						t.Error("the server is not told")
						return
					}
				}
			})
		}
	})
	root := filepath.Join(t.TempDir(), "root")
	cmd, out := agentProcess(t, "run", "--api", s.URL, "--http", s.URL, "--site", s.file, "--root", root, "--mac", mac, "--listen", "")
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkInstalled(t, root)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.hellos) != 2 || s.hellos[0].Boot != s.hellos[1].Boot {
		t.Errorf("hellos: %+v, want two of one start", s.hellos)
	}
}

func TestInstallFromAFile(t *testing.T) {
	s := newSite(t)
	script := filepath.Join(t.TempDir(), "script.json")
	root := filepath.Join(t.TempDir(), "root")
	args := []string{"install", "--script", script, "--site", s.file, "--http", s.URL, "--root", root, "--listen", "", "--end", "exit"}
	httpOnly := s.seal(t, func(w *wire.Script) { w.Transports = []string{"http"} })

	for name, tt := range map[string]struct {
		script []byte
		says   string
	}{
		"flipped": {flipPayload(t, httpOnly), "signature does not match the site's key"},
		"foreign": {(&site{version: s.version, key: ed25519.NewKeyFromSeed(make([]byte, 32))}).seal(t, nil), "signature does not match the site's key"},
		"junk":    {[]byte("{}x"), "script: envelope"},
	} {
		if err := os.WriteFile(script, tt.script, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd, out := agentProcess(t, args...)
		if code := exitCode(cmd.Run()); code != 1 || !strings.Contains(out.String(), tt.says) {
			t.Errorf("%s script: exit code %d\n%s", name, code, out)
		}
		if _, err := os.Stat(root); err == nil {
			t.Errorf("%s script: the root was touched", name)
		}
	}

	// The first bytes of one piece are wrong, once: refused and fetched again.
	spoilt := false
	s.set(func() {
		s.corrupt = func(b []byte, off int64) []byte {
			if !spoilt && off > 1<<20 {
				spoilt = true
				return installtest.Flip(b)
			}
			return b
		}
	})
	if err := os.WriteFile(script, httpOnly, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd, out := agentProcess(t, args...)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkInstalled(t, root)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !spoilt || !strings.Contains(out.String(), "piece hash differs") {
		t.Errorf("the console says nothing of the bad piece:\n%s", out)
	}
	if log, err := os.ReadFile(filepath.Join(root, install.LogFile)); err != nil || !strings.Contains(string(log), "piece hash differs") {
		t.Errorf("nor does the log: %v\n%s", err, log)
	}
}

// A swarm in which nobody is: HTTP joins it after 20 seconds, and the server
// hears that and why.
func TestHTTPJoinsASilentSwarm(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.set(func() { s.sealed = s.seal(t, nil) })
	root := filepath.Join(t.TempDir(), "root")
	cmd, out := agentProcess(t, "run", "--api", s.URL, "--http", s.URL, "--site", s.file, "--root", root,
		"--mac", "52:54:00:aa:00:01", "--listen", "127.0.0.1:0", "--seed-for", "0s")
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkInstalled(t, root)
	s.mu.Lock()
	defer s.mu.Unlock()
	const want = "http joins bittorrent: no new bytes for 20s (layer "
	if !slices.ContainsFunc(s.events, func(e wire.Event) bool {
		return e.Phase == wire.PhasePlan && e.State == wire.Switched && strings.HasPrefix(e.Text, want)
	}) || !strings.Contains(out.String(), "rookery: plan: "+want) {
		t.Errorf("no %q among the events or on the console\n%s", want, out)
	}
}

// With one source an installation ends as it does with all: scripts, manifests
// and torrents come from the server in any case, the index is a part of the
// layer. A source that is not there is told of when it was asked.
func TestEachTransportAlone(t *testing.T) {
	for _, tt := range []struct {
		transports  string
		swarm, http bool   // what is there
		switched    string // "PHASE TEXT", the beginning; "" for none
	}{
		{transports: "bittorrent", swarm: true},
		{transports: "http", http: true},
		{transports: "bittorrent http", swarm: true},
		{transports: "http bittorrent", http: true},
		{transports: "http bittorrent", swarm: true, switched: "plan bittorrent joins http: "},
	} {
		t.Run(tt.transports, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			if tt.swarm {
				s.seed(t)
			}
			s.set(func() {
				s.deny = !tt.http
				s.sealed = s.seal(t, func(w *wire.Script) { w.Transports = strings.Fields(tt.transports) })
			})
			root := filepath.Join(t.TempDir(), "root")
			cmd, out := agentProcess(t, "run", "--api", s.URL, "--http", s.URL, "--site", s.file, "--root", root,
				"--mac", "52:54:00:aa:00:01", "--listen", "127.0.0.1:0")
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			checkInstalled(t, root)
			s.mu.Lock()
			defer s.mu.Unlock()
			if tt.http != (s.served > 0) {
				t.Errorf("%d bytes came by HTTP", s.served)
			}
			var switched []string
			for _, e := range s.events {
				switch e.State {
				case wire.Failed:
					t.Errorf("%s failed: %s", e.Phase, e.Text)
				case wire.Switched:
					switched = append(switched, string(e.Phase)+" "+e.Text)
				}
			}
			if tt.switched == "" && switched != nil || tt.switched != "" && (len(switched) != 1 || !strings.HasPrefix(switched[0], tt.switched) || !strings.Contains(switched[0], "404")) {
				t.Errorf("switched: %q, want %q", switched, tt.switched)
			}
		})
	}
}

// Killed in the middle and started again, it fetches what is missing.
func TestKilledAgentGoesOn(t *testing.T) {
	t.Run("in a directory", func(t *testing.T) { testKilled(t, "") })
	t.Run("on a disk", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("loop devices and mounts need root: run the test as root")
		}
		disk := filepath.Join(t.TempDir(), "disk.img")
		if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 1<<30)); err != nil {
			t.Fatal(err)
		}
		testKilled(t, disk)
	})
}

func testKilled(t *testing.T, disk string) {
	s := newSite(t)
	script, root := filepath.Join(t.TempDir(), "script.json"), filepath.Join(t.TempDir(), "root")
	if err := os.WriteFile(script, s.seal(t, func(w *wire.Script) { w.Transports = []string{"http"} }), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"install", "--script", script, "--site", s.file, "--http", s.URL, "--root", root, "--listen", ""}
	if disk != "" {
		args = append(args, "--disk", disk, "--firmware", "bios", "--no-loader")
		t.Cleanup(func() { _ = syscall.Unmount(root, 0) }) // where the test ends early
	}
	size := s.version.Layers[0].Size
	middle, killed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.set(func() {
		s.pace = func(served int64) {
			time.Sleep(5 * time.Millisecond) // a server of 6 MB/s: the disk is there before the layer is
			if served > size*3/4 {
				once.Do(func() { close(middle) })
				<-killed
			}
		}
	})
	cmd, out := agentProcess(t, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-middle
	staged := filepath.Join(root, install.StagingDir, s.version.Layers[0].Digest.Hex())
	var st syscall.Stat_t
	look, limit := time.NewTicker(10*time.Millisecond), time.After(time.Minute) // another process writes it
	defer look.Stop()
	for syscall.Stat(staged, &st) != nil || st.Blocks*512 < size/2 {
		select {
		case <-look.C:
		case <-limit:
			t.Fatalf("%d of %d bytes are staged\n%s", st.Blocks*512, size, out)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if disk != "" {
		if err := syscall.Unmount(root, 0); err != nil {
			t.Fatal(err)
		}
	}
	close(killed)
	s.set(func() { s.served = 0 })
	cmd, out = agentProcess(t, args...)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if disk == "" {
		checkInstalled(t, root)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.served > size*3/4 {
		t.Errorf("%d of %d bytes were served again, with half of them there", s.served, size)
	}
	if !strings.Contains(out.String(), "fetch: pieces were there already") {
		t.Errorf("it does not say what it kept\n%s", out)
	}
}

func flipPayload(t *testing.T, sealed []byte) []byte {
	t.Helper()
	var e struct {
		Payload   []byte `json:"payload"`
		Signature []byte `json:"signature"`
	}
	if err := json.Unmarshal(sealed, &e); err != nil {
		t.Fatal(err)
	}
	e.Payload = bytes.Replace(e.Payload, []byte(`"n1"`), []byte(`"n2"`), 1)
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A script that is not the site's: the server hears of it, nothing is touched,
// the agent asks on and carries out the right one.
func TestRunRefusesAForeignScript(t *testing.T) {
	s := newSite(t)
	right := s.seal(t, func(w *wire.Script) { w.Transports = []string{"http"} })
	s.set(func() { s.sealed = flipPayload(t, right) })
	root := filepath.Join(t.TempDir(), "root")
	cmd, out := agentProcess(t, "run", "--api", s.URL, "--http", s.URL, "--site", s.file, "--root", root,
		"--mac", "52:54:00:aa:00:01", "--listen", "")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	failed := func(says string) (bool, <-chan struct{}) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return slices.ContainsFunc(s.events, func(e wire.Event) bool {
			return e.Phase == wire.PhaseScript && e.State == wire.Failed && strings.Contains(e.Text, says)
		}), s.more
	}
	hears := func(says string) {
		limit := time.After(time.Minute)
		for {
			heard, more := failed(says)
			if heard {
				return
			}
			select {
			case <-more:
			case <-limit:
				t.Fatalf("the server never heard of %q\n%s", says, out)
			}
		}
	}
	hears("signature")
	another := s.seal(t, func(w *wire.Script) { w.Node = "n2" })
	s.set(func() { s.sealed = another })
	hears("is for n2, and this machine is n1")
	if _, err := os.Stat(root); err == nil {
		t.Error("the root was touched")
	}
	s.set(func() { s.sealed = right })
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkInstalled(t, root)
}

// Onto a disk: an image file with partitions, filesystems and all, that can be
// mounted afterwards.
func TestInstallOntoADisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loop devices and mounts need root: run the test as root")
	}
	s := newSite(t)
	dir := t.TempDir()
	script, disk, root := filepath.Join(dir, "script.json"), filepath.Join(dir, "disk.img"), filepath.Join(dir, "root")
	if err := os.WriteFile(script, s.seal(t, func(w *wire.Script) { w.Transports = []string{"http"} }), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"install", "--script", script, "--site", s.file, "--http", s.URL, "--root", root, "--listen", "",
		"--disk", disk, "--firmware", "bios", "--no-loader"}

	// First an image that could not be started, and a disk that is too small:
	// nothing is written.
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 800<<20)); err != nil {
		t.Fatal(err)
	}
	cmd, out := agentProcess(t, append(args[:len(args)-2:len(args)-2], "uefi")...)
	if err := cmd.Run(); exitCode(err) != 1 || !strings.Contains(out.String(), "plan: image tiny:1: loader: the image has no GRUB for uefi") {
		t.Errorf("no GRUB: %v\n%s", err, out)
	}
	if b, err := os.ReadFile(disk); err != nil || len(bytes.Trim(b, "\x00")) > 0 {
		t.Errorf("the disk was written to (%v)", err)
	}
	for _, size := range []int64{64 << 20, 1 << 30} {
		if err := os.WriteFile(disk, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(disk, size); err != nil {
			t.Fatal(err)
		}
		cmd, out := agentProcess(t, args...)
		err := cmd.Run()
		if size == 1<<30 {
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			continue
		}
		if exitCode(err) != 1 || !strings.Contains(out.String(), "disk.img holds 67108864 bytes, layout needs") {
			t.Errorf("too small: %v\n%s", err, out)
		}
		if b, err := os.ReadFile(disk); err != nil || len(bytes.Trim(b, "\x00")) > 0 {
			t.Errorf("the small disk was written to (%v)", err)
		}
	}

	if entries, err := os.ReadDir(root); err != nil || len(entries) > 0 {
		t.Errorf("%s is still mounted: %v, %v", root, entries, err)
	}
	disks, err := oneDisk(disk)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := disklayout.Fit(disklayout.Default(), disks, disklayout.BIOS, installtest.Script(s.version).ID)
	if err != nil {
		t.Fatal(err)
	}
	attached, detach, err := apply.Attach(plan)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := detach(); err != nil {
			t.Error(err)
		}
	}()
	unmount, err := apply.Mount(attached, root)
	if err != nil {
		t.Fatal(err)
	}
	checkInstalled(t, root)
	if fstab, err := os.ReadFile(filepath.Join(root, "etc/fstab")); err != nil || !strings.Contains(string(fstab), plan.At("/").FSUUID) {
		t.Errorf("fstab: %s, %v", fstab, err)
	}
	if err := unmount(); err != nil {
		t.Error(err)
	}
}

// By rsync alone onto a disk, when the server has made the files; and where the
// server has no rsync, the other transports go on, and it is said why.
func TestRsync(t *testing.T) {
	s := newSite(t)
	script, root := filepath.Join(t.TempDir(), "script.json"), filepath.Join(t.TempDir(), "root")
	disk, files := filepath.Join(t.TempDir(), "disk.img"), t.TempDir()
	layers, done, err := s.images.Layers(t.Context(), s.version)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if _, err := image.Extract(t.Context(), files, image.Options{Unprivileged: os.Geteuid() != 0}, layers...); err != nil {
		t.Fatal(err)
	}
	daemon := rsynctest.Start(t, files) // skips where not root
	s.trees = []wire.Tree{{Total: 7}, {Done: 3, Total: 7}, {Module: rsynctest.Module, Port: daemon.Port()}}
	write := func(transports ...string) {
		t.Helper()
		sealed := s.seal(t, func(w *wire.Script) { w.Transports = transports })
		if err := os.WriteFile(script, sealed, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("rsync")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 1<<30)); err != nil {
		t.Fatal(err)
	}
	args := []string{"install", "--script", script, "--site", s.file, "--http", s.URL, "--root", root, "--listen", ""}
	onDisk := slices.Concat(args, []string{"--disk", disk, "--firmware", "bios", "--no-loader"})
	cmd, out := agentProcess(t, onDisk...)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(out.String(), "rookery: end: finished") {
		t.Errorf("it does not say that it ended\n%s", out)
	}
	if s.served > s.version.Layers[0].Size/2 {
		t.Errorf("%d bytes of the layer came by HTTP, want the index", s.served)
	}

	s.set(func() { s.trees = nil })
	write("rsync", "http")
	cmd, out = agentProcess(t, args...)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkInstalled(t, root)
	if want := "rookery: fetch: http takes over from rsync: rsync: " + s.URL + wire.PathTrees; !strings.Contains(out.String(), want) ||
		!strings.Contains(out.String(), "500 Internal Server Error: rsync: the server runs without it") {
		t.Errorf("it does not say %q, and why\n%s", want, out)
	}
}

// By ssh, from a server that offers nothing else.
func TestRsyncBySSH(t *testing.T) {
	if err := rsyncd.Available(); err != nil {
		t.Skipf("rsync: %v: run as root, with Debian's package rsync", err)
	}
	s := newSite(t)
	ours, err := keys.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	hostKey, err := ours.HostKey()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &rsyncd.Server{
		Dir: t.TempDir(), Store: s.images, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), SSH: ln, HostKey: hostKey,
		Needed: func(context.Context) (map[wire.Digest]bool, error) { return nil, nil },
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx) }()
	defer func() { stop(); <-ended }()
	var tree wire.Tree
	transporttest.Until(t, func() bool {
		if tree, err = server.Tree(ctx, s.version.Manifest); err != nil {
			t.Fatal(err)
		}
		return tree.Module != ""
	})
	s.set(func() { s.trees = []wire.Tree{tree} })
	script, root := filepath.Join(t.TempDir(), "script.json"), filepath.Join(t.TempDir(), "root")
	trusted, _ := json.Marshal(wire.Site{Key: s.key.Public().(ed25519.PublicKey), CA: ours.Public().CA})
	sealed := s.seal(t, func(w *wire.Script) { w.Transports = []string{"rsync"} })
	if err := errors.Join(os.WriteFile(s.file, trusted, 0o600), os.WriteFile(script, sealed, 0o600)); err != nil {
		t.Fatal(err)
	}
	cmd, out := agentProcess(t, "install", "--script", script, "--site", s.file, "--http", s.URL, "--root", root, "--listen", "")
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkInstalled(t, root)
	if s.served > s.version.Layers[0].Size/2 {
		t.Errorf("%d bytes of the layer came by HTTP, want the index", s.served)
	}
}

func TestUsage(t *testing.T) {
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"", 2, "Usage:"},
		{"help", 0, "Exit codes"},
		{"dance", 2, `unknown command "dance"`},
		{"install --help", 0, "ERASES"},
		{"install --root x --http y", 2, "--script is missing"},
		{"install --http y --script z", 2, "--root is missing"},
		{"run --root x --http y", 2, "--api is missing"},
		{"run --root x --http y --api z --mac 1", 2, "--mac: address 1"},
		{"run --root x --http y --end reboot", 2, "can only exit"},
		{"run --root x --http y --firmware coreboot", 2, "want bios or uefi"},
		{"run --frob", 2, "frob"},
		{"run --seed-for -1s", 2, "want 0 or more"},
		{"run --seed-for soon", 2, "invalid duration"},
		{"install --script a --root x --http y --site /nonexistent", 1, "/nonexistent: no such file"},
		{"run --root x --http y --api z --disk /nonexistent", 1, "open /nonexistent: no such file"},
		{"run --root x --http y --api z --disk /dev", 1, "/dev is neither an image file nor a disk"},
		{"run --root x --http y --api z --disk /dev/null", 1, "/dev/null is neither an image file nor a disk"},
	} {
		var out bytes.Buffer
		if code := command(t.Context(), strings.Fields(tt.args), &out, &out); code != tt.code || !strings.Contains(out.String(), tt.says) {
			t.Errorf("%q: exit code %d, want %d and %q\n%s", tt.args, code, tt.code, tt.says, out.String())
		}
	}
}

func TestServers(t *testing.T) {
	lease := netup.Lease{NextServer: netip.MustParseAddr("10.0.0.1")}
	for cmdline, want := range map[string][2]string{
		"": {"https://10.0.0.1:443", "http://10.0.0.1:80"},
		"console=tty0 rookery.api=https://192.0.2.1:8443 rookery.http=http://192.0.2.1:8080\n": {"https://192.0.2.1:8443", "http://192.0.2.1:8080"},
		"rookery.api=junk rookery.http=": {"https://10.0.0.1:443", "http://10.0.0.1:80"},
	} {
		api, http := servers(cmdline, lease)
		if api != want[0] || http != want[1] {
			t.Errorf("servers(%q) = %s %s, want %v", cmdline, api, http, want)
		}
	}
}

func TestWaiting(t *testing.T) {
	got := waiting("52:54:00:aa:00:01", "new\x1b[2J")
	if !strings.Contains(got, "waiting: this machine is 52:54:00:aa:00:01 - accept it with:") || strings.Contains(got, "\x1b") {
		t.Error(got)
	}
}
