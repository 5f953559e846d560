package install_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/store"
	"rookery/transport"
	"rookery/transport/rsync/rsynctest"
	"rookery/wire"
)

// filed makes a store with an image of everything that a file can be, and a
// directory with its files.
func filed(t *testing.T) (images *store.Store, v store.Version, files string) {
	t.Helper()
	imagetest.Root(t)
	images, err := store.Open(filepath.Join(t.TempDir(), "images"))
	if err != nil {
		t.Fatal(err)
	}
	images.Torrent = transport.NewTorrent
	nasty := imagetest.Nasty()
	v, err = images.Publish(t.Context(), "nasty:1", store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) {
		return image.Write(w, nasty.Entries, nasty.Open)
	}})
	if err != nil {
		t.Fatal(err)
	}
	layers, done, err := images.Layers(t.Context(), v)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	files = t.TempDir()
	if _, err := image.Extract(t.Context(), files, image.Options{}, layers...); err != nil {
		t.Fatal(err)
	}
	return images, v, files
}

// isNasty checks that the root has that image, and the log.
func (w *world) isNasty(t *testing.T) {
	t.Helper()
	ours := func(line string) bool {
		return strings.HasPrefix(line, `"var`) || strings.HasPrefix(line, `"."(1) `) // whose time the log changed
	}
	got := slices.DeleteFunc(imagetest.Snapshot(t, w.machine.Root), ours)
	imagetest.Same(t, got, slices.DeleteFunc(imagetest.Nasty().Lines(), ours))
}

func (w *world) switches() (list []string) {
	for _, e := range w.report.Events() {
		if text, ok := strings.CutPrefix(e, "switched: "); ok {
			list = append(list, text)
		}
	}
	return list
}

// rsync alone: the index comes as a piece, the files as files.
func TestRsyncAlone(t *testing.T) {
	images, v, files := filed(t)
	w := newWorld(t, images, v)
	w.network.Rsync = rsynctest.Start(t, files)
	w.in.Script.Transports = []string{"rsync"}
	pieces := 0
	w.network.Pass = func(wire.Digest, int) error { pieces++; return nil }
	if _, err := w.in.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.isNasty(t)
	if l := w.report.Last; l.Done != l.Total || l.FromServer != w.network.Rsync.Came() || l.FromServer < 5<<20 || pieces > 2 {
		t.Errorf("last transfer %+v, %d bytes came and %d pieces", l, w.network.Rsync.Came(), pieces)
	}
	if s := w.switches(); len(s) > 0 {
		t.Errorf("switched %q", s)
	}
}

// Each takes over from the other, wherever that stops, and keeps what is there.
func TestTakesOver(t *testing.T) {
	images, v, files := filed(t)
	gone := errors.New("they are gone")
	total := int64(0)
	t.Run("rsync from pieces", func(t *testing.T) {
		for _, after := range []int{0, 60, 110} {
			daemon := rsynctest.Start(t, files)
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, images, v)
				w.network.Rsync = daemon
				w.in.Script.Transports = []string{"bittorrent", "http", "rsync"}
				passed := 0
				w.network.Pass = func(wire.Digest, int) error {
					if passed++; passed > 2+after {
						return gone
					}
					return nil
				}
				if _, err := w.in.Run(t.Context()); err != nil {
					t.Fatal(err)
				}
				w.isNasty(t)
				s := w.switches()
				if len(s) != 1 || !strings.HasPrefix(s[0], "rsync takes over from bittorrent, http: layer 0: ") || !strings.HasSuffix(s[0], "they are gone") {
					t.Errorf("switched %q", s)
				}
				if after == 0 {
					total = daemon.Came()
				} else if came := daemon.Came(); came > total-int64(after)<<14 { // a piece has 32 KiB, and some are of frames that are not complete
					t.Errorf("with %d pieces there, %d bytes came, without %d", after, came, total)
				}
			})
		}
	})
	t.Run("pieces from rsync", func(t *testing.T) {
		daemon := rsynctest.Start(t, files)
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, images, v)
			w.network.Rsync = daemon
			w.in.Script.Transports = []string{"rsync", "http"}
			daemon.Look = func(came int64) bool {
				if came > 3<<20 {
					daemon.Kill()
				}
				return true
			}
			if _, err := w.in.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.isNasty(t)
			if s := w.switches(); len(s) != 1 || !strings.HasPrefix(s[0], "http takes over from rsync: rsync: ") || !strings.HasSuffix(s[0], "connection refused") {
				t.Errorf("switched %q", s)
			}
		})
	})
	t.Run("pieces from rsync that only says why not", func(t *testing.T) {
		_, _, none := filed(t)
		daemon := rsynctest.Start(t, none)
		if err := os.RemoveAll(none); err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, images, v)
			w.network.Rsync = daemon
			w.in.Script.Transports = []string{"rsync", "http"}
			if _, err := w.in.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.isNasty(t)
			if s := w.switches(); len(s) != 1 || !strings.HasPrefix(s[0], "http takes over from rsync: rsync: exit code 5, ") {
				t.Errorf("switched %q", s)
			}
			w = newWorld(t, images, v)
			w.network.Rsync, w.in.Script.Transports = daemon, []string{"rsync"}
			began := time.Now()
			if _, err := w.in.Run(t.Context()); err == nil || time.Since(began) > 12*time.Minute {
				t.Errorf("Run: %v after %v, want it to end", err, time.Since(began))
			}
		})
	})
	t.Run("nobody", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, images, v)
			w.in.Script.Transports = []string{"bittorrent", "rsync"}
			passed, began := 0, time.Now()
			w.network.Pass = func(wire.Digest, int) error {
				if passed++; passed > 3 {
					return gone
				}
				return nil
			}
			_, err := w.in.Run(t.Context())
			if err == nil || !strings.Contains(err.Error(), "they are gone") || !strings.Contains(err.Error(), "rsync: no files here") {
				t.Errorf("Run: %v, want what both say", err)
			}
			if took := time.Since(began); took < 10*time.Minute || took > 12*time.Minute {
				t.Errorf("it took %v to give up", took)
			}
		})
	})
}

