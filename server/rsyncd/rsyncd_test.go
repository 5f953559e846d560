package rsyncd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/store"
	"rookery/server/site"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// publish makes a store that has tree as nasty:1.
func publish(t *testing.T, tree *imagetest.Tree) (*store.Store, store.Version) {
	t.Helper()
	images, err := store.Open(filepath.Join(t.TempDir(), "images"))
	if err != nil {
		t.Fatal(err)
	}
	v, err := images.Publish(t.Context(), "nasty:1", store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) {
		return image.Write(w, tree.Entries, tree.Open)
	}})
	if err != nil {
		t.Fatal(err)
	}
	return images, v
}

// running is a Server that runs.
type running struct {
	*Server
	end func() error
}

// serve runs s on ports of its own until the end of the test.
func serve(t *testing.T, s *Server, tlsConfig *tls.Config) *running {
	t.Helper()
	listen := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	s.Address, s.Plain = netip.MustParseAddr("127.0.0.1"), listen()
	if tlsConfig != nil {
		s.TLS = tls.NewListener(listen(), tlsConfig)
	}
	if s.Needed == nil {
		s.Needed = func(context.Context) (map[wire.Digest]bool, error) { return nil, nil }
	}
	if s.Log == nil {
		s.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	r := &running{Server: s}
	r.end = sync.OnceValue(func() error { stop(); return <-ended })
	t.Cleanup(func() {
		if err := r.end(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

// tree asks for a tree until it is there.
func (r *running) tree(t *testing.T, v store.Version) wire.Tree {
	t.Helper()
	var tree wire.Tree
	transporttest.Until(t, func() bool {
		var err error
		if tree, err = r.Tree(t.Context(), v.Manifest); err != nil {
			t.Fatal(err)
		}
		return tree.Module != ""
	})
	return tree
}

// stock runs the distribution's rsync, as anybody would.
func stock(t *testing.T, env []string, program string, args ...string) error {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", program, strings.Join(args, " "), err, out)
	}
	return nil
}

func needsRsync(t *testing.T) {
	t.Helper()
	if err := Available(); err != nil {
		t.Skipf("rsync: %v: run as root, with Debian's package rsync", err)
	}
}

// Everything that an image can have arrives at a stock client, plain and over
// TLS, by either name.
func TestStockClient(t *testing.T) {
	needsRsync(t)
	nasty := imagetest.Nasty()
	images, v := publish(t, nasty)
	keys, err := site.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	tlsConfig, err := keys.TLS()
	if err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, []byte(keys.Public().CA), 0o644); err != nil {
		t.Fatal(err)
	}
	s := serve(t, &Server{Dir: filepath.Join(t.TempDir(), "rsync"), Store: images}, tlsConfig)
	tree := s.tree(t, v)
	if tree.Module != v.Manifest.Hex() || tree.Name != "nasty-1" || tree.Address != "127.0.0.1" {
		t.Errorf("tree: %+v", tree)
	}
	for name, fetch := range map[string]func(dir string) error{
		"by digest": func(dir string) error {
			return stock(t, nil, "rsync", "-aHAXS", fmt.Sprintf("rsync://127.0.0.1:%d/%s/", tree.Port, tree.Module), dir)
		},
		"by name": func(dir string) error {
			return stock(t, nil, "rsync", "-aHAX", fmt.Sprintf("rsync://127.0.0.1:%d/nasty-1/", tree.Port), dir)
		},
		"TLS": func(dir string) error {
			env := []string{"RSYNC_SSL_TYPE=openssl", "RSYNC_SSL_CA_CERT=" + ca, "RSYNC_SSL_SKIP_HOSTNAME_CHECK=1"}
			return stock(t, env, "rsync-ssl", "-aHAX", fmt.Sprintf("rsync://127.0.0.1:%d/nasty-1/", tree.TLSPort), dir)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := fetch(dir); err != nil {
				t.Fatal(err)
			}
			imagetest.Same(t, imagetest.Snapshot(t, dir), nasty.Lines())
		})
	}
	for name, args := range map[string][]string{
		"modules are not listed": {fmt.Sprintf("rsync://127.0.0.1:%d/", tree.Port)},
		"nothing is written":     {ca, fmt.Sprintf("rsync://127.0.0.1:%d/nasty-1/etc/", tree.Port)},
		"nothing but modules":    {fmt.Sprintf("rsync://127.0.0.1:%d/nasty-1/../name", tree.Port), t.TempDir()},
	} {
		cmd := exec.CommandContext(t.Context(), "rsync", args...)
		out, err := cmd.Output()
		if len(args) > 1 && err == nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// daemonOf is the daemon that a process runs, 0 when none.
func daemonOf(t *testing.T, parent int) (pid int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // ended
		}
		var state string
		var ppid int
		_, rest, ok := strings.Cut(string(b), "(rsync) ")
		if _, err := fmt.Sscan(rest, &state, &ppid); ok && err == nil && ppid == parent && state != "Z" {
			fmt.Sscan(filepath.Base(filepath.Dir(file)), &pid)
		}
	}
	return pid
}

// A daemon that dies takes its connections with it, and is started again.
func TestDaemonKilled(t *testing.T) {
	needsRsync(t)
	big := imagetest.New().File("big", imagetest.Noise(1, 40<<20))
	images, v := publish(t, big)
	s := serve(t, &Server{Dir: filepath.Join(t.TempDir(), "rsync"), Store: images}, nil)
	tree := s.tree(t, v)
	from, to := fmt.Sprintf("rsync://127.0.0.1:%d/%s/", tree.Port, tree.Module), t.TempDir()

	first := 0
	transporttest.Until(t, func() bool { first = daemonOf(t, os.Getpid()); return first != 0 })
	cmd := exec.CommandContext(t.Context(), "rsync", "-a", "--bwlimit=4M", from, to)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	transporttest.Until(t, func() bool {
		found, err := filepath.Glob(filepath.Join(to, ".big.*"))
		return err == nil && len(found) > 0
	})
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the client was served by a daemon that was killed")
	}
	if err := stock(t, nil, "rsync", "-a", from, to); err != nil { // as soon as there is another one
		t.Error(err)
	}
	if second := daemonOf(t, os.Getpid()); second == 0 || second == first {
		t.Errorf("daemon %d after %d", second, first)
	}
	if err := s.end(); err != nil {
		t.Errorf("Run: %v", err)
	}
	if pid := daemonOf(t, os.Getpid()); pid != 0 {
		t.Errorf("daemon %d is left when the server has ended", pid)
	}
}

// asServer makes the test binary a server with that directory.
const asServer = "ROOKERY_TEST_AS_RSYNCD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(asServer); dir != "" {
		s := &Server{Dir: dir, Log: slog.New(slog.DiscardHandler)}
		s.Needed = func(context.Context) (map[wire.Digest]bool, error) { return nil, nil }
		var err error
		if s.Store, err = store.Open(filepath.Join(dir, "images")); err == nil {
			err = s.Run(context.Background())
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// Nothing is left of a server that is killed.
func TestServerKilled(t *testing.T) {
	needsRsync(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asServer+"="+t.TempDir())
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	daemon := 0
	transporttest.Until(t, func() bool { daemon = daemonOf(t, cmd.Process.Pid); return daemon != 0 })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	transporttest.Until(t, func() bool { return syscall.Kill(daemon, 0) == syscall.ESRCH })
}

func TestPauseAfter(t *testing.T) {
	pause := time.Duration(0)
	for _, tt := range []struct{ ran, want time.Duration }{
		{0, firstPause}, {time.Second, 2 * firstPause}, {0, 4 * firstPause}, {0, 8 * firstPause}, {0, 16 * firstPause},
		{0, 32 * firstPause}, {0, 64 * firstPause}, {0, longPause}, {0, longPause}, {healthy, firstPause}, {0, 2 * firstPause},
	} {
		if pause = pauseAfter(tt.ran, pause); pause != tt.want {
			t.Fatalf("after %v: %v, want %v", tt.ran, pause, tt.want)
		}
	}
}

func TestStays(t *testing.T) {
	for _, tt := range []struct {
		published, needed bool
		asked             time.Duration
		want              bool
	}{
		{true, true, 1000 * time.Hour, true},
		{true, false, 23 * time.Hour, true},
		{true, false, 25 * time.Hour, false},
		{false, true, 2 * time.Hour, false},
		{false, false, 50 * time.Minute, true},
	} {
		if got := stays(tt.published, tt.needed, tt.asked); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

// A server finds what an earlier one made, not what it was making, and removes
// what nobody needs any more.
func TestTreesStay(t *testing.T) {
	needsRsync(t)
	images, v := publish(t, imagetest.New().File("a", []byte("a")))
	dir := filepath.Join(t.TempDir(), "rsync")
	s := serve(t, &Server{Dir: dir, Store: images}, nil)
	s.tree(t, v)
	if _, err := s.Tree(t.Context(), wire.DigestOf(nil)); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Tree of no image: %v", err)
	}
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(dir, unfinished+wire.DigestOf(nil).Hex())
	if err := os.MkdirAll(half, 0o700); err != nil {
		t.Fatal(err)
	}
	inode := func() uint64 {
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(dir, v.Manifest.Hex()), &st); err != nil {
			return 0
		}
		return st.Ino
	}
	nameless := filepath.Join(dir, strings.Repeat("0", 64))
	if err := os.MkdirAll(nameless, 0o700); err != nil {
		t.Fatal(err)
	}
	before := inode()
	needed := map[wire.Digest]bool{v.Manifest: true}
	s = serve(t, &Server{Dir: dir, Store: images, Needed: func(context.Context) (map[wire.Digest]bool, error) { return needed, nil }}, nil)
	if tree := s.tree(t, v); tree.Module == "" || inode() != before {
		t.Errorf("the tree was made again: %+v", tree)
	}
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was half made: %v", err)
	}
	if _, err := os.Stat(nameless); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what nobody knows the name of: %v", err)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v: trees have programs that run as root", st.Mode(), err)
	}
	in := func(d time.Duration) bool {
		if err := s.remove(t.Context(), time.Now().Add(d)); err != nil {
			t.Fatal(err)
		}
		conf, err := os.ReadFile(s.config())
		if err != nil {
			t.Fatal(err)
		}
		there := inode() != 0
		if strings.Contains(string(conf), "[nasty-1]") != there {
			t.Errorf("the tree is there: %v, and the configuration says\n%s", there, conf)
		}
		return there
	}
	if !in(100 * time.Hour) {
		t.Error("a tree that is needed was removed")
	}
	needed = nil
	if !in(23 * time.Hour) {
		t.Error("a tree that was asked for today was removed")
	}
	if in(25 * time.Hour) {
		t.Error("a tree that nobody needs is there")
	}
	if tree := s.tree(t, v); tree.Module == "" || inode() == 0 {
		t.Errorf("asked for again: %+v", tree)
	}
}

