package install_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"rookery/agent/install"
	"rookery/agent/install/installtest"
	"rookery/disklayout"
	"rookery/image"
	"rookery/image/store"
	"rookery/wire"
)

// world is one node before its installation.
type world struct {
	machine *installtest.Machine
	network *installtest.Network
	report  *installtest.Reporter
	in      *install.Install
}

func newWorld(t *testing.T, images *store.Store, version store.Version) *world {
	w := &world{
		machine: &installtest.Machine{Root: filepath.Join(t.TempDir(), "root"), Room: install.Room{Bytes: 100 << 20, Inodes: 10_000}, Fail: map[string]error{}},
		network: &installtest.Network{Store: images},
		report:  &installtest.Reporter{},
	}
	w.in = &install.Install{
		Script: installtest.Script(version), Machine: w.machine, Network: w.network, Report: w.report,
		Log: slog.New(slog.DiscardHandler), Extract: image.Options{Unprivileged: os.Geteuid() != 0},
	}
	return w
}

// installed checks that the root holds the image and nothing of ours but the log.
func (w *world) installed(t *testing.T) {
	t.Helper()
	for name, want := range installtest.Files {
		if got, err := os.ReadFile(filepath.Join(w.machine.Root, name)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
		}
	}
	if _, err := os.Stat(filepath.Join(w.machine.Root, install.StagingDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("staging is still there: %v", err)
	}
	if log, err := os.ReadFile(filepath.Join(w.machine.Root, install.LogFile)); err != nil || !strings.Contains(string(log), "fetch finished") {
		t.Errorf("log of the installation: %q, %v", log, err)
	}
}

var phases = []wire.Phase{wire.PhasePlan, wire.PhasePartition, wire.PhaseFetch, wire.PhaseFixup, wire.PhaseLoader, wire.PhaseLinger, wire.PhaseEnd}

func TestStory(t *testing.T) {
	images, version := installtest.Publish(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, images, version)
		begin := time.Now()
		w.network.Alone = begin.Add(20 * time.Second)
		ending, err := w.in.Run(t.Context())
		if err != nil || ending != wire.Reboot {
			t.Fatalf("Run: %v, %v", ending, err)
		}
		var want []string
		for _, phase := range phases {
			want = append(want, string(phase)+" started", string(phase)+" finished")
		}
		if got := w.report.Events(); !slices.Equal(got, want) || !w.report.Told() {
			t.Errorf("reported %q, told %v", got, w.report.Told())
		}
		if want := []string{"plan", "check", "partition", "fixup", "loader", "release"}; !slices.Equal(w.machine.Calls, want) {
			t.Errorf("the machine was asked for %v, want %v", w.machine.Calls, want)
		}
		if took := time.Since(begin); took < 20*time.Second || took > 22*time.Second {
			t.Errorf("lingered %v, want until the other node is done", took)
		}
		if l := w.report.Last; l == nil || l.Done != version.Layers[0].Size || l.FromPeers != l.Total {
			t.Errorf("last transfer: %+v", l)
		}
		if !w.network.Left() {
			t.Error("the swarm was not left")
		}
		w.installed(t)
	})
}

func TestLingerHasALimit(t *testing.T) {
	images, version := installtest.Publish(t, t.TempDir())
	for seedFor, want := range map[int]time.Duration{60: time.Minute, 0: 0} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, images, version)
			begin := time.Now()
			w.network.Alone = begin.Add(time.Hour)
			w.in.Script.SeedFor = seedFor
			if _, err := w.in.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begin).Round(time.Second); took != want {
				t.Errorf("lingered %v, want %v", took, want)
			}
		})
	}
}