// The daemon is killed in the middle, and another one goes on.
func TestRsyncDaemonKilled(t *testing.T) {
	images, v, files := filed(t)
	w := newWorld(t, images, v)
	daemon := rsynctest.Start(t, files)
	w.network.Rsync, w.in.Script.Transports = daemon, []string{"rsync"}
	var once sync.Once
	killed := make(chan struct{})
	daemon.Look = func(came int64) bool {
		if came > 15<<20 {
			once.Do(func() { daemon.Kill(); close(killed) })
		}
		return true
	}
	var back sync.WaitGroup
	back.Go(func() { <-killed; daemon.Restart(t) })
	defer back.Wait()
	if _, err := w.in.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.isNasty(t)
	if came := daemon.Came(); came > 30<<20 { // 22 MiB, and a file once more
		t.Errorf("%d bytes came", came)
	}
}

// stopped runs the installation until rsync has brought the half of it.
func (w *world) stopped(t *testing.T, daemon *rsynctest.Daemon) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	daemon.Look = func(came int64) bool {
		if came > 12<<20 {
			stop()
		}
		return true
	}
	if _, err := w.in.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("Run: %v, want it stopped", err)
	}
}

// Stopped in the middle, an installation starts again on what is there.
func TestRsyncStartsAgain(t *testing.T) {
	images, v, files := filed(t)
	w := newWorld(t, images, v)
	daemon := rsynctest.Start(t, files)
	w.network.Rsync, w.in.Script.Transports = daemon, []string{"rsync"}
	w.stopped(t, daemon)
	daemon.Look = nil
	w.machine.Keeps = true
	if _, err := w.in.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.isNasty(t)
}

// What rsync brought before an installation was stopped is compared by the one
// that starts again, whatever that fetches with.
func TestRsyncLeavesNothingBehind(t *testing.T) {
	images, v, files := filed(t)
	if err := os.WriteFile(filepath.Join(files, "0evil"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, images, v)
	daemon := rsynctest.Start(t, files)
	w.network.Rsync, w.in.Script.Transports = daemon, []string{"rsync"}
	w.stopped(t, daemon)
	w.machine.Keeps, w.in.Script.Transports = true, []string{"http"}
	for range 2 { // the second is told by the first's staging
		if _, err := w.in.Run(t.Context()); err == nil || !strings.HasSuffix(err.Error(), `the first is "0evil": added`) {
			t.Fatalf("Run: %v, want it to find the file", err)
		}
	}
}

// What rsync brings is believed of nobody: the step names what is not as the
// image has it.
func TestRsyncIsNotBelieved(t *testing.T) {
	images, v, files := filed(t)
	for want, change := range map[string]func(dir string) error{
		`"a/sudo": changed content`: func(dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "a/sudo"), []byte("setuiD"), 0), os.Chmod(filepath.Join(dir, "a/sudo"), 0o755|os.ModeSetuid|os.ModeSetgid),
				os.Chtimes(filepath.Join(dir, "a/sudo"), imagetest.When, imagetest.When))
		},
		`"a/sudo": changed mode`: func(dir string) error { return os.Chmod(filepath.Join(dir, "a/sudo"), 0o755) },
		`"etc/shadow": added`: func(dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "etc/shadow"), nil, 0o600), os.Chtimes(filepath.Join(dir, "etc"), imagetest.When, imagetest.When))
		},
		`"lost+found": added`: func(dir string) error {
			name := filepath.Join(dir, "lost+found")
			return errors.Join(os.WriteFile(name, []byte("evil"), 0o755), os.Chmod(name, 0o755|os.ModeSetuid), os.Chtimes(dir, imagetest.When, imagetest.When))
		},
		`"b/fifo": removed`: func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "b/fifo")), os.Chtimes(filepath.Join(dir, "b"), imagetest.When, imagetest.When))
		},
		`"a/acl": changed xattrs`: func(dir string) error {
			return unix.Removexattr(filepath.Join(dir, "a/acl"), "system.posix_acl_access")
		},
		`"a/none": changed owner`: func(dir string) error { return os.Lchown(filepath.Join(dir, "a/none"), 1, 1) },
	} {
		t.Run(want, func(t *testing.T) {
			copied := t.TempDir()
			if out, err := exec.Command("cp", "-a", files+"/.", copied).CombinedOutput(); err != nil {
				t.Fatalf("cp: %v: %s", err, out)
			}
			if err := change(copied); err != nil {
				t.Fatal(err)
			}
			w := newWorld(t, images, v)
			w.network.Rsync, w.in.Script.Transports = rsynctest.Start(t, copied), []string{"rsync", "http"}
			ending, err := w.in.Run(t.Context())
			if err == nil || !strings.HasPrefix(err.Error(), "fetch: ") || !strings.HasSuffix(err.Error(), "files are not as the image has them, the first is "+want) || ending != wire.Shell {
				t.Errorf("Run: %v, %v, want %s", ending, err, want)
			}
		})
	}
}
