package lab

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A power is the switch, and the console, of a machine that is a process.
type power struct {
	Console *Console

	mu  sync.Mutex
	run *running
}

// running is one power-on.
type running struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{} // closed when the process has ended and all is read
}

// on starts cmd by start. What it says and complains about is the console's, and
// is added to the file log.
func (p *power) on(cmd *exec.Cmd, start func(*exec.Cmd) error, log string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run != nil {
		select {
		case <-p.run.done:
		default:
			return errors.New("is on already")
		}
	}
	file, err := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return errors.Join(err, file.Close())
	}
	cmd.Stdout, cmd.Stderr = in, in
	// Its children go with it when the power does.
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = start(cmd)
	}
	if err := errors.Join(err, in.Close()); err != nil {
		return errors.Join(err, file.Close(), out.Close())
	}
	p.Console.end(nil)
	run := &running{cmd: cmd, stdin: stdin, done: make(chan struct{})}
	go func() {
		defer close(run.done)
		_, err := io.Copy(io.MultiWriter(file, p.Console), out)
		err = errors.Join(err, out.Close(), file.Close())
		ended := state(cmd.Wait())
		p.Console.end(errors.Join(fmt.Errorf("switched off (%s)", ended), err))
	}()
	p.run = run
	return nil
}

func state(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// PowerOff takes the power away, without a word to the machine, and waits
// until it is off. It is fine to switch off what is not on.
func (p *power) PowerOff() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run == nil {
		return
	}
	select {
	case <-p.run.done:
	default:
		unix.Kill(-p.run.cmd.Process.Pid, unix.SIGKILL) // an error means that it has just ended
		<-p.run.done
	}
	p.run = nil
}

// Off is closed when the machine is off: by PowerOff, by itself, or because
// the program it is gave up. Console.Ended has the reason.
func (p *power) Off() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run == nil {
		off := make(chan struct{})
		close(off)
		return off
	}
	return p.run.done
}

// Type writes to the machine's serial line.
func (p *power) Type(text string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run == nil {
		return errors.New("type: is off")
	}
	_, err := io.WriteString(p.run.stdin, text)
	return err
}