// Whatever goes wrong: the phase says so with its cause, the ending is the
// script's, everything is let go, the server knows.
func TestFailures(t *testing.T) {
	images, version := installtest.Publish(t, t.TempDir())
	broke := errors.New("it broke")
	for _, tt := range []struct {
		name  string
		wreck func(*world)
		phase wire.Phase
		says  string
		is    error
	}{
		{"no disk fits", func(w *world) { w.machine.Fail["plan"] = disklayout.ErrTooSmall }, wire.PhasePlan, "plan: disk too small", disklayout.ErrTooSmall},
		{"no room for the image", func(w *world) { w.machine.Room.Bytes = 3 << 20 }, wire.PhasePlan, "has room for 2988", disklayout.ErrTooSmall},
		{"too many files", func(w *world) { w.machine.Room.Inodes = 270 }, wire.PhasePlan, "has 270 inodes, the image needs 273", disklayout.ErrTooSmall},
		{"no loader in the image", func(w *world) { w.machine.Fail["check"] = broke }, wire.PhasePlan, "plan: image tiny:1: it broke", broke},
		{"manifest tampered", func(w *world) { w.network.Alter = tamper(wire.PathManifests) }, wire.PhasePlan, "manifest: digest is sha256:", nil},
		{"manifest missing", func(w *world) { w.in.Script.Image.Manifest = wire.DigestOf(nil) }, wire.PhasePlan, "image tiny:1: manifest: ", store.ErrNotFound},
		{"torrent tampered", func(w *world) { w.network.Alter = tamper(wire.PathTorrents) }, wire.PhasePlan, "torrent: digest is sha256:", nil},
		{"no source has the index", func(w *world) { w.network.Pass = func(wire.Digest, int) error { return broke } }, wire.PhasePlan, " pieces missing: fake: it broke", broke},
		{"disk broken", func(w *world) {
			w.machine.Fail["partition"] = errors.Join(broke, os.MkdirAll(w.machine.Root, 0o755))
		}, wire.PhasePartition, "partition: it broke", broke},
		{"sources run dry", func(w *world) { w.network.Pass = dry(broke) }, wire.PhaseFetch, "fetch: layer 0: 10 of ", broke},
		{"fixup", func(w *world) { w.machine.Fail["fixup"] = broke }, wire.PhaseFixup, "fixup: it broke", broke},
		{"loader", func(w *world) { w.machine.Fail["loader"] = broke }, wire.PhaseLoader, "loader: it broke", broke},
		{"panic", func(w *world) { w.machine.Panic = "loader" }, wire.PhaseLoader, "loader: panic: machine: loader", nil},
		{"unmount", func(w *world) { w.machine.Fail["release"] = broke }, wire.PhaseEnd, "end: it broke", broke},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, images, version)
				tt.wreck(w)
				ending, err := w.in.Run(t.Context())
				if err == nil || ending != wire.Shell {
					t.Fatalf("Run: %q, %v; want shell and an error", ending, err)
				}
				if !strings.Contains(err.Error(), tt.says) || tt.is != nil && !errors.Is(err, tt.is) {
					t.Errorf("error %q, want %q and %v", err, tt.says, tt.is)
				}
				events := w.report.Events()
				if last := events[len(events)-1]; !strings.HasPrefix(last, string(tt.phase)+" failed: ") {
					t.Errorf("last event %q, want %s failed", last, tt.phase)
				}
				if !w.report.Told() {
					t.Error("the server was not told")
				}
				if touched := slices.Contains(w.machine.Calls, "partition"); touched != (tt.phase != wire.PhasePlan) {
					t.Errorf("the disk was touched: %v, when %s failed", touched, tt.phase)
				}
				if w.machine.Calls[len(w.machine.Calls)-1] != "release" {
					t.Errorf("the machine was not released: %v", w.machine.Calls)
				}
				if tt.phase == wire.PhasePartition {
					if left, _ := os.ReadDir(w.machine.Root); len(left) > 0 {
						t.Errorf("nothing is mounted there, and it has %v", left)
					}
				}
				if tt.phase == wire.PhaseLoader {
					if _, err := os.Stat(filepath.Join(w.machine.Root, install.LogFile)); err != nil {
						t.Errorf("log of the failure: %v", err)
					}
				}
			})
		})
	}
}

func tamper(path string) func(string, []byte) ([]byte, error) {
	return func(p string, b []byte) ([]byte, error) {
		if strings.HasPrefix(p, path) {
			return installtest.Flip(b), nil
		}
		return b, nil
	}
}