// Two versions can have one name as modules: people are told of what is theirs.
func TestModuleNames(t *testing.T) {
	one, other := wire.Digest("sha256:"+strings.Repeat("1", 64)), wire.Digest("sha256:"+strings.Repeat("2", 64))
	s := &Server{Dir: t.TempDir(), trees: map[wire.Digest]*tree{
		one: {ready: true, name: "a-1:2"}, other: {ready: true, name: "a:1-2"},
	}}
	if err := s.configure(); err != nil {
		t.Fatal(err)
	}
	if a, b := s.trees[one].alias, s.trees[other].alias; a != "a-1-2" || b != other.Hex() {
		t.Errorf("modules %s and %s", a, b)
	}
	conf, err := os.ReadFile(s.config())
	if n := strings.Count(string(conf), "[a-1-2]"); err != nil || n != 1 {
		t.Errorf("%d modules a-1-2, %v", n, err)
	}
}

// A tree that does not leave room for the server is not made.
func TestTreeWithoutRoom(t *testing.T) {
	needsRsync(t)
	images, v := publish(t, imagetest.New().File("a", []byte("a")))
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=255m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, 0) })
	s := serve(t, &Server{Dir: dir, Store: images}, nil)
	var err error
	transporttest.Until(t, func() bool { _, err = s.Tree(t.Context(), v.Manifest); return err != nil })
	if !strings.Contains(err.Error(), "no space") {
		t.Errorf("Tree: %v", err)
	}
}

