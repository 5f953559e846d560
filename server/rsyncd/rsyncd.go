// Package rsyncd offers images as files: it checks their trees out, and keeps
// the distribution's rsync running over them as a daemon. It is the last resort of
// nodes, and for whoever has a stock rsync.
package rsyncd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/net/netutil"

	"rookery/image/store"
	"rookery/transport"
	"rookery/wire"
)

// A Server is a daemon, what it serves, and the ways in to it.
type Server struct {
	Dir    string // its own: trees and configuration
	Store  *store.Store
	Needed func(context.Context) (map[wire.Digest]bool, error) // manifests of versions that nodes are to get by rsync
	Log    *slog.Logger

	Address netip.Addr   // of the server, for answers
	Plain   net.Listener // nil: none
	TLS     net.Listener // of TLS; nil: none
	SSH     net.Listener // that ssh is spoken on; nil: none
	HostKey ssh.Signer   // of that
	Egress  *transport.Limiter

	port atomic.Int32 // of the daemon, on loopback

	mu    sync.Mutex
	trees map[wire.Digest]*tree // those that are made, and those that are to be
	wake  chan struct{}         // with room for one: there is something to make
}

// maxConnections is how many fetch at a time; others are told to come again.
const maxConnections = 64

// Available says what keeps rsync's daemon from running here, or nil.
func Available() error {
	if _, err := exec.LookPath("rsync"); err != nil {
		return fmt.Errorf("%w: install Debian's package rsync", err)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("only root can read all files of a tree, this is user %d", os.Geteuid())
	}
	// The daemon sets its groups first. See user_namespaces(7).
	if may, err := os.ReadFile("/proc/self/setgroups"); err == nil && string(bytes.TrimSpace(may)) == "deny" {
		return errors.New("groups cannot be set in this user namespace")
	}
	return nil
}

// Run serves until ctx ends, and closes the listeners. A daemon that ends is
// started again.
func (s *Server) Run(ctx context.Context) error {
	if err := s.open(); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var parts sync.WaitGroup
	defer parts.Wait()
	parts.Go(func() { s.supervise(ctx) })
	parts.Go(func() { s.make(ctx) })
	parts.Go(func() { s.tidy(ctx) })
	ended := make(chan error, 3)
	listening := 0
	for _, way := range []struct {
		in net.Listener
		by func(context.Context, net.Conn) error
	}{{s.Plain, s.forward}, {s.TLS, s.forward}, {s.SSH, s.bySSH}} {
		if way.in != nil {
			listening++
			parts.Go(func() { ended <- s.accept(ctx, way.in, way.by) })
		}
	}
	if listening == 0 {
		<-ctx.Done()
		return nil
	}
	err := <-ended
	stop()
	return err
}

const (
	firstPause = time.Second / 4
	longPause  = 30 * time.Second
	healthy    = time.Minute // a daemon that ran for so long had no trouble starting
)

// pauseAfter is how long to wait before a daemon is started again that ran for
// so long, when the pause before it was the given one.
func pauseAfter(ran, before time.Duration) time.Duration {
	if before == 0 || ran >= healthy {
		return firstPause
	}
	return min(2*before, longPause)
}

