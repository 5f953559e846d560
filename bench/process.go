package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A spec is a program that takes part in a bout.
type spec struct {
	name string
	args []string       // goArg stands for a file that is empty until the start
	said *regexp.Regexp // in one of its lines; nil: it ends well
	code []byte         // what the file goArg then has; nil: a word

	ready *regexp.Regexp // in a line of one that cannot be held: it is ready; nil: at once
}

// goArg among the arguments of a program that waits for the start by itself: it
// reads a named pipe to its end. Others are not started before.
const goArg = "{go}"

// A process is a spec that runs.
type process struct {
	spec
	cmd    *exec.Cmd
	gate   string         // the named pipe it waits at, "" for none
	set    chan time.Time // when it said that it is ready
	marked chan time.Time // when it said or did what it was to
	ended  chan struct{}  // closed when it is gone and read to its end
	err    error          // how it ended
	last   string         // its last line; read it after the end
	before time.Duration  // CPU time at the start of the bout
}

// A starter is where a program runs: a lab's host.
type starter interface{ Start(*exec.Cmd) error }

// start runs s on a host; gated, it waits for the start. What it says goes into
// a file below logs.
func start(host starter, s spec, dir, logs string, gated bool) (*process, error) {
	p := &process{spec: s, set: make(chan time.Time, 1), marked: make(chan time.Time, 1), ended: make(chan struct{})}
	args := append([]string(nil), s.args...)
	if gated {
		p.gate = filepath.Join(dir, s.name+".go")
		if err := unix.Mkfifo(p.gate, 0o600); err != nil {
			return nil, fmt.Errorf("%s: named pipe: %w", s.name, err)
		}
		waits := false
		for i, a := range args {
			if a == goArg {
				args[i], waits = p.gate, true
			}
		}
		if !waits {
			args = append([]string{"sh", "-c", `read -r go <"$0"; exec "$@"`, p.gate}, args...)
		}
	}
	log, err := os.Create(filepath.Join(logs, s.name))
	if err != nil {
		return nil, err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.Dir = in, in, dir
	p.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // its children end with it
	err = host.Start(p.cmd)
	in.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", s.name, err), out.Close(), log.Close())
	}
	go p.follow(out, log)
	return p, nil
}

// follow reads what the process says until it is gone.
func (p *process) follow(out io.ReadCloser, log io.WriteCloser) {
	defer close(p.ended)
	defer log.Close()
	defer out.Close()
	lines := bufio.NewScanner(out)
	lines.Split(scanLines)
	for lines.Scan() {
		now, line := time.Now(), strings.TrimSpace(lines.Text())
		if line == "" {
			continue
		}
		fmt.Fprintf(log, "%s %s\n", now.Format("15:04:05.000"), line)
		p.last = line
		if p.said != nil && p.said.MatchString(line) {
			mark(p.marked, now)
		}
		if p.ready != nil && p.ready.MatchString(line) {
			mark(p.set, now)
		}
	}
	io.Copy(io.Discard, out) // a line without end is not to block it
	p.err = p.cmd.Wait()
	if p.said == nil && p.err == nil {
		mark(p.marked, time.Now())
	}
}

// mark notes the first time.
func mark(c chan time.Time, now time.Time) {
	select {
	case c <- now:
	default:
	}
}

// scanLines is bufio.ScanLines for programs that draw over their last line.
func scanLines(data []byte, end bool) (advance int, token []byte, err error) {
	for i, c := range data {
		if c == '\n' || c == '\r' {
			return i + 1, data[:i], nil
		}
	}
	if end && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

// until waits for one of its marks.
func (p *process) until(ctx context.Context, mark chan time.Time) (time.Time, error) {
	select {
	case at := <-mark:
		return at, nil
	case <-p.ended:
		select {
		case at := <-mark:
			return at, nil
		default:
		}
		return time.Time{}, fmt.Errorf("%s: ended (%s): %s", p.name, exit(p.err), p.last)
	case <-ctx.Done():
		return time.Time{}, fmt.Errorf("%s: %w", p.name, context.Cause(ctx))
	}
}

func exit(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// open waits until the process stands at its gate, and returns what opens it.
func (p *process) open(ctx context.Context) (*os.File, error) {
	// Nobody says when somebody opens a named pipe to read.
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		f, err := os.OpenFile(p.gate, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if !errors.Is(err, unix.ENXIO) {
			return f, err
		}
		select {
		case <-again.C:
		case <-p.ended:
			return nil, fmt.Errorf("%s: ended before the start (%s): %s", p.name, exit(p.err), p.last)
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: not ready: %w", p.name, context.Cause(ctx))
		}
	}
}

// let opens the gate.
func (p *process) let(gate *os.File) error {
	word := p.code
	if word == nil {
		word = []byte("go\n")
	}
	_, err := gate.Write(word)
	if err := errors.Join(err, gate.Close()); err != nil {
		return fmt.Errorf("%s: start: %w", p.name, err)
	}
	return nil
}

// cpu is the time that the process and its children had of the processors.
func (p *process) cpu() time.Duration {
	select {
	case <-p.ended:
		return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
	default:
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0 // it is just being waited for
	}
	return statTime(string(b))
}

// statTime reads proc_pid_stat(5): fields 14 to 17 are user and system time of
// the process and of its children that it waited for, in hundredths of a second.
func statTime(stat string) time.Duration {
	words := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:]) // from field 3
	ticks := int64(0)
	for i := 14; i <= 17 && i-3 < len(words); i++ {
		n, _ := strconv.ParseInt(words[i-3], 10, 64) // the kernel wrote it
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// kill ends the process and its children, and waits for it.
func (p *process) kill() {
	unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL) // an error means that it has ended
	<-p.ended
}
