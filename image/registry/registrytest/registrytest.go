// Package registrytest runs a real registry: Debian's docker-registry.
package registrytest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// A Registry keeps its blobs in a directory of the test.
type Registry struct {
	Host string // 127.0.0.1:PORT
	Dir  string // docker/registry/v2/blobs/sha256/XX/DIGEST/data
	cmd  *exec.Cmd
	done chan struct{}
}

const config = `version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %q}
  delete: {enabled: %v}
  cache: {blobdescriptor: inmemory}
http: {addr: "127.0.0.1:0"}
`

// Start starts a registry that ends with the test.
func Start(tb testing.TB) *Registry { return start(tb, true) }

// StartKeeping starts one that deletes nothing, as is the default.
func StartKeeping(tb testing.TB) *Registry { return start(tb, false) }

func start(tb testing.TB, deletes bool) *Registry {
	tb.Helper()
	binary, err := exec.LookPath("docker-registry")
	if err != nil {
		tb.Skip("needs docker-registry: run scripts/deps")
	}
	r := &Registry{Dir: tb.TempDir(), done: make(chan struct{})}
	file := filepath.Join(tb.TempDir(), "config.yml")
	if err := os.WriteFile(file, fmt.Appendf(nil, config, r.Dir, deletes), 0o644); err != nil {
		tb.Fatal(err)
	}
	r.cmd = exec.Command(binary, "serve", file)
	log, err := r.cmd.StderrPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(r.Kill)
	listening := regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)
	host := make(chan string)
	go func() {
		defer close(r.done)
		defer close(host)
		told := false
		for lines := bufio.NewScanner(log); lines.Scan(); { // to the end, or it would block
			if m := listening.FindStringSubmatch(lines.Text()); m != nil && !told {
				told = true
				host <- m[1]
			}
		}
	}()
	if r.Host = <-host; r.Host == "" {
		tb.Fatal("docker-registry ended before it listened")
	}
	return r
}

// Kill ends the registry at once.
func (r *Registry) Kill() {
	if r.cmd.ProcessState == nil {
		r.cmd.Process.Kill()
		<-r.done
		r.cmd.Wait()
	}
}
