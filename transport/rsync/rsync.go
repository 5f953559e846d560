// Package rsync fetches a tree of files with the distribution's rsync, which it
// drives: the last resort, where pieces do not come. It believes nothing of
// what comes; whoever calls compares it with the image.
package rsync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"rookery/transport"
)

// Program is the distribution's.
const Program = "rsync"

// Partial is a directory in a Job's Work: what was there before the first byte
// of a file came, and stays.
const Partial = "partial"

// A Job is a module of a daemon that a directory is made equal to.
type Job struct {
	Dial   func(context.Context) (net.Conn, error) // to the daemon, or to what leads there
	Module string
	Dir    string
	Work   string   // clean path below Dir: for files that are not complete; never touched otherwise
	Stay   []string // clean paths below Dir that are not removed although the module has none

	Limit    *transport.Limiter // of what comes
	Silent   time.Duration      // without a byte: the daemon is given up (0: 20 s)
	Received func(n int)        // told of all bytes that come
	Written  func(n int64)      // told how many bytes of files have come so far
}

// args are rsync's, with the daemon at addr.
func (j Job) args(addr string) []string {
	args := []string{
		"-aHAXS", "--numeric-ids",
		"--modify-window=-1",            // by itself it compares whole seconds
		"--delete", "--one-file-system", // else it empties what is mounted below
		"--partial-dir=" + filepath.Join(j.Dir, j.Work, Partial), "--temp-dir=" + filepath.Join(j.Dir, j.Work),
		"--info=progress2", "--no-human-readable", "--outbuf=N",
		"--filter=- /" + literal(j.Work),
	}
	for _, p := range j.Stay {
		args = append(args, "--filter=P /"+literal(p))
	}
	return append(args, "--", "rsync://"+addr+"/"+j.Module+"/", j.Dir+"/")
}

// literal takes their meaning from the characters that have one in a filter.
func literal(path string) string {
	if !strings.ContainsAny(path, "*?[") {
		return path // and a backslash is one
	}
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
}

// Run returns nil when Dir has all that the module has, and nothing else but
// what stays and what is in filesystems mounted there. It may be called again after an error: what is complete is not sent again.
func Run(ctx context.Context, j Job) error {
	if j.Silent == 0 {
		j.Silent = 20 * time.Second
	}
	if err := os.MkdirAll(filepath.Join(j.Dir, j.Work, Partial), 0o700); err != nil {
		return err
	}
	remote, err := j.Dial(ctx)
	if err != nil {
		return err
	}
	defer remote.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	line := &line{job: j, remote: remote}
	var carrying sync.WaitGroup
	carrying.Go(func() { line.carry(ctx, ln, cancel) })
	err = j.run(ctx, ln.Addr().String())
	silence := context.Cause(ctx)
	cancel(nil)
	ln.Close()
	remote.Close()
	carrying.Wait()
	if silence != nil {
		return silence
	}
	return err
}

// run runs the program.
func (j Job) run(ctx context.Context, addr string) error {
	cmd := exec.CommandContext(ctx, Program, j.args(addr)...)
	// Nothing of RSYNC_PROXY and its like.
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	said, progress := &tail{}, &progress{told: j.Written}
	cmd.Stdout, cmd.Stderr = progress, said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it puts away the file it is at
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var ended *exec.ExitError
	switch {
	case ctx.Err() != nil || err == nil:
		return nil
	case errors.As(err, &ended) && ended.Exited():
		err = exitError(ended.ExitCode())
	}
	if strings.Contains(string(said.text), "No space left on device") {
		return fmt.Errorf("%w: %w", transport.ErrStorage, unix.ENOSPC)
	}
	if strings.Contains(string(said.text), "@ERROR: max connections") {
		return fmt.Errorf("%w: %s", ErrBusy, said)
	}
	if s := said.String(); s != "" {
		return fmt.Errorf("%w: %s", err, s)
	}
	return err
}

var (
	// ErrPartial is of a run that was told all and did what it could: the next
	// one would end as it did.
	ErrPartial = errors.New("not everything could be done")
	// ErrBusy is of a daemon that serves as many as it may.
	ErrBusy = errors.New("daemon is busy")
)

// An exitError is one of rsync's exit codes.
type exitError int

func (e exitError) Error() string {
	name, ok := exits[int(e)]
	if !ok {
		name = "unknown"
	}
	return fmt.Sprintf("exit code %d, %s", int(e), name)
}

// Is says which of them are an ErrPartial.
func (e exitError) Is(target error) bool { return target == ErrPartial && e == 23 }

