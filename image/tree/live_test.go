package tree_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/tree"
	"rookery/wire"
)

// What comes and goes while a tree is being listed does not stop that, and what
// stays is complete.
func TestTreeInUse(t *testing.T) {
	dir := t.TempDir()
	for i := range 200 {
		if err := os.MkdirAll(filepath.Join(dir, "stays", fmt.Sprint(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var busy sync.WaitGroup
	for n := range 3 {
		busy.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				p := filepath.Join(dir, "stays", fmt.Sprint(i%200), fmt.Sprint("goes", n))
				switch i / 200 % 4 {
				case 0:
					os.MkdirAll(filepath.Join(p, "a/b"), 0o755)
				case 1:
					os.RemoveAll(p)
					os.Symlink("x", p)
				case 2:
					os.Remove(p)
					os.WriteFile(p, nil, 0o644)
				case 3:
					os.RemoveAll(p)
				}
			}
		})
	}
	for range 30 {
		tr, err := tree.FromDir(dir, tree.Excludes{})
		if err != nil {
			t.Error(err)
			break
		}
		stays := 0
		for _, e := range tr.Entries {
			if !strings.Contains(e.Path, "goes") {
				stays++
			}
		}
		if stays != 202 {
			t.Errorf("%d entries, want 202", stays)
		}
		tr.Close()
	}
	close(stop)
	busy.Wait()
}

// A file that became a fifo has no writer to wait for.
func TestFileThatIsNoneAnyMore(t *testing.T) {
	dir := plant(t, "f", "g")
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	tr, err := tree.FromDir(dir, tree.Excludes{})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	os.Remove(filepath.Join(dir, "f"))
	if err := unix.Mkfifo(filepath.Join(dir, "f"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := image.Write(io.Discard, tr.Entries, tr.Open); err == nil || !strings.Contains(err.Error(), `"f": is no file any more`) {
		t.Fatal(err)
	}
}

func TestOrigin(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "web")
	if _, err := tree.ReadOrigin(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	want := tree.Origin{Image: "web:3", Manifest: wire.DigestOf([]byte("manifest"))}
	if err := tree.WriteOrigin(dir, tree.Origin{Image: "web:2", Manifest: want.Manifest}); err != nil {
		t.Fatal(err)
	}
	if err := tree.WriteOrigin(dir+"/", want); err != nil {
		t.Fatal(err)
	}
	if got, err := tree.ReadOrigin(dir); err != nil || got != want {
		t.Fatalf("%+v, %v", got, err)
	}
	left, err := os.ReadDir(filepath.Dir(dir))
	if err != nil || len(left) != 1 || left[0].Name() != "web.tree.json" {
		t.Fatalf("beside the tree: %v, %v", left, err)
	}
	for _, bad := range []string{"", "{}", `{"image":"web:3","manifest":"sha256:1"}`, `{"image":"web:3","manifest":"` + string(want.Manifest) + `","x":1}`} {
		if err := os.WriteFile(dir+".tree.json", []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		if o, err := tree.ReadOrigin(dir); err == nil || !strings.Contains(err.Error(), "web.tree.json: ") {
			t.Errorf("%s: %+v, %v", bad, o, err)
		}
	}
}
