package swarmtests

import (
	"bytes"
	"context"
	"crypto/sha1"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rookery/lab"
	"rookery/transport"
	"rookery/wire"
)

// What every story has: the server's link and each node's carry the image in a
// quarter of a minute.
const (
	nodes     = 8
	mbit      = 20
	mtu       = 9000
	imageSize = 32 << 20
	ideal     = imageSize * 8 / mbit * time.Microsecond
	seedFor   = 60 * time.Second
)

const (
	serverAddress = "10.7.0.2"
	siteURL       = "http://" + serverAddress + ":80"
	peerPort      = ":6881"
)

// network is the lab's, nil when the stories are not wanted.
var network *lab.Network

func TestMain(m *testing.M) {
	if kind := os.Getenv(badPeer); kind != "" {
		if err := misbehave(kind, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv("ROOKERY_SWARM") != "1" {
		os.Exit(m.Run())
	}
	code, err := lab.Enter(func(n *lab.Network) int {
		network = n
		return m.Run()
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// dataset is the image of all stories.
var dataset = sync.OnceValues(func() (*lab.Dataset, error) {
	out, err := filepath.Abs("../out")
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(out, "swarm", "dataset")
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), lab.Within(time.Minute))
	defer cancel()
	return lab.NewDataset(ctx, lab.In(out), dir, imageSize)
})

// A story is a server and its nodes, switched off.
type story struct {
	t      *testing.T
	ctx    context.Context // ends with the story's time
	dir    string          // what the programs say, kept when the story fails
	data   *lab.Dataset
	info   transport.Info
	server *member
	nodes  []*member
	start  time.Time // of the nodes
}

// A member is a host and the one program on it.
type member struct {
	*lab.Program
	host *lab.Host
	root string // what a node installs into
}

// A way is how the nodes of a story get the image.
type way struct {
	transports []string
	groups     *wire.Multicast
	serve      []string // flags of the server
}

func begin(t *testing.T, limit time.Duration) *story {
	return beginBy(t, limit, way{transports: []string{"bittorrent", "http"}})
}

func beginBy(t *testing.T, limit time.Duration, by way) *story {
	t.Helper()
	if network == nil {
		t.Skip("takes minutes: make swarm runs it (ROOKERY_SWARM=1 with out/ made)")
	}
	all, err := dataset()
	if err != nil {
		t.Fatal(err)
	}
	copied := *all
	data := &copied
	data.Multicast = by.groups
	info, err := transport.ParseTorrent(data.Torrent)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, fmt.Errorf("the story's %s are over", limit))
	t.Cleanup(cancel)
	s := &story{t: t, ctx: ctx, data: data, info: info}
	s.dir, err = filepath.Abs(filepath.Join("../out/swarm", t.Name()))
	s.must(err)
	s.must(os.RemoveAll(s.dir))
	s.must(os.MkdirAll(s.dir, 0o755))
	t.Cleanup(func() {
		if !t.Failed() {
			s.must(os.RemoveAll(s.dir))
		}
	})
	// In memory: the disks of eight machines are more than the one there is. A
	// host has the mounts that were there before it.
	for i := range nodes {
		s.mount(s.root(i), 4*imageSize)
	}
	t.Cleanup(func() { s.must(network.Close()) })
	s.server = s.member("server", serverAddress, append([]string{data.Programs.Rookery, "--state", data.State,
		"serve", "--interface", "eth0", "--address", serverAddress, "--without", "dhcp,tftp,radvd"}, by.serve...)...)
	for i := range nodes {
		name := nodeName(i)
		script := s.path(name + ".script")
		s.must(os.WriteFile(script, data.Script(i, seedFor, by.transports...), 0o600))
		n := s.member(name, fmt.Sprintf("10.7.0.%d", 11+i), data.Programs.Agent, "install", "--script", script,
			"--site", data.Site, "--http", siteURL, "--root", s.root(i))
		n.root = s.root(i)
		s.nodes = append(s.nodes, n)
	}
	return s
}

func nodeName(i int) string { return fmt.Sprintf("n%d", i+1) }

func (s *story) root(i int) string { return s.path(nodeName(i) + ".root") }

func (s *story) path(name string) string { return filepath.Join(s.dir, name) }

func (s *story) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// member makes a host with a program that ends with the story.
func (s *story) member(name, addr string, args ...string) *member {
	s.t.Helper()
	host, err := network.Host(name, "", netip.MustParseAddr(addr))
	s.must(err)
	s.must(host.Link(mbit, mtu))
	m := &member{Program: host.Program(name, s.path(name+"-"+addr+".log"), args...), host: host}
	s.t.Cleanup(m.PowerOff)
	return m
}

// mount mounts memory of so many bytes.
func (s *story) mount(dir string, size int64) {
	s.t.Helper()
	s.must(os.Mkdir(dir, 0o755))
	s.must(unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
	s.t.Cleanup(func() { s.must(unix.Unmount(dir, unix.MNT_DETACH)) })
}

// serve starts the server and returns when it serves.
func (s *story) serve() {
	s.t.Helper()
	s.must(s.server.PowerOn())
	s.expect(s.server, "msg=serving ")
}

// install starts nodes.
func (s *story) install(which []*member) {
	s.t.Helper()
	if s.start.IsZero() {
		s.start = time.Now()
	}
	for _, n := range which {
		s.must(n.PowerOn())
	}
}

// begun starts the server and all nodes, and returns when they have so much of
// the image on the average.
func (s *story) begun(part float64) {
	s.t.Helper()
	s.serve()
	s.install(s.nodes)
	s.have(s.nodes, part)
}

// have waits until nodes have received so much of the image on the average.
func (s *story) have(which []*member, part float64) {
	s.t.Helper()
	s.until(fmt.Sprintf("nodes have %.0f %%", 100*part), func() bool {
		var sum int64
		for _, n := range which {
			s.running(n)
			received, _, err := n.host.Traffic()
			s.must(err)
			sum += received
		}
		return sum >= int64(part*float64(len(which))*float64(s.data.Size))
	})
}

// running fails the story when a program has ended.
func (s *story) running(m *member) {
	s.t.Helper()
	if err := m.Console.Ended(); err != nil {
		s.t.Fatalf("%s: %v: %s", m.Name, err, m.Console.Tail(3))
	}
}

// until looks at what has no event of its own.
func (s *story) until(what string, is func() bool) {
	s.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			s.t.Fatalf("%s: %v", what, context.Cause(s.ctx))
		}
	}
	s.note("%s", what)
}

// note says when something happened.
func (s *story) note(format string, args ...any) {
	s.t.Helper()
	at := time.Duration(0)
	if !s.start.IsZero() {
		at = time.Since(s.start)
	}
	s.t.Logf("%5.1f s: %s", at.Seconds(), fmt.Sprintf(format, args...))
}

// lasts is a time that the story itself needs.
func (s *story) lasts(d time.Duration) {
	s.t.Helper()
	select {
	case <-time.After(d):
	case <-s.ctx.Done():
		s.t.Fatal(context.Cause(s.ctx))
	}
}

func (s *story) expect(m *member, pattern string) []string {
	s.t.Helper()
	match, err := m.Console.Expect(s.ctx, pattern)
	if err != nil {
		s.t.Fatalf("%s: %v", m.Name, err)
	}
	return match
}

// A got is what a node got from whom, in bytes.
type got struct{ server, peers int64 }

// done waits until nodes have the whole image, compares it, and returns what
// each got from whom.
func (s *story) done(which []*member) (all []got) {
	s.t.Helper()
	for _, n := range which {
		line := s.expect(n, `rookery: fetch: finished after .*: (\d+) bytes from the server, (\d+) from other nodes`)
		s.expect(n, `rookery: linger: started`)
		var g got
		g.server, _ = strconv.ParseInt(line[1], 10, 64)
		g.peers, _ = strconv.ParseInt(line[2], 10, 64)
		s.note("%s is done: %.2f of the image from the server, %.2f from others", n.Name,
			float64(g.server)/float64(s.data.Size), float64(g.peers)/float64(s.data.Size))
		all = append(all, g)
	}
	for _, n := range which {
		if err := s.data.Check(n.root); err != nil {
			s.t.Errorf("%s: %v", n.Name, err)
		}
	}
	return all
}

// ended waits until nodes serve nobody any more and are at the end of their story.
func (s *story) ended() {
	s.t.Helper()
	for _, n := range s.nodes {
		s.expect(n, `rookery: end: finished`)
	}
	s.note("the nodes have ended")
}

// within checks that all that was waited for came in time.
func (s *story) within(limit time.Duration) {
	s.t.Helper()
	if took := time.Since(s.start); took > limit {
		s.t.Errorf("took %.1f s, want at most %.1f s", took.Seconds(), limit.Seconds())
	}
}

// whole says whether nodes have every piece between them, and adds those that
// they have to found.
func (s *story) whole(which []*member, found []bool) bool {
	s.t.Helper()
	missing := len(found)
	zeros, b := make([]byte, s.info.PieceLength), make([]byte, s.info.PieceLength)
	for _, m := range which {
		f, err := os.Open(filepath.Join(m.root, ".rookery", s.data.Digest.Hex()))
		s.must(err)
		missing = 0
		for n := range found {
			if found[n] {
				continue
			}
			b := b[:s.info.PieceSize(n)]
			_, err := f.ReadAt(b, int64(n)*s.info.PieceLength)
			found[n] = err == nil && !bytes.Equal(b, zeros[:len(b)]) && sha1.Sum(b) == s.info.Hashes[n]
			if !found[n] {
				missing++
			}
		}
		s.must(f.Close())
	}
	return missing == 0
}

// on runs a command on a host.
func (s *story) on(m *member, args ...string) {
	s.t.Helper()
	cmd := exec.CommandContext(s.ctx, args[0], args[1:]...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	s.must(m.host.Start(cmd))
	if err := cmd.Wait(); err != nil {
		s.t.Fatalf("%s: %v: %v: %s", m.Name, args, err, said.Bytes())
	}
}

// said says whether a member has said something like this by now.
func said(m *member, pattern string) bool {
	return regexp.MustCompile(pattern).MatchString(m.Console.Text())
}

// never checks that members said nothing like this.
func (s *story) never(which []*member, pattern string) {
	s.t.Helper()
	for _, m := range which {
		if line := regexp.MustCompile(".*(" + pattern + ").*").FindString(m.Console.Text()); line != "" {
			s.t.Errorf("%s said: %s", m.Name, line)
		}
	}
}

// announceURL is the site's tracker.
const announceURL = siteURL + wire.PathAnnounce