// exits are the codes of rsync(1), EXIT VALUES.
var exits = map[int]string{
	1: "syntax or usage error", 2: "protocol incompatibility", 3: "error selecting input or output files",
	4: "requested action not supported", 5: "error starting client-server protocol", 6: "daemon unable to append to its log",
	10: "error in socket I/O", 11: "error in file I/O", 12: "error in the protocol's data stream",
	13: "error with program diagnostics", 14: "error in IPC code", 15: "a process of rsync was killed", 16: "a process of rsync ended badly",
	19: "received SIGUSR1", 20: "received SIGINT, SIGTERM or SIGHUP", 21: "error of waitpid", 22: "no memory",
	23: "some files could not be transferred", 24: "some files vanished", 25: "stopped deleting at the limit",
	30: "timeout in sending or receiving", 35: "timeout of the connection",
	124: "remote command failed", 125: "remote command killed", 126: "remote command cannot run", 127: "remote command not found",
}

// A line carries bytes between rsync and the daemon, and hears whether there are any.
type line struct {
	job    Job
	remote net.Conn
	moved  atomic.Int64 // either way
	held   atomic.Bool  // by rsync, which does not take what has come
}

// carry takes the one connection that rsync makes.
func (l *line) carry(ctx context.Context, ln net.Listener, cancel context.CancelCauseFunc) {
	local, err := ln.Accept()
	if err != nil {
		return // it made none
	}
	ln.Close()
	stop := context.AfterFunc(ctx, func() { local.Close(); l.remote.Close() })
	defer stop()
	defer local.Close()
	var both sync.WaitGroup
	both.Go(func() {
		l.copy(local, l.remote, func(b []byte) error {
			if l.job.Received != nil {
				l.job.Received(len(b))
			}
			if err := l.job.Limit.Wait(ctx, len(b)); err != nil {
				return err
			}
			l.held.Store(true)
			defer l.held.Store(false)
			_, err := local.Write(b)
			return err
		})
	})
	both.Go(func() {
		l.copy(l.remote, local, func(b []byte) error {
			_, err := l.remote.Write(b)
			return err
		})
	})
	ended := make(chan struct{})
	go func() { both.Wait(); close(ended) }()
	tick := time.NewTicker(l.job.Silent / 20)
	defer tick.Stop()
	last, quiet := l.moved.Load(), time.Now()
	for {
		select {
		case <-ended:
			return
		case <-tick.C:
		}
		switch n := l.moved.Load(); {
		case n != last, l.held.Load():
			last, quiet = n, time.Now()
		case time.Since(quiet) >= l.job.Silent:
			cancel(fmt.Errorf("%w for %s", transport.ErrStalled, l.job.Silent))
		}
	}
}

// copy gives what comes from one side to write, and then ends the other.
func (l *line) copy(to, from net.Conn, write func([]byte) error) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		l.moved.Add(int64(n))
		if n > 0 && write(buf[:n]) != nil || err != nil {
			break
		}
	}
	if half, ok := to.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // the other way may go on
		return
	}
	to.Close()
}

// progress reads what rsync says of itself.
type progress struct {
	told func(int64)
	rest []byte // a line that is not complete
}

const maxLine = 4 << 10

func (p *progress) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		i := bytes.IndexAny(p.rest, "\r\n")
		if i < 0 {
			break
		}
		if done, ok := parseProgress(string(p.rest[:i])); ok && p.told != nil {
			p.told(done)
		}
		p.rest = p.rest[i+1:]
	}
	if over := len(p.rest) - maxLine; over > 0 {
		p.rest = p.rest[over:]
	}
	return len(b), nil
}

// parseProgress reads a line of --info=progress2: bytes, percent, rate, time.
func parseProgress(line string) (done int64, ok bool) {
	words := strings.Fields(line)
	if len(words) < 4 || !strings.HasSuffix(words[1], "%") || !strings.HasSuffix(words[2], "/s") {
		return 0, false
	}
	done, err := strconv.ParseInt(strings.ReplaceAll(words[0], ",", ""), 10, 64)
	return done, err == nil && done >= 0
}

// A tail keeps the end of what is written to it.
type tail struct{ text []byte }

const maxTail = 4 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.text = append(t.text, b...)
	if over := len(t.text) - maxTail; over > 0 {
		t.text = append(t.text[:0], t.text[over:]...)
	}
	return len(b), nil
}

// String is the last lines, on one.
func (t *tail) String() string {
	var lines []string
	for line := range strings.Lines(string(t.text)) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-3):], " | ")
}
