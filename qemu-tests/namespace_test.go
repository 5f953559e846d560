package qemutests

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"rookery/lab"
	"rookery/server/fleet"
	"rookery/wire"
)

// These stories need no firmware: their nodes are agents in namespaces.

// slow is an uplink, in Mbit/s, on which the image takes ten seconds.
const slow = 100

func TestTheSecondNodeGetsPiecesFromTheFirst(t *testing.T) {
	s := begin(t, 3*time.Minute, record(1, "")+record(2, ""))
	s.uplink(slow)
	s.must(s.server.Start(s.ctx))
	first := s.agent(1, 0)
	s.until(1, fetched(20))
	second := s.agent(2, 0)

	size := s.until(1, installed).Fetch.Total
	v := s.until(2, installed)
	s.gone(first.Off(), second.Off())
	s.holds(v)
	if v.Fetch.FromPeers == 0 {
		t.Errorf("n2 got all of its %d bytes from the server", v.Fetch.FromServer)
	}
	if v.Fetch.FromServer+v.Fetch.FromPeers < size {
		t.Errorf("n2 got %d bytes from the server and %d from others, the image has %d", v.Fetch.FromServer, v.Fetch.FromPeers, size)
	}
}

func TestAServerKilledInTheMiddleGoesOn(t *testing.T) {
	s := begin(t, 3*time.Minute, record(1, ""))
	s.uplink(slow)
	s.must(s.server.Start(s.ctx))
	node := s.agent(1, 0)
	before := s.until(1, fetched(20))
	s.must(s.server.Kill())
	s.must(s.server.Start(s.ctx))

	after := s.until(1, installed)
	s.gone(node.Off())
	if after.ID != before.ID || len(after.Boots) != 1 {
		t.Errorf("installation %s of boot %v became %s of %v", before.ID, before.Boots, after.ID, after.Boots)
	}
}

func TestANodePowerCycledInTheMiddleStartsAgain(t *testing.T) {
	s := begin(t, 3*time.Minute, record(1, ""))
	s.uplink(slow)
	s.must(s.server.Start(s.ctx))
	node := s.agent(1, 0)
	before := s.until(1, fetched(20))
	s.must(node.PowerCycle())

	after := s.until(1, installed)
	s.gone(node.Off())
	if after.ID != before.ID || len(after.Boots) != 2 {
		t.Errorf("installation %s of boots %v became %s of %v, want the same of two boots", before.ID, before.Boots, after.ID, after.Boots)
	}
}

func TestADiskTooSmallIsLeftAlone(t *testing.T) {
	s := begin(t, time.Minute, record(1, ""))
	s.must(s.server.Start(s.ctx))
	node := s.agent(1, 200<<20)
	tooSmall(t, s.until(1, failed), 200<<20)
	s.gone(node.Off())
	untouched(t, filepath.Join(node.Dir, "disk.img"))
}

func TestAScriptThatTheSiteDidNotSignIsRefused(t *testing.T) {
	s := begin(t, 3*time.Minute, record(1, ""))
	restore := s.impostor()
	node := s.agent(1, 0)
	refused(t, s.until(1, failed), wire.PhaseScript, "signature")
	untouched(t, filepath.Join(node.Dir, "disk.img"))

	// It went on asking, and follows the site when that is back.
	restore()
	s.retried(1, installed)
	s.gone(node.Off())
}

// Nobody has the right bytes of one piece: the node goes on without them, and
// takes them when they come.
func TestAPieceThatWasTamperedWithIsRefused(t *testing.T) {
	s := begin(t, 4*time.Minute, record(1, ""))
	blob, good := s.tamper()
	s.must(s.server.Start(s.ctx))
	node := s.agent(1, 0)
	s.expect(node.Console, `http: .* piece \d+: piece hash differs`)
	if v, err := s.server.Admin().Node(s.ctx, "n1"); err != nil || v.Phase != wire.PhaseFetch || v.Percent >= 100 {
		t.Errorf("n1 has a piece that nobody has: %s %.2f %% (%v)", v.Phase, v.Percent, err)
	}

	s.must(s.server.Kill())
	s.must(os.WriteFile(blob, good, 0o644))
	s.must(s.server.Start(s.ctx))
	s.until(1, installed)
	s.gone(node.Off())
}

