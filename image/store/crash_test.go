package store_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"rookery/image"
	"rookery/image/store"
	"rookery/image/store/storetest"
	"rookery/wire"
)

// The story: what a killed process was about to do to a store, one after the
// other. A second telling goes on where the first one ended.
var story = []func(t *testing.T, s, other *store.Store) error{
	func(t *testing.T, s, other *store.Store) error { return tell(t, s, other, 1) },
	func(t *testing.T, s, other *store.Store) error { return tell(t, s, other, 2) },
	func(t *testing.T, s, other *store.Store) error { return tell(t, s, other, 3) },
	func(t *testing.T, s, other *store.Store) error { return s.Tag(t.Context(), "a:3", "a:good") },
	func(t *testing.T, s, other *store.Store) error {
		v, err := other.Resolve(t.Context(), "b:1")
		if err == nil {
			_, err = s.Copy(t.Context(), other, v, "b:1")
		}
		return err
	},
	func(t *testing.T, s, other *store.Store) error { return s.Untag(t.Context(), "a:good") },
	func(t *testing.T, s, other *store.Store) error {
		_, err := s.Remove(t.Context(), "a:1")
		return err
	},
	func(t *testing.T, s, other *store.Store) error {
		_, err := s.Prune(t.Context(), store.Keep{Newest: 1}, false)
		return err
	},
}

// tell publishes a:N above a:N-1, unless an earlier telling got further. The
// layer is one of the other store: compressing it takes longer than all else.
func tell(t *testing.T, s, other *store.Store, n int) error {
	if _, err := s.Resolve(t.Context(), "a:3"); err == nil {
		return nil
	}
	from, err := other.Resolve(t.Context(), fmt.Sprintf("layer:%d", n))
	if err != nil {
		return err
	}
	p := store.Publication{
		Layer: func(w io.Writer) (image.Descriptor, error) {
			b, err := os.ReadFile(other.Path(from.Layers[0].Digest))
			if err == nil {
				_, err = halting{w}.Write(b)
			}
			return from.Layers[0].Descriptor, err
		},
		Config: store.Config{Created: from.Created},
	}
	if v, err := s.Resolve(t.Context(), fmt.Sprintf("a:%d", n-1)); err == nil {
		p.Lower = v.Layers
	}
	_, err = s.Publish(t.Context(), fmt.Sprintf("a:%d", n), p)
	return err
}

// A halting writer can be killed when half is written.
type halting struct{ w io.Writer }

func (h halting) Write(b []byte) (int, error) {
	n, err := h.w.Write(b[:len(b)/2])
	if err != nil {
		return n, err
	}
	half("write half", "")
	m, err := h.w.Write(b[n:])
	return n + m, err
}

var half = func(what, path string) {}

// onStep has f called before each step of the story.
func onStep(f func(what, path string)) { half = f; store.OnStep(f) }

func openStory(dir string) (*store.Store, error) {
	s, err := store.Open(dir)
	if err == nil {
		s.Torrent = func(_ io.Reader, _ int64, d wire.Digest) ([]byte, error) { return []byte("torrent of " + d), nil }
	}
	return s, err
}

// otherStore has what the story takes from elsewhere.
func otherStore(t *testing.T) string {
	dir := t.TempDir()
	s, err := openStory(dir)
	if err != nil {
		t.Fatal(err)
	}
	storetest.Publish(t, s, "b:1", "of another store", 1)
	for n := 1; n <= 3; n++ {
		storetest.Publish(t, s, fmt.Sprintf("layer:%d", n), fmt.Sprint("layer ", n), n)
	}
	return dir
}

// tellAll tells the story. What an earlier telling did already is passed over.
func tellAll(t *testing.T, dir, other string, after func(*store.Store)) {
	s, err := openStory(dir)
	if err != nil {
		t.Fatal(err)
	}
	from, err := openStory(other)
	if err != nil {
		t.Fatal(err)
	}
	after(s)
	for i, do := range story {
		if err := do(t, s, from); err != nil && !errors.Is(err, store.ErrNotFound) {
			t.Fatalf("part %d: %v", i, err)
		}
		after(s)
	}
}