// dry is a source that has the end of the layer, with the index, alone, and
// takes its time to say so.
func dry(err error) func(wire.Digest, int) error {
	return func(_ wire.Digest, piece int) error {
		if piece < 10 {
			time.Sleep(5 * time.Second) // of the bubble
			return err
		}
		return nil
	}
}

// What other nodes give for a torrent file, or a group, may be anything: the server has it,
// too, and is asked without them from then on.
func TestTorrentFromElsewhere(t *testing.T) {
	images, versions := installtest.Stack(t, t.TempDir())
	version := versions[len(versions)-1]
	const group, nodes, server = "group", "nodes", "server"
	right := func(b []byte) ([]byte, error) { return b, nil }
	wrong := func(b []byte) ([]byte, error) { return installtest.Flip(b), nil }
	none := func([]byte) ([]byte, error) { return nil, fmt.Errorf("%w: nothing comes", install.ErrElsewhere) }
	refused := func([]byte) ([]byte, error) { return nil, errors.New("connection refused") }
	for _, tt := range []struct {
		name       string
		transports []string
		alter      func([]byte) ([]byte, error)
		want       []string // that is asked for the first files
	}{
		{"right", []string{"bittorrent"}, right, []string{nodes, nodes}},
		{"wrong", []string{"bittorrent"}, wrong, []string{nodes, server, server}},
		{"none", []string{"bittorrent", "http"}, none, []string{nodes, server, server}},
		{"no server", []string{"bittorrent"}, refused, []string{nodes, server, nodes, server}},
		{"no swarm", []string{"http", "bittorrent", "multicast"}, nil, []string{server, server}},
		{"right by multicast", []string{"multicast", "bittorrent"}, right, []string{group, group}},
		{"wrong everywhere", []string{"multicast", "bittorrent"}, wrong, []string{group, nodes, server, server}},
		{"not sent", []string{"multicast", "http"}, refused, []string{group, server, group, server}},
		{"nothing comes by multicast", []string{"multicast", "http"}, none, []string{group, server, server}},
		{"a group that comes later", []string{"bittorrent", "multicast"}, none, []string{nodes, group, server, server}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, images, version)
				w.in.Script.Transports, w.network.Sends = tt.transports, true
				var asked []string
				w.network.Alter = func(path string, b []byte) ([]byte, error) {
					switch {
					case strings.HasPrefix(path, "/group/"):
						asked = append(asked, group)
					case strings.HasSuffix(path, wire.FromNodes):
						asked = append(asked, nodes)
					case strings.HasPrefix(path, wire.PathTorrents):
						asked = append(asked, server)
						return b, nil
					default:
						return b, nil
					}
					return tt.alter(b)
				}
				if _, err := w.in.Run(t.Context()); err != nil {
					t.Fatal(err)
				}
				if len(asked) < len(tt.want) || !slices.Equal(asked[:len(tt.want)], tt.want) {
					t.Errorf("asked %q, want %q first", asked, tt.want)
				}
			})
		})
	}
}

// A node that lost power in the middle starts over, on the same disk: with
// what was verified, where that is still there.
func TestPowerCycle(t *testing.T) {
	images, version := installtest.Publish(t, t.TempDir())
	for _, keeps := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, images, version)
			ctx, power := context.WithCancel(t.Context())
			w.network.Pass = func(_ wire.Digest, piece int) error {
				time.Sleep(time.Millisecond) // of the bubble: staging comes first
				if piece == 5 {
					power()
				}
				return ctx.Err()
			}
			if _, err := w.in.Run(ctx); !errors.Is(err, context.Canceled) {
				t.Fatalf("Run: %v", err)
			}
			staging := filepath.Join(w.machine.Root, install.StagingDir)
			spoil(t, filepath.Join(staging, version.Layers[0].Digest.Hex()), 40*32<<10)
			if err := os.WriteFile(filepath.Join(staging, wire.DigestOf(nil).Hex()), []byte("of another version"), 0o600); err != nil {
				t.Fatal(err)
			}
			again := newWorld(t, images, version)
			again.machine.Root, again.machine.Keeps = w.machine.Root, keeps
			again.network.Pass = func(wire.Digest, int) error { time.Sleep(time.Millisecond); return nil }
			if _, err := again.in.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			again.installed(t)
			least, most := version.Layers[0].Size, version.Layers[0].Size
			if keeps { // pieces 0 to 5, the one that was spoilt, the index and what comes before the staging
				least, most = 7*32<<10, 11*32<<10
			}
			if l := again.report.Last; l.FromPeers < least || l.FromPeers > most || l.Done != l.Total {
				t.Errorf("disk kept: %v: fetched %d bytes, want %d to %d; %+v", keeps, l.FromPeers, least, most, l)
			}
		})
	}
}

