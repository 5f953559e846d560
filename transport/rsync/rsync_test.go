package rsync

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/transport"
	"rookery/transport/rsync/rsynctest"
)

// extract writes tree into a new directory.
func extract(t *testing.T, tree *imagetest.Tree) string {
	t.Helper()
	dir := t.TempDir()
	b, d := tree.Layer(t)
	if _, err := image.Extract(t.Context(), dir, image.Options{}, image.Layer{Descriptor: d, Bytes: bytes.NewReader(b)}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestArgs(t *testing.T) {
	j := Job{Module: "m", Dir: "/new", Work: ".work", Stay: []string{"lost+found", `a*b\c`}}
	want := []string{"--filter=- /.work", "--filter=P /lost+found", `--filter=P /a\*b\\c`, "--", "rsync://127.0.0.1:7/m/", "/new/"}
	if got := j.args("127.0.0.1:7"); !slices.Equal(got[len(got)-len(want):], want) {
		t.Errorf("args: %q, want them to end with %q", got, want)
	}
}

func TestParseProgress(t *testing.T) {
	for line, want := range map[string]int64{
		"      1,234,567  12%    1.18MB/s    0:00:10 (xfr#5, to-chk=169/396)":   1234567,
		"              0   0%    0.00kB/s    0:00:00":                           0,
		"  9223372036854775807 100%    1.18MB/s    0:00:10 (xfr#5, ir-chk=1/3)": 9223372036854775807,
		"":                                   -1,
		"receiving incremental file list":    -1,
		"  9223372036854775808 1% 1B/s 0:00": -1,
		"  -5 1% 1B/s 0:00":                  -1,
		"a 1% 1B/s 0:00":                     -1,
	} {
		done, ok := parseProgress(line)
		if ok != (want >= 0) || ok && done != want {
			t.Errorf("%q: %d, %v, want %d", line, done, ok, want)
		}
	}
}

func FuzzParseProgress(f *testing.F) {
	f.Add([]byte("\r      1,234,567  12%    1.18MB/s    0:00:10 (xfr#5, to-chk=169/396)\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &progress{told: func(n int64) {
			if n < 0 {
				t.Errorf("%d bytes", n)
			}
		}}
		for len(b) > 0 { // however the bytes come
			n := min(7, len(b))
			p.Write(b[:n])
			b = b[n:]
		}
		if len(p.rest) > maxLine {
			t.Errorf("%d bytes are kept", len(p.rest))
		}
	})
}

