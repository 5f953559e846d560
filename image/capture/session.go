// Package capture makes trees: from a machine that runs, over ssh and rsync, and
// from a distribution's packages.
package capture

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A Remote is how a golden client is reached.
type Remote struct {
	Address string   // [USER@]HOST[:PORT], an IPv6 address in brackets; the user is to be root
	Options []string // of ssh, before those that are given to it anyway
	Ask     bool     // ssh may ask for passwords and about host keys, at the terminal
}

// host is what ssh is told about the client: its options, and the name.
func (r Remote) host() (options []string, host string, err error) {
	user, host, ok := strings.Cut(r.Address, "@")
	if !ok {
		user, host = "root", r.Address
	}
	port := ""
	if rest, ok := strings.CutPrefix(host, "["); ok {
		host, port, _ = strings.Cut(rest, "]")
		port = strings.TrimPrefix(port, ":")
	} else if strings.Count(host, ":") == 1 {
		host, port, _ = strings.Cut(host, ":")
	}
	// What begins with a dash would be an option.
	if user == "" || host == "" || user[0] == '-' || host[0] == '-' || strings.ContainsAny(user+host, " \t\n/'\"") {
		return nil, "", fmt.Errorf("%q: want root@HOST or root@HOST:PORT", r.Address)
	}
	if port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return nil, "", fmt.Errorf("%q: port %q: want a number from 1 to 65535", r.Address, port)
		}
		options = append(options, "-p", port)
	}
	return append(options, "-l", user), host, nil
}

// ssh is the program's options for host, with its socket at control.
func (r Remote) ssh(host []string, control string) []string {
	options := append(host, r.Options...) // of two settings ssh takes the first
	if !r.Ask {
		options = append(options, "-o", "BatchMode=yes")
	}
	return append(options, "-x", "-T", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4",
		"-o", "ClearAllForwardings=yes", "-o", "ControlPath="+control)
}

// A Session is one connection to a golden client, whose end makes the client
// clean up.
type Session struct {
	Facts Facts

	ssh    []string // its options
	host   string
	mark   string
	socket string // directory of ssh's
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  *bufio.Reader
	said   *tail // as errors

	beats sync.WaitGroup // signs of life
	quiet chan struct{}  // closed to end them
	close func() error
}

// maxSaid bounds what a client may say at once, in bytes.
const maxSaid = 8 << 20

// Connect connects to a golden client and asks for its facts. The session is to
// be closed.
func Connect(ctx context.Context, r Remote) (*Session, error) {
	host, name, err := r.host()
	if err != nil {
		return nil, err
	}
	s := &Session{host: name, mark: "rookery-" + rand.Text(), said: &tail{}, quiet: make(chan struct{})}
	s.close = sync.OnceValue(s.end)
	if s.socket, err = os.MkdirTemp("", "rookery-"); err != nil {
		return nil, err
	}
	s.ssh = r.ssh(host, filepath.Join(s.socket, "ssh"))
	err = s.start(r.Ask)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.socket))
	}
	stop := context.AfterFunc(ctx, func() { s.cmd.Process.Kill() })
	text, err := s.until("end")
	if err == nil {
		s.Facts, err = parseFacts(text, s.mark)
	}
	if err == nil {
		err = s.Facts.usable()
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("%s: %w", r.Address, err)
	}
	return s, nil
}

// usable says what is missing on a client.
func (f Facts) usable() error {
	if f.Raw["uid"] != "0" {
		return fmt.Errorf("the user there has number %.20q, want root's 0", f.Raw["uid"])
	}
	if f.Raw["rsync"] == "" {
		return errors.New("rsync is not installed there (apt-get install rsync, dnf install rsync)")
	}
	return nil
}

// listen makes the client's shell carry out a script that comes line by line.
const listen = `
script=
while IFS= read -r line; do
	[ "$line" = %s ] && { eval "$script"; exit; }
	script="$script$line
"
done`

