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

	"golang.org/x/crypto/bcrypt"
)

// A Registry is one that runs until the test ends.
type Registry struct {
	Host string // 127.0.0.1:PORT
	cmd  *exec.Cmd
	done chan struct{}
}

// Options are how a registry is to be; the zero value does for most tests.
type Options struct {
	Dir      string // where it keeps its blobs; "" is a directory of the test
	Keeps    bool   // deletes nothing, as is its own default
	Password string // of the user "rookery"; "" lets in everybody
}

const config = `version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %q}
  delete: {enabled: %v}
  cache: {blobdescriptor: inmemory}
http: {addr: "127.0.0.1:0"}
`

// Start starts a registry.
func Start(tb testing.TB, o Options) *Registry {
	tb.Helper()
	binary, err := exec.LookPath("docker-registry")
	if err != nil {
		tb.Skip("needs docker-registry: run scripts/deps")
	}
	temp := tb.TempDir()
	if o.Dir == "" {
		o.Dir = filepath.Join(temp, "blobs")
	}
	lines := fmt.Appendf(nil, config, o.Dir, !o.Keeps)
	if o.Password != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(o.Password), bcrypt.MinCost)
		if err != nil {
			tb.Fatal(err)
		}
		users := filepath.Join(temp, "users")
		if err := os.WriteFile(users, fmt.Appendf(nil, "rookery:%s\n", hash), 0o600); err != nil {
			tb.Fatal(err)
		}
		lines = fmt.Appendf(lines, "auth: {htpasswd: {realm: test, path: %q}}\n", users)
	}
	file := filepath.Join(temp, "config.yml")
	if err := os.WriteFile(file, lines, 0o600); err != nil {
		tb.Fatal(err)
	}
	r := &Registry{done: make(chan struct{})}
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
