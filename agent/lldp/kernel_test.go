package lldp

import (
	"context"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rookery/netnstest"
	"rookery/wire"
)

// ip carries out lines of ip(8).
func ip(t *testing.T, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if said, err := exec.CommandContext(t.Context(), "ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", line, err, said)
		}
	}
}

// start runs a listener until the test ends.
func start(t *testing.T) *Listener {
	t.Helper()
	l, err := Listen(slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return l
}

// say sends frames by a card.
func say(t *testing.T, card string, frames ...[]byte) {
	t.Helper()
	nic, err := net.InterfaceByName(card)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, frame := range frames {
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: nic.Index}); err != nil {
			t.Fatalf("%s: %v", card, err)
		}
	}
}

// TestListener has real frames come by real cards: one that was there, and one that
// comes later.
func TestListener(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	ip(t, "link add eth0 address 52:54:00:00:00:01 type veth peer name swp7")
	l := start(t)
	ip(t, "link set eth0 up", "link set swp7 up")
	joined(t, "eth0")
	if got := l.Neighbor("52:54:00:00:00:01"); got != nil {
		t.Errorf("%v, and nobody has said anything", got)
	}
	news := func(want string) {
		t.Helper()
		select {
		case <-l.News:
		case <-time.After(30 * time.Second):
			t.Fatalf("nothing heard of %s", want)
		}
	}
	leaf := func(name string) []byte { return frame(chassis, port, ttl, tlv(5, name), end) }
	other := leaf("not for us")
	other[5] = 0
	say(t, "swp7", other, []byte("\x01\x80\xc2\x00\x00\x0e\x00\x1b\x54\xc2\x03\x07\x88\xcc\x02\xff"), leaf("leaf07"))
	news("leaf07")
	if got := l.Neighbor("52:54:00:00:00:01"); got == nil || *got != (wire.Neighbor{Switch: "leaf07", Port: "Gi1/0/7"}) {
		t.Errorf("%v, want leaf07 Gi1/0/7", got)
	}

	ip(t, "link add eth1 address 52:54:00:00:00:02 type veth peer name swp8", "link set eth1 up", "link set swp8 up")
	joined(t, "eth1")
	say(t, "swp7", leaf("leaf07")) // which is no news
	say(t, "swp8", leaf("leaf08"))
	news("leaf08")
	if got := l.Neighbor("52:54:00:00:00:02"); got == nil || got.Switch != "leaf08" {
		t.Errorf("%v, want leaf08", got)
	}

	// What is known outlives links and cards.
	ip(t, "link set swp7 down", "link del eth1")
	ip(t, "link set swp7 up")
	say(t, "swp7", leaf("leaf09"))
	until(t, "leaf09 is not heard", func() bool { return l.Neighbor("52:54:00:00:00:01").Switch == "leaf09" })
	if got := l.Neighbor("52:54:00:00:00:02"); got == nil || got.Switch != "leaf08" {
		t.Errorf("%v, want leaf08", got)
	}
}

// joined waits until a card lets the group in.
func joined(t *testing.T, card string) {
	t.Helper()
	until(t, card+" is not in the group", func() bool {
		groups, err := os.ReadFile("/proc/net/dev_mcast")
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(strings.Split(string(groups), "\n"), func(line string) bool {
			f := strings.Fields(line)
			return len(f) == 5 && f[1] == card && f[4] == "0180c200000e"
		})
	})
}

// until waits for what nobody is told.
func until(t *testing.T, not string, done func() bool) {
	t.Helper()
	look, limit := time.NewTicker(10*time.Millisecond), time.After(30*time.Second)
	defer look.Stop()
	for !done() {
		select {
		case <-look.C:
		case <-limit:
			t.Fatal(not)
		}
	}
}

// TestLLDPD has Debian's lldpd speak for a switch. It becomes another user, which a
// user namespace does not have.
func TestLLDPD(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("lldpd needs root: run the test as root")
	}
	lldpd, err := exec.LookPath("lldpd")
	if err != nil {
		t.Skipf("%v: make deps", err)
	}
	runtime.LockOSThread() // for ever: the thread, with its network, ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWUTS); err != nil {
		t.Skipf("new namespaces: %v: run the test as root, with CAP_SYS_ADMIN", err)
	}
	if err := unix.Sethostname([]byte("leaf07")); err != nil {
		t.Fatal(err)
	}
	ip(t, "link add eth0 address 52:54:00:00:00:01 type veth peer name swp7", "link add br0 type bridge", "link set swp7 master br0",
		"link set br0 up", "link set swp7 up", "link set eth0 up")
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // lldpd's other user goes there
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, lldpd, "-d", "-u", filepath.Join(dir, "socket"), "-I", "swp7")
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	l, err := Listen(slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		select {
		case <-l.News:
		case <-ctx.Done():
		}
		stop()
	}()
	if err := l.Run(ctx); err != nil { // in this thread, whose network it is
		t.Error(err)
	}
	_ = cmd.Wait() // ended by us
	if got := l.Neighbor("52:54:00:00:00:01"); got == nil || *got != (wire.Neighbor{Switch: "leaf07", Port: "swp7"}) {
		t.Errorf("%v, want leaf07 swp7", got)
	}
}