// start starts ssh with a shell that puts the questions and then listens. Later
// connections ride on this one, so that nobody is asked for a password twice.
func (s *Session) start(ask bool) error {
	script := askAll(s.mark) + fmt.Sprintf(listen, s.mark)
	args := append([]string{"-o", "ControlMaster=yes"}, s.ssh...)
	s.cmd = exec.Command("ssh", append(args, s.host, "exec sh -c "+quote(script))...)
	s.cmd.Stderr = s.said
	// A terminal's ^C is not to cut the connection before the client has cleaned
	// up; but ssh cannot ask from the background.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: !ask}
	var err error
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	s.lines = bufio.NewReader(out)
	return s.cmd.Start()
}

// until reads up to the line that has only mark and word, and returns the text
// before it.
func (s *Session) until(word string) (string, error) {
	var text strings.Builder
	for text.Len() < maxSaid {
		line, err := s.line()
		if err != nil {
			return "", err
		}
		if line == s.mark+" "+word {
			return text.String(), nil
		}
		text.WriteString(line + "\n")
	}
	return "", fmt.Errorf("says more than %d bytes of itself", maxSaid)
}

func (s *Session) line() (string, error) {
	var line []byte
	for len(line) < maxSaid {
		b, err := s.lines.ReadSlice('\n')
		line = append(line, b...)
		if err == nil {
			return strings.TrimSuffix(string(line), "\n"), nil
		}
		if err != bufio.ErrBufferFull {
			s.Close() // then all has been said
			return "", fmt.Errorf("ssh: connection ended: %s", s.said)
		}
	}
	return "", fmt.Errorf("says a line of more than %d bytes", maxSaid)
}

// hold has the client make its snapshots and keep them. It returns where the
// files are there, and corrects p where a snapshot could not be made.
func (s *Session) hold(ctx context.Context, p *Plan) (source string, err error) {
	name := "rookery-" + strings.ToLower(s.mark[len(s.mark)-8:])
	stop := context.AfterFunc(ctx, func() { s.stdin.Close() })
	defer func() {
		if !stop() {
			err = context.Cause(ctx)
		}
	}()
	if _, err := io.WriteString(s.stdin, p.script(s.mark, name)+s.mark+"\n"); err != nil {
		return "", err
	}
	for {
		line, err := s.line()
		if err != nil {
			return "", fmt.Errorf("snapshots: %w", err)
		}
		words := strings.SplitN(line, " ", 4)
		switch {
		case words[0] != s.mark || len(words) < 3:
		case words[1] == "ready":
			s.beat()
			return words[2], nil
		case words[1] == "live" && len(words) == 4:
			if i, err := strconv.Atoi(words[2]); err == nil && i >= 0 && i < len(p.parts) {
				p.parts[i].how, p.parts[i].why = live, "no snapshot: "+words[3]
			}
		}
	}
}

// beat begins to give signs of life.
func (s *Session) beat() {
	s.beats.Go(func() {
		tick := time.NewTicker(deaf * time.Second / 6)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				io.WriteString(s.stdin, "\n") // an error is seen by who reads
			case <-s.quiet:
				return
			}
		}
	})
}

// patience is how long a client may take to remove its snapshots.
const patience = time.Minute

// Close ends the connection when the client has cleaned up.
func (s *Session) Close() error { return s.close() }

func (s *Session) end() error {
	close(s.quiet)
	s.beats.Wait()
	s.stdin.Close()
	late := time.AfterFunc(patience, func() { s.cmd.Process.Kill() })
	io.Copy(io.Discard, s.lines) // ends with the connection
	s.cmd.Wait()                 // its status is the script's, and of no interest
	var err error
	if !late.Stop() {
		err = fmt.Errorf("%s: did not clean up within %v: it goes on by itself", s.host, patience)
	} else if status := s.cmd.ProcessState.ExitCode(); status < 0 || status == 255 { // ssh's own, or a signal
		err = fmt.Errorf("%s: the connection broke: it cleans up by itself within %d s: %s", s.host, deaf, s.said)
	}
	return errors.Join(err, os.RemoveAll(s.socket))
}

// A tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const maxTail = 4 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, b...)
	if over := len(t.text) - maxTail; over > 0 {
		t.text = append(t.text[:0], t.text[over:]...)
	}
	return len(b), nil
}

// String is the last lines, on one.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var lines []string
	for line := range strings.Lines(string(t.text)) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-5):], " | ")
}