// spoil changes a byte of a file.
func spoil(t *testing.T, name string, off int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	b[0]++
	if _, e := f.WriteAt(b, off); err != nil || e != nil {
		t.Fatal(err, e)
	}
}

// A link in the place of the staging leads nowhere.
func TestStagingIsNoLink(t *testing.T) {
	images, version := installtest.Publish(t, t.TempDir())
	w := newWorld(t, images, version)
	w.machine.Keeps = true
	elsewhere := filepath.Join(t.TempDir(), "precious")
	if err := errors.Join(os.Mkdir(w.machine.Root, 0o755), os.WriteFile(elsewhere, nil, 0o600),
		os.Symlink(filepath.Dir(elsewhere), filepath.Join(w.machine.Root, install.StagingDir))); err != nil {
		t.Fatal(err)
	}
	if _, err := w.in.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "fetch: staging: "+filepath.Join(w.machine.Root, install.StagingDir)+" is there and no directory") {
		t.Errorf("Run: %v", err)
	}
	if _, err := os.Stat(elsewhere); err != nil {
		t.Error(err)
	}
}

// A root that was promised more room than it has: the node fails at once, and
// says how much there is.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a small filesystem needs root: run the test as root")
	}
	images, version := installtest.Publish(t, t.TempDir())
	for _, size := range []string{"1M", "4M"} { // for the staging, for the files
		w := newWorld(t, images, version)
		w.machine.Keeps = true
		if err := errors.Join(os.Mkdir(w.machine.Root, 0o755), unix.Mount("small", w.machine.Root, "tmpfs", 0, "size="+size)); err != nil {
			t.Fatal(err)
		}
		_, err := w.in.Run(t.Context())
		if e := unix.Unmount(w.machine.Root, 0); e != nil {
			t.Error(e)
		}
		if err == nil || !strings.HasPrefix(err.Error(), "fetch: ") || !errors.Is(err, unix.ENOSPC) ||
			!strings.Contains(err.Error(), w.machine.Root+" has ") || !w.report.Told() || !w.network.Left() {
			t.Errorf("%s: %v; server told %v, swarm left %v", size, err, w.report.Told(), w.network.Left())
		}
	}
}

// A small memory holds pieces back until there is a disk, and no longer.
func TestLittleMemory(t *testing.T) {
	images, version := installtest.Publish(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, images, version)
		w.in.Memory = 256 << 10
		if _, err := w.in.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.installed(t)
	})
}

func TestDirectoryHasRoom(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	_, room, err := install.Directory{Path: dir}.Plan(t.Context(), wire.Script{})
	if err != nil || room.Bytes <= 0 {
		t.Fatalf("room in %s: %+v, %v", dir, room, err)
	}
}

// What an installation wrote before it was stopped is room for the next.
func TestDirectoryOfAStoppedInstallationHasRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a small filesystem needs root: run the test as root")
	}
	dir := t.TempDir()
	if err := unix.Mount("small", dir, "tmpfs", 0, "size=8M,nr_inodes=100"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "etc"), 0o755), os.WriteFile(filepath.Join(dir, "etc/file"), make([]byte, 3<<20), 0o600)); err != nil {
		t.Fatal(err)
	}
	for i, want := range []int64{5 << 20, 8 << 20} {
		if _, room, err := (install.Directory{Path: dir}).Plan(t.Context(), wire.Script{}); err != nil || room.Bytes != want || room.Inodes < 90 {
			t.Errorf("room: %+v, %v; want %d bytes", room, err, want)
		}
		if i == 0 {
			if err := os.Mkdir(filepath.Join(dir, install.StagingDir), 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
}