// What cannot be made is told to who asks, and tried again when somebody asks again.
func TestTreeThatCannotBeMade(t *testing.T) {
	needsRsync(t)
	images, v := publish(t, imagetest.New().File("a", imagetest.Noise(1, 1<<20)))
	layer := images.Path(v.Layers[0].Digest)
	if err := os.Rename(layer, layer+".gone"); err != nil {
		t.Fatal(err)
	}
	s := serve(t, &Server{Dir: filepath.Join(t.TempDir(), "rsync"), Store: images}, nil)
	var err error
	transporttest.Until(t, func() bool { _, err = s.Tree(t.Context(), v.Manifest); return err != nil })
	if want := "rsync: tree of nasty:1: "; !strings.HasPrefix(err.Error(), want) {
		t.Errorf("Tree: %v, want %s", err, want)
	}
	if err := os.Rename(layer+".gone", layer); err != nil {
		t.Fatal(err)
	}
	beside := s.config() + ".new" // where no file can be written now
	if err := os.MkdirAll(filepath.Join(beside, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	transporttest.Until(t, func() bool { _, err = s.Tree(t.Context(), v.Manifest); return err != nil })
	if want := "rsync: tree of nasty:1: open " + beside; !strings.HasPrefix(err.Error(), want) {
		t.Errorf("Tree: %v, want %s", err, want)
	}
	if err := os.RemoveAll(beside); err != nil {
		t.Fatal(err)
	}
	s.tree(t, v)
}

func TestUndated(t *testing.T) {
	for line, want := range map[string]string{
		"2026/11/26 20:00:00 [7] connect from x": "[7] connect from x",
		"2026/11/26":                             "2026/11/26",
		"rsync: failed to set up":                "rsync: failed to set up",
	} {
		if got := undated(line); got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}