// Everything arrives, what is there is not sent again, what is not in the tree
// goes, and what is to stay stays.
func TestRun(t *testing.T) {
	imagetest.Root(t)
	nasty := imagetest.Nasty()
	daemon := rsynctest.Start(t, extract(t, nasty))
	dir := t.TempDir()
	for _, name := range []string{"lost+found", "mnt", ".work", "gone/deep"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, ".work/kept"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var received, written int64
	job := Job{Dial: daemon.Dial, Module: rsynctest.Module, Dir: dir, Work: ".work", Stay: []string{"lost+found", "mnt"},
		Received: func(n int) { received += int64(n) }, Written: func(n int64) { written = n }}
	if err := Run(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	if received != daemon.Came() || written < 20<<20 {
		t.Errorf("told of %d bytes that came, %d did; of %d that were written", received, daemon.Came(), written)
	}
	for _, name := range []string{"lost+found", "mnt", ".work/kept"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, ".work")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(dir, imagetest.When, imagetest.When); err != nil { // our own doing
		t.Fatal(err)
	}
	imagetest.Same(t, imagetest.Snapshot(t, dir), nasty.Lines())

	received = 0
	if err := Run(t.Context(), job); err != nil || received > 100<<10 {
		t.Errorf("a second time %d bytes came, %v", received, err)
	}
}

// What is mounted below the directory is not emptied, wherever it is.
func TestMounted(t *testing.T) {
	imagetest.Root(t)
	daemon := rsynctest.Start(t, extract(t, imagetest.New().Dir("srv").File("srv/a", []byte("a"))))
	dir := t.TempDir()
	var kept []string
	for _, name := range []string{"srv", "gone/deep"} {
		at := filepath.Join(dir, name)
		if err := os.MkdirAll(at, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", at, "tmpfs", 0, "size=1m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(at, 0) })
		kept = append(kept, filepath.Join(at, "mine"))
		if err := os.WriteFile(kept[len(kept)-1], nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Run(t.Context(), Job{Dial: daemon.Dial, Module: rsynctest.Module, Dir: dir, Work: ".work"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(kept, filepath.Join(dir, "srv/a")) {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
}

// A daemon that serves as many as it may says so.
func TestBusy(t *testing.T) {
	if _, err := exec.LookPath(Program); err != nil {
		t.Skip("no rsync: install Debian's package rsync")
	}
	here, there := net.Pipe()
	var daemon sync.WaitGroup
	daemon.Go(func() {
		defer there.Close()
		fmt.Fprintf(there, "@RSYNCD: 31.0 md5 md4\n")
		lines := bufio.NewReader(there)
		for range 2 { // its version, and the module
			if _, err := lines.ReadString('\n'); err != nil {
				t.Error(err)
			}
		}
		fmt.Fprintf(there, "@ERROR: max connections (1) reached -- try again later\n")
	})
	defer daemon.Wait()
	job := Job{Dial: func(context.Context) (net.Conn, error) { return here, nil }, Module: "m", Dir: t.TempDir(), Work: ".work"}
	if err := Run(t.Context(), job); !errors.Is(err, ErrBusy) || errors.Is(err, ErrPartial) {
		t.Errorf("Run: %v, want %v", err, ErrBusy)
	}
}

// Wherever the daemon dies, the next run goes on.
func TestDaemonDies(t *testing.T) {
	imagetest.Root(t)
	tree := imagetest.New()
	for _, name := range []string{"a", "b", "c", "d"} {
		tree.File(name, imagetest.Noise(uint64(name[0]), 4<<20))
	}
	daemon := rsynctest.Start(t, extract(t, tree))
	job := Job{Dial: daemon.Dial, Module: rsynctest.Module, Dir: t.TempDir(), Work: ".work"}
	daemon.Look = func(came int64) bool {
		if came > 10<<20 {
			daemon.Kill()
		}
		return true
	}
	err := Run(t.Context(), job)
	if err == nil || !strings.Contains(err.Error(), "exit code 12, error in the protocol's data stream: ") {
		t.Errorf("Run: %v", err)
	}
	if err := Run(t.Context(), job); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("Run without a daemon: %v", err)
	}
	daemon.Look = nil
	daemon.Restart(t)
	if err := Run(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	if came := daemon.Came(); came > 18<<20 {
		t.Errorf("%d bytes came in all for 16 MiB", came)
	}
	if err := os.RemoveAll(filepath.Join(job.Dir, ".work")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(job.Dir, imagetest.When, imagetest.When); err != nil {
		t.Fatal(err)
	}
	imagetest.Same(t, imagetest.Snapshot(t, job.Dir), tree.Lines())
}

// A daemon that says nothing more is given up, one that ends the run is not waited for.
func TestSilence(t *testing.T) {
	imagetest.Root(t)
	daemon := rsynctest.Start(t, extract(t, imagetest.New().File("a", imagetest.Noise(1, 8<<20))))
	daemon.Look = func(came int64) bool { return came < 1<<20 }
	job := Job{Dial: daemon.Dial, Module: rsynctest.Module, Dir: t.TempDir(), Work: ".work", Silent: time.Second}
	if err := Run(t.Context(), job); !errors.Is(err, transport.ErrStalled) {
		t.Errorf("Run: %v, want %v", err, transport.ErrStalled)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	job.Silent = 0
	if err := Run(ctx, job); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Run: %v, want the end of its context", err)
	}
	job.Dial = func(context.Context) (net.Conn, error) { return nil, unix.EHOSTUNREACH }
	if err := Run(t.Context(), job); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("Run: %v", err)
	}
}

func TestErrors(t *testing.T) {
	imagetest.Root(t)
	daemon := rsynctest.Start(t, extract(t, imagetest.New().File("a", imagetest.Noise(1, 8<<20))))
	job := Job{Dial: daemon.Dial, Module: "none", Dir: t.TempDir(), Work: ".work"}
	want := "exit code 5, error starting client-server protocol: @ERROR: Unknown module 'none'"
	if err := Run(t.Context(), job); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("Run: %v, want %s", err, want)
	}
	job.Module, job.Dir = rsynctest.Module, filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(job.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", job.Dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(job.Dir, 0)
	if err := Run(t.Context(), job); !errors.Is(err, unix.ENOSPC) || !errors.Is(err, transport.ErrStorage) {
		t.Errorf("Run on a filesystem that is too small: %v", err)
	}
}