// gone waits until machines have switched themselves off.
func (s *site) gone(machines ...<-chan struct{}) {
	s.t.Helper()
	for _, off := range machines {
		select {
		case <-off:
		case <-s.ctx.Done():
			s.t.Fatal("the machine does not end")
		}
	}
}

// retried waits for a node whose first attempt failed.
func (s *site) retried(n int, wanted func(fleet.View) bool) fleet.View {
	s.t.Helper()
	v, err := s.server.Until(s.ctx, fmt.Sprintf("n%d", n), wanted)
	if err != nil {
		s.t.Fatalf("n%d: %v (%+v)", n, err, v.Error)
	}
	return v
}

// impostor starts a server that has the site's certificate, and so the agents'
// ear, but not the key that signs scripts. restore puts the right one back.
func (s *site) impostor() (restore func()) {
	s.t.Helper()
	s.must(s.server.Kill())
	other := &lab.Server{Program: s.made.Rookery, State: filepath.Join(s.dir, "other")}
	s.must(s.made.Netboot(s.ctx, other))
	foreign, err := os.ReadFile(filepath.Join(other.State, "site", "script.key"))
	s.must(err)
	key := filepath.Join(s.server.State, "site", "script.key")
	own, err := os.ReadFile(key)
	s.must(err)
	s.must(os.WriteFile(key, foreign, 0o600))
	s.must(s.server.Start(s.ctx))
	return func() {
		s.t.Helper()
		s.must(s.server.Kill())
		s.must(os.WriteFile(key, own, 0o600))
		s.must(s.server.Start(s.ctx))
	}
}

// tamper changes one byte in the middle of the image's layer.
func (s *site) tamper() (path string, good []byte) {
	s.t.Helper()
	var image struct{ Layers []struct{ Blob string } }
	s.must(json.Unmarshal([]byte(s.rookery("image", "show", imageName, "-o", "json")), &image))
	path = image.Layers[0].Blob
	good, err := os.ReadFile(path)
	s.must(err)
	bad := append([]byte(nil), good...)
	bad[len(bad)/2] ^= 1
	s.must(os.WriteFile(path, bad, 0o644))
	return path, good
}

// refused checks where and why an installation failed.
func refused(t *testing.T, v fleet.View, step wire.Phase, why string) {
	t.Helper()
	if v.Error.Step != step || !strings.Contains(v.Error.Cause, why) {
		t.Errorf("%s failed with %s: %s, want %s: %s", v.Name, v.Error.Step, v.Error.Cause, step, why)
	}
	if installed(v) {
		t.Errorf("%s passes for installed", v.Name)
	}
}

// tooSmall checks that a disk was refused with both numbers.
func tooSmall(t *testing.T, v fleet.View, size int64) {
	t.Helper()
	refused(t, v, wire.PhasePlan, "too small")
	if !strings.Contains(v.Error.Cause, fmt.Sprint(size)) || strings.Count(v.Error.Cause, "bytes") == 0 || !strings.Contains(v.Error.Cause, "need") {
		t.Errorf("%q does not say that there are %d bytes, and what is needed", v.Error.Cause, size)
	}
}

// untouched checks that nothing was ever written to a disk.
func untouched(t *testing.T, disk string) {
	t.Helper()
	info, err := os.Stat(disk)
	if err != nil {
		t.Fatal(err)
	}
	if blocks := info.Sys().(*syscall.Stat_t).Blocks; blocks != 0 {
		t.Errorf("%s has %d blocks written", disk, blocks)
	}
}
