package swarmtests

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// byRsync has only the first nodes of the story, and these fetch by transports.
func (s *story) byRsync(transports ...string) {
	s.t.Helper()
	if os.Geteuid() != 0 {
		s.t.Skip("rsync's daemon sets groups: run as root")
	}
	s.nodes = s.nodes[:2]
	for i, n := range s.nodes {
		s.must(os.WriteFile(s.path(n.Name+".script"), s.data.Script(i, 0, transports...), 0o600))
	}
}

// daemons are the processes of rsync that serve the story's server's trees. The
// lab's processes have numbers of their own, which /proc does not know.
func (s *story) daemons() (pids []int) {
	s.t.Helper()
	proc := s.path("proc")
	if err := os.Mkdir(proc, 0o755); err == nil {
		s.must(unix.Mount("proc", proc, "proc", 0, ""))
		s.t.Cleanup(func() { s.must(unix.Unmount(proc, unix.MNT_DETACH)) })
	}
	files, err := filepath.Glob(proc + "/[0-9]*/cmdline")
	s.must(err)
	for _, file := range files {
		line, err := os.ReadFile(file)
		if err != nil || !bytes.HasPrefix(line, []byte("rsync\x00--daemon\x00")) {
			continue // it ended, or is another
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		s.must(err)
		pids = append(pids, pid)
	}
	return pids
}

// With rsync alone, over TLS, the daemon is killed in the middle, and then the
// server: each comes back, and nothing is sent twice but the file that was on its way.
func TestRsyncAlone(t *testing.T) {
	s := begin(t, 3*time.Minute)
	s.byRsync("rsync")
	s.begun(0.3)
	before := s.daemons()
	if len(before) == 0 {
		t.Fatal("no daemon runs")
	}
	for _, pid := range before { // its first one takes the others with it
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			t.Fatal(err)
		}
	}
	s.expect(s.server, "rsync daemon ended and is started again")
	s.note("the daemon is gone")
	s.have(s.nodes, 0.7)
	s.server.PowerOff()
	s.until("no daemon is left behind", func() bool { return len(s.daemons()) == 0 })
	s.lasts(5 * time.Second)
	s.serve()
	s.note("the server is back")
	for _, n := range s.nodes {
		s.expect(n, `rookery: end: finished`)
		if err := s.data.Check(n.root); err != nil {
			t.Errorf("%s: %v", n.Name, err)
		}
		received, _, err := n.host.Traffic()
		s.must(err)
		if received > s.data.Size*3/2 {
			t.Errorf("%s received %d bytes for an image of %d", n.Name, received, s.data.Size)
		}
	}
}

// When nothing comes of the pieces any more, rsync takes over.
func TestRsyncTakesOver(t *testing.T) {
	s := begin(t, 3*time.Minute)
	s.byRsync("bittorrent", "rsync")
	s.begun(0.5)
	s.on(s.server, "iptables", "--append", "INPUT", "--protocol", "tcp", "--dport", "6881", "--jump", "DROP")
	s.on(s.server, "iptables", "--append", "OUTPUT", "--protocol", "tcp", "--sport", "6881", "--jump", "DROP")
	s.note("the seeder is gone")
	for _, n := range s.nodes {
		s.expect(n, `rsync takes over from bittorrent: layer 0: .* pieces missing: bittorrent: `)
		s.expect(n, `rookery: end: finished`)
		if err := s.data.Check(n.root); err != nil {
			t.Errorf("%s: %v", n.Name, err)
		}
	}
}
