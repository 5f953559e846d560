package swarmtests

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rookery/lab"
)

func TestServerKilledAndBack(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.begun(0.3)
	back := s.outage()
	s.done(s.nodes)
	s.within(back + ideal)
	s.ended()
}

// outage is a server that is killed and back after 10 s: when that was.
func (s *story) outage() (back time.Duration) {
	s.t.Helper()
	s.server.PowerOff()
	s.note("the server is gone")
	s.lasts(10 * time.Second)
	s.serve()
	s.note("the server is back")
	return time.Since(s.start)
}

func TestServerKilledAfterOneCopy(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.begun(0.8)
	found := make([]bool, len(s.info.Hashes))
	s.until("the nodes have one copy between them", func() bool { return s.whole(s.nodes, found) })
	s.server.PowerOff()
	s.note("the server is gone for good")
	fetching := 0
	for _, n := range s.nodes {
		if !said(n, `rookery: fetch: finished`) {
			fetching++
		}
	}
	if fetching == 0 {
		t.Error("every node had all already")
	}
	var sent int64
	for _, g := range s.done(s.nodes) {
		sent += g.server
	}
	if sent > s.data.Size*11/10 {
		t.Errorf("the server gave %d bytes away, the image has %d", sent, s.data.Size)
	}
	s.within(ideal * 3 / 2)
}

// The seeder stays: what is refused is the port of tracker and files.
func TestTrackerGone(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.begun(0.1)
	s.on(s.server, "iptables", "--append", "INPUT", "--protocol", "tcp", "--dport", "80", "--jump", "REJECT", "--reject-with", "tcp-reset")
	s.note("the tracker is gone")
	for _, n := range s.nodes {
		s.expect(n, `swarm: tracker.*refused`)
	}
	s.done(s.nodes)
	s.never(s.nodes, `joins`)
	s.within(ideal * 3 / 2)
}

func TestHalfOfThePeersKilled(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.begun(0.4)
	for _, n := range s.nodes[:nodes/2] {
		n.PowerOff()
	}
	s.note("half of the nodes are gone")
	s.done(s.nodes[nodes/2:])
	s.within(ideal * 2)
}

func TestPeersThatSendBadPieces(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.serve()
	liars := []*member{s.bad("liar", "10.7.0.51"), s.bad("false-server", "10.7.0.52")}
	s.install(s.nodes)
	s.done(s.nodes)
	s.within(ideal * 3 / 2)
	for _, l := range liars {
		banned := 0
		for _, n := range s.nodes {
			if said(n, `swarm: banned.*`+regexp.QuoteMeta(l.host.Address.String()+":")) {
				banned++
			}
		}
		if banned == 0 {
			t.Errorf("nobody banned the %s", l.Name)
		}
		_, sent, err := l.host.Traffic()
		s.must(err)
		s.note("%s was banned by %d nodes and sent %d bytes", l.Name, banned, sent)
	}
}

func TestPeersThatNeverAnswer(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.serve()
	mute, promising := s.bad("mute", "10.7.0.51"), s.bad("promising", "10.7.0.52")
	s.expect(mute, "announced")
	s.expect(promising, "announced")
	s.install(s.nodes)
	s.expect(mute, "greeted")
	s.expect(promising, "asked for a piece")
	s.done(s.nodes)
	s.within(ideal + 15*time.Second)
}

func TestPartitionThatHeals(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.begun(0.3)
	cut := s.nodes[nodes/2:]
	var hosts []*lab.Host
	for _, n := range cut {
		hosts = append(hosts, n.host)
	}
	heal, err := network.Split(hosts)
	s.must(err)
	s.note("half of the nodes are cut off")
	s.lasts(15 * time.Second)
	for _, n := range cut {
		if said(n, `rookery: fetch: finished`) {
			t.Errorf("%s is done without the server", n.Name)
		}
	}
	s.must(heal())
	s.note("the network is whole again")
	healed := time.Since(s.start)
	s.done(s.nodes)
	s.within(healed + ideal + 15*time.Second)
	s.ended()
}

func TestPeerThatJoinsLate(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.serve()
	others, late := s.nodes[:nodes-1], s.nodes[nodes-1:]
	s.install(others)
	s.have(others, 0.9)
	joined := time.Now()
	s.install(late)
	s.done(others)
	g := s.done(late)[0]
	if g.peers < g.server {
		t.Errorf("%d bytes from the server and %d from others", g.server, g.peers)
	}
	if took := time.Since(joined); took > ideal*3/2 {
		t.Errorf("took %s, want at most %s", took, ideal*3/2)
	}
	s.ended()
}

func TestServerStopped(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.begun(0.3)
	s.must(s.server.Signal(syscall.SIGSTOP))
	s.note("the server stands still")
	s.lasts(30 * time.Second)
	s.must(s.server.Signal(syscall.SIGCONT))
	s.note("the server goes on")
	back := time.Since(s.start)
	s.done(s.nodes)
	s.within(back + ideal + 10*time.Second)
	s.ended()
}

func TestDiskFull(t *testing.T) {
	s := begin(t, 2*time.Minute)
	others, full := s.nodes[:nodes-1], s.nodes[nodes-1]
	s.begun(0.4)
	s.fill(full.root)
	s.note("the disk of %s is full", full.Name)
	s.expect(full, `rookery: fetch: FAILED after .*no space left on device.* has \d+ of \d+ bytes`)
	select {
	case <-full.Off():
	case <-s.ctx.Done():
		t.Fatalf("%s does not end", full.Name)
	}
	s.done(others)
	s.within(ideal * 3 / 2)
}

// What strangers open costs them, and not those who have something to say.
func TestCrowdsThatSayNothing(t *testing.T) {
	s := begin(t, 2*time.Minute)
	s.serve()
	crowd := s.bad("crowd", "10.7.0.51", serverAddress+peerPort)
	s.expect(crowd, "all have been there")
	s.bad("crowd", "10.7.0.52", s.nodes[0].host.Address.String()+peerPort)
	s.install(s.nodes)
	s.done(s.nodes)
	s.never(s.nodes, `joins`)
	s.within(2 * ideal)
}

// fill leaves no room in dir.
func (s *story) fill(dir string) {
	s.t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	s.must(err)
	defer f.Close()
	_, err = io.Copy(f, zeros{})
	if !errors.Is(err, unix.ENOSPC) {
		s.t.Fatalf("%s: %v, want %v", dir, err, unix.ENOSPC)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
