// Package rsynctest runs the distribution's rsync as a daemon over a directory.
package rsynctest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"rookery/transport/transporttest"
)

// Module is the one module of a Daemon.
const Module = "tree"

// A Daemon serves a directory at an address of loopback.
type Daemon struct {
	// Look, when not nil, is told before each portion that comes through Dial how
	// many bytes have come so far, by all connections. With false nothing more comes.
	Look func(came int64) (goes bool)

	addr string
	conf string
	came atomic.Int64

	mu    sync.Mutex
	cmd   *exec.Cmd
	ended chan error // closed when it has
}

// Start starts a daemon over dir, which ends with the test.
func Start(t testing.TB, dir string) *Daemon {
	t.Helper()
	if _, err := exec.LookPath("rsync"); err != nil || os.Geteuid() != 0 {
		t.Skip("rsync's daemon sets groups, and owners need root: run as root, with Debian's package rsync")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &Daemon{addr: ln.Addr().String(), conf: filepath.Join(t.TempDir(), "rsyncd.conf")}
	ln.Close()
	text := fmt.Sprintf("use chroot = no\nreverse lookup = no\nuid = 0\ngid = 0\nnumeric ids = yes\nmunge symlinks = no\n[%s]\npath = %s\n", Module, dir)
	if err := os.WriteFile(d.conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Restart(t)
	t.Cleanup(d.Kill)
	return d
}

// Restart starts a daemon that was killed, and waits until it answers.
func (d *Daemon) Restart(t testing.TB) {
	t.Helper()
	d.Kill()
	_, port, _ := net.SplitHostPort(d.addr)
	cmd := exec.Command("rsync", "--daemon", "--no-detach", "--config="+d.conf, "--address=127.0.0.1", "--port="+port)
	// The first process of a namespace: those of its connections end with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() { // for as long as it runs, since Pdeathsig is sent when this thread ends
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
			close(started)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	d.cmd, d.ended = cmd, started
	d.mu.Unlock()
	transporttest.Until(t, func() bool { // it says nothing when it listens
		c, err := net.Dial("tcp", d.addr)
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
}

// Kill ends it as kill -9 does, with the processes of its connections.
func (d *Daemon) Kill() {
	d.mu.Lock()
	cmd, ended := d.cmd, d.ended
	d.cmd = nil
	d.mu.Unlock()
	if cmd == nil {
		return
	}
	cmd.Process.Kill()
	<-ended
}

// Port is where it listens.
func (d *Daemon) Port() int {
	_, text, _ := net.SplitHostPort(d.addr)
	port, _ := strconv.Atoi(text) // of an address that was listened at
	return port
}

// Came is how many bytes have come through Dial.
func (d *Daemon) Came() int64 { return d.came.Load() }

// Dial connects to the daemon.
func (d *Daemon) Dial(ctx context.Context) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", d.addr)
	if err != nil {
		return nil, err
	}
	return &conn{c.(*net.TCPConn), d, make(chan struct{}), sync.Once{}}, nil
}

// A conn counts what comes.
type conn struct {
	*net.TCPConn
	d      *Daemon
	closed chan struct{}
	once   sync.Once
}

func (c *conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.TCPConn.Close()
}

func (c *conn) Read(b []byte) (int, error) {
	if c.d.Look != nil && !c.d.Look(c.d.came.Load()) {
		<-c.closed
	}
	n, err := c.TCPConn.Read(b)
	c.d.came.Add(int64(n))
	return n, err
}
