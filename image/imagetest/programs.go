package imagetest

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/u-root/u-root/pkg/ldd"
)

// Programs copies programs of this machine to the same places below dir, and
// the libraries that they need.
func Programs(tb testing.TB, dir string, names ...string) {
	tb.Helper()
	var paths []string
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			tb.Fatalf("%v: make deps", err)
		}
		paths = append(paths, path)
	}
	all, err := ldd.FList(paths...)
	if err != nil {
		tb.Fatal(err)
	}
	for _, path := range append(paths, all...) {
		if err := copyProgram(filepath.Join(dir, path), path); err != nil {
			tb.Fatal(err)
		}
	}
}

func copyProgram(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	defer out.Close()
	_, err = io.Copy(out, in)
	return err
}
