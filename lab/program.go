package lab

import (
	"fmt"
	"os"
	"os/exec"
)

// A Program runs on a Host, and is switched on and off as a machine is. What it
// says is its Console's.
type Program struct {
	Name string
	Args []string // the first is what to run
	Log  string   // file that what it says is added to

	power
	host *Host
}

// Program makes a program for the host, switched off.
func (h *Host) Program(name, log string, args ...string) *Program {
	return &Program{Name: name, Args: args, Log: log, power: power{Console: NewConsole()}, host: h}
}

// PowerOn starts the program, again after it has ended.
func (p *Program) PowerOn() error {
	if err := p.on(exec.Command(p.Args[0], p.Args[1:]...), p.host.Start, p.Log); err != nil {
		return fmt.Errorf("%s: %w", p.Name, err)
	}
	return nil
}

// Signal sends the program a signal.
func (p *Program) Signal(s os.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run == nil {
		return fmt.Errorf("%s: %s: is off", p.Name, s)
	}
	return p.run.cmd.Process.Signal(s)
}