// supervise starts the daemon again and again.
func (s *Server) supervise(ctx context.Context) {
	for pause := time.Duration(0); ; {
		began := time.Now()
		err := s.daemon(ctx)
		if ctx.Err() != nil {
			return
		}
		pause = pauseAfter(time.Since(began), pause)
		s.Log.Error("rsync daemon ended and is started again", "err", err, "pause", pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// daemon runs rsync until it ends. It is the first process of a namespace, so
// that those it makes for connections end with it, and it ends with this process.
func (s *Server) daemon(ctx context.Context) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	s.port.Store(int32(port))
	defer s.port.Store(0)
	cmd := exec.Command("rsync", "--daemon", "--no-detach", "--config="+s.config(), "--log-file=/dev/stdout",
		"--address=127.0.0.1", fmt.Sprintf("--port=%d", port))
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	said := &logWriter{log: s.Log}
	cmd.Stdout, cmd.Stderr = said, said
	// The signal comes when the thread ends that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { cmd.Process.Kill() })()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, said.last())
	}
	return errors.New("ended by itself")
}

func freePort() (int, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port, nil
}

// accept serves a listener's connections until ctx ends.
func (s *Server) accept(ctx context.Context, ln net.Listener, one func(context.Context, net.Conn) error) error {
	ln = netutil.LimitListener(ln, 4*maxConnections)
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	defer ln.Close()
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil { // too many open files, or a client that was gone at once
			s.Log.Warn("rsync: accept", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		serving.Go(func() {
			if err := one(ctx, conn); err != nil && ctx.Err() == nil {
				s.Log.Warn("rsync", "client", conn.RemoteAddr().String(), "err", err)
			}
		})
	}
}

// starting is how long a client may wait for a daemon that is being started.
const starting = 5 * time.Second

// dial reaches the daemon.
func (s *Server) dial(ctx context.Context) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, starting)
	defer cancel()
	for {
		err := errors.New("daemon does not run")
		if port := s.port.Load(); port != 0 {
			var d net.Dialer
			var c net.Conn
			if c, err = d.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
				return c.(*net.TCPConn), nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// shy is how long a client may take to say which module it wants.
const shy = 30 * time.Second

// forward carries bytes between a client and the daemon until both are done.
func (s *Server) forward(ctx context.Context, client net.Conn) error {
	defer client.Close()
	client.SetReadDeadline(time.Now().Add(shy))
	daemon, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer daemon.Close()
	defer context.AfterFunc(ctx, func() { client.Close(); daemon.Close() })()
	s.Log.Info("rsync", "client", client.RemoteAddr().String(), "local", daemon.LocalAddr().String())
	var both sync.WaitGroup
	both.Go(func() {
		buf := make([]byte, 32<<10)
		for heard := 0; ; {
			n, err := client.Read(buf)
			if heard += n; heard > greeting {
				client.SetReadDeadline(time.Time{})
			}
			if _, werr := daemon.Write(buf[:n]); werr != nil || err != nil {
				break
			}
		}
		daemon.CloseWrite()
	})
	both.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := daemon.Read(buf)
			if s.Egress.Wait(ctx, n) != nil {
				break
			}
			client.SetWriteDeadline(time.Now().Add(stuck))
			if _, werr := client.Write(buf[:n]); werr != nil || err != nil {
				break
			}
		}
		client.Close() // the daemon ends when all is said
	})
	both.Wait()
	return nil
}

const (
	// greeting is less than a client has said when it has named a module.
	greeting = len("@RSYNCD: 31.0\n")
	// stuck is how long a client may take nothing.
	stuck = 5 * time.Minute
)

// logWriter makes lines of the log of what rsync says.
type logWriter struct {
	log *slog.Logger

	mu   sync.Mutex
	rest []byte
	line string // the last
}

func (w *logWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = append(w.rest, b...)
	for {
		line, rest, ok := bytes.Cut(w.rest, []byte("\n"))
		if !ok {
			break
		}
		w.line, w.rest = undated(string(line)), rest
		w.log.Info("rsync daemon", "says", w.line)
	}
	if len(w.rest) > 4<<10 {
		w.rest = nil
	}
	return len(b), nil
}

func (w *logWriter) last() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.line
}

// undated is a line of rsync's log without its date: ours has one.
func undated(line string) string {
	const date = "2006/01/02 15:04:05 "
	if len(line) > len(date) {
		if _, err := time.Parse(date, line[:len(date)]); err == nil {
			return line[len(date):]
		}
	}
	return line
}

// A module is a directory by a name.
type module struct{ name, path string }

// configuration is rsyncd.conf(5). The daemon reads it again for each connection.
func configuration(dir string, modules []module) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Written by rookery serve, which overwrites it.
lock file = %s
max connections = %d
listen backlog = 128
reverse lookup = no
use chroot = yes
numeric ids = yes
munge symlinks = no
uid = 0
gid = 0
read only = yes
list = no
timeout = 600
`, filepath.Join(dir, "lock"), maxConnections)
	for _, m := range modules {
		fmt.Fprintf(&b, "\n[%s]\npath = %s\n", m.name, m.path)
	}
	return b.String()
}
