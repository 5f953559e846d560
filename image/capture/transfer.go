package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"rookery/image/chroot"
)

// A Result is what a capture came to.
type Result struct {
	Plan     Plan  // as it was carried out
	Files    int64 // and directories, of the tree
	Sent     int64 // files that were sent, whole or in part
	Deleted  int64 // files that were in the tree and are gone
	Received int64 // bytes over the wire
	Changed  []string
}

// Capture makes the directory tree equal to what p takes of the client. Where
// that is read live, it names the files that changed in the meantime.
func (s *Session) Capture(ctx context.Context, p Plan, tree string, progress func(done, total int64)) (r Result, err error) {
	if os.Geteuid() != 0 {
		return r, fmt.Errorf("%s: only root can give files their owners, this is user %d", tree, os.Geteuid())
	}
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return r, err
	}
	lock, err := chroot.Lock(tree)
	if err != nil {
		return r, err
	}
	defer lock.Close()
	source, err := s.hold(ctx, &p)
	r.Plan = p
	if err != nil {
		return r, fmt.Errorf("%s: %w", s.host, err)
	}
	stats, err := s.rsync(ctx, p, source, tree, progressOf(progress), "--info=progress2,stats2", "--no-inc-recursive")
	if err != nil {
		return r, err
	}
	r.Files, r.Sent = stat(stats, "Number of files"), stat(stats, "Number of regular files transferred")
	r.Deleted, r.Received = stat(stats, "Number of deleted files"), stat(stats, "Total bytes received")
	if len(p.Live()) > 0 {
		out, err := s.rsync(ctx, p, source, tree, nil, "-n", "--out-format=%i %n")
		if err != nil {
			return r, err
		}
		r.Changed = changed(out)
	}
	return r, nil
}

// rsync runs it and returns what it prints, as far as also does not take it.
func (s *Session) rsync(ctx context.Context, p Plan, source, tree string, also io.Writer, options ...string) (string, error) {
	args := append([]string{"-aHAXS", "--numeric-ids", "--delete", "--delete-excluded", "--no-human-readable",
		"--modify-window=-1", // by itself it compares whole seconds
	}, options...)
	for _, rule := range p.rules {
		args = append(args, "--filter="+rule)
	}
	host := s.host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	args = append(args, "-e", remoteShell(s.ssh), "--", host+":"+source, tree+"/")
	cmd := exec.CommandContext(ctx, "rsync", args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out bytes.Buffer
	var complaints tail
	cmd.Stdout, cmd.Stderr = &out, &complaints
	if also != nil {
		cmd.Stdout = io.MultiWriter(&out, also)
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it removes the file it is at
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var ended *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case errors.As(err, &ended) && ended.ExitCode() == 24: // files vanished: they are not part of the tree
	case err != nil:
		return "", fmt.Errorf("%s: rsync: %w: %s", s.host, err, &complaints)
	}
	return out.String(), nil
}

// remoteShell is ssh with its options, as rsync splits it into words.
func remoteShell(options []string) string {
	words := []string{"ssh", "-o", "ControlMaster=no"}
	for _, o := range options {
		// rsync knows both quotes, and doubles one to mean it (rsync(1), "--rsh").
		words = append(words, "'"+strings.ReplaceAll(o, "'", "''")+"'")
	}
	return strings.Join(words, " ")
}

// stat is a number of rsync's statistics; 0 when it is not there.
func stat(stats, name string) int64 {
	for line := range strings.Lines(stats) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+":"); ok {
			digits, _, _ := strings.Cut(strings.TrimSpace(value), " ")
			n, _ := strconv.ParseInt(strings.ReplaceAll(digits, ",", ""), 10, 64)
			return n
		}
	}
	return 0
}

// changed lists what a dry run would still do: "%i %n" is eleven characters of
// what, and the name. A directory's own time is no news.
func changed(out string) (names []string) {
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(line, "\n")
		what, name, ok := strings.Cut(line, " ")
		if !ok || len(what) < 2 || what[:2] == ".d" {
			continue
		}
		name = "/" + strings.TrimLeft(name, " ")
		if what == "*deleting" {
			name += " (gone)"
		}
		names = append(names, name)
	}
	return names
}

// progressOf reads rsync's progress out of its output, which a carriage return
// overwrites again and again.
func progressOf(report func(done, total int64)) io.Writer {
	if report == nil {
		return nil
	}
	return writerFunc(func(b []byte) {
		all := progressLine.FindAllSubmatch(b, -1)
		if len(all) == 0 {
			return
		}
		last := all[len(all)-1]
		done, err := strconv.ParseInt(strings.ReplaceAll(string(last[1]), ",", ""), 10, 64)
		percent, err2 := strconv.ParseInt(string(last[2]), 10, 64)
		if err != nil || err2 != nil || percent < 1 || percent > 100 || done > 1<<55 {
			return
		}
		report(done, done*100/percent)
	})
}

var progressLine = regexp.MustCompile(`\r +([0-9,]+) +([0-9]+)% `)

type writerFunc func([]byte)

func (f writerFunc) Write(b []byte) (int, error) { f(b); return len(b), nil }