const killAt = "ROOKERY_TEST_KILL_AT" // STEP:STORE:OTHER

// TestMain is also the process that is killed.
func TestMain(m *testing.M) {
	if os.Getenv(killAt) != "" {
		os.Args = append(os.Args[:1], "-test.run=^TestKilled$")
	}
	// Syncing to a disk takes most of the time, and shows nothing here.
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() && os.Getenv("TMPDIR") == "" {
		os.Setenv("TMPDIR", "/dev/shm")
	}
	os.Exit(m.Run())
}

func TestKilled(t *testing.T) {
	where := strings.Split(os.Getenv(killAt), ":")
	if len(where) != 3 {
		t.Skip("started by TestKill only")
	}
	left, err := strconv.Atoi(where[0])
	if err != nil {
		t.Fatal(err)
	}
	onStep(func(string, string) {
		if left--; left == 0 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	tellAll(t, where[1], where[2], func(*store.Store) {})
}

// Whenever a process is killed, what it was about to do has been done or has
// not; nothing is damaged, and nothing stays behind that prune does not take.
func TestKill(t *testing.T) {
	other := otherStore(t)

	whole := filepath.Join(t.TempDir(), "whole")
	states, steps := []string{""}, 0
	onStep(func(string, string) { steps++ })
	tellAll(t, whole, other, func(s *store.Store) { states = append(states, storetest.Names(t, s)) })
	onStep(func(string, string) {})
	final := files(t, whole)
	if steps < 80 {
		t.Fatalf("only %d steps", steps)
	}

	stride := 1
	if testing.Short() {
		stride = 7
	}
	for at := 1; at <= steps; at += stride {
		dir := filepath.Join(t.TempDir(), "store")
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%s:%s", killAt, at, dir, other))
		out, err := cmd.CombinedOutput()
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Fatalf("step %d: %v: %s", at, err, out)
		}
		s, err := openStory(dir)
		if err != nil {
			t.Fatalf("step %d: %v", at, err)
		}
		if state := storetest.Names(t, s); !slices.Contains(states, state) {
			t.Errorf("step %d: the store has %s: none of\n%s", at, state, strings.Join(states, "\n"))
		}
		versions, err := s.List(t.Context())
		if err != nil {
			t.Fatalf("step %d: %v", at, err)
		}
		if damages, err := s.Verify(t.Context(), nil, versions...); err != nil || len(damages) > 0 {
			t.Errorf("step %d: %v, %v", at, damages, err)
		}
		tellAll(t, dir, other, func(*store.Store) {})
		if got := files(t, dir); strings.ReplaceAll(got, dir, whole) != final {
			t.Errorf("step %d: at the end there is\n%s\nwant\n%s", at, got, final)
		}
	}
}

// What a power cut may lose is what was not synced: a file's content before it
// is renamed, a name before what relies on it.
func TestOrderOfSyncs(t *testing.T) {
	other := otherStore(t)
	dir := filepath.Join(t.TempDir(), "store")
	synced, blobs := "", filepath.Join(dir, "blobs", "sha256")
	dirty := map[string]bool{} // directories
	seen := map[string]int{}
	onStep(func(what, path string) {
		seen[what]++
		switch what {
		case "create":
			synced = ""
		case "sync":
			synced = path
		case "rename":
			if synced == "" {
				t.Errorf("%s is renamed before it is synced", path)
			}
			if filepath.Base(path) == "index.json" && dirty[blobs] {
				t.Error("names are given to blobs that may not be there")
			}
			dirty[filepath.Dir(path)] = true
		case "sync directory":
			dirty[path] = false
		case "remove":
			if filepath.Dir(path) == blobs && dirty[dir] {
				t.Error("blobs are removed that may have names")
			}
		}
	})
	defer onStep(func(string, string) {})
	tellAll(t, dir, other, func(*store.Store) {})
	for what, least := range map[string]int{"rename": 20, "sync": 20, "sync directory": 20, "remove": 3} {
		if seen[what] < least {
			t.Errorf("%s: seen %d times, want %d at least", what, seen[what], least)
		}
	}
}
