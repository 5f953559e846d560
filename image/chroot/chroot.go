// Package chroot runs a command in a tree as if the tree were a machine: with
// kernel filesystems, name resolution, and processes and mounts of its own. All
// that it adds to the tree is gone when the command ends.
package chroot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Command is to be run in a tree, as root.
type Command struct {
	Tree string
	Args []string // none: a shell of the tree's

	Stdin          io.Reader // of which a terminal is handed over to the command
	Stdout, Stderr io.Writer
}

// An Exit is the status that a command ended with, when that is not 0: 128 and
// the signal's number when a signal ended it, as shells count.
type Exit int

func (e Exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// ErrBusy means that another program works on the tree.
var ErrBusy = errors.New("is in use by another shell, capture or publication")

// Lock keeps other shells, captures and publications away from a tree until it
// is closed.
func Lock(tree string) (io.Closer, error) {
	// The lock is on the directory itself, so that no file is left for it.
	dir, err := os.OpenFile(tree, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		if err == unix.EWOULDBLOCK {
			err = ErrBusy
		}
		return nil, fmt.Errorf("%s: %w", tree, err)
	}
	return dir, nil
}

// grace is how long a command may take to end when it is asked to.
const grace = 5 * time.Second

// Run runs c. An error that is an Exit is the command's own.
func (c Command) Run(ctx context.Context) (err error) {
	if err := c.check(); err != nil {
		return err
	}
	lock, err := Lock(c.Tree)
	if err != nil {
		return err
	}
	defer lock.Close()
	root, err := os.OpenRoot(c.Tree)
	if err != nil {
		return err
	}
	defer root.Close()
	job, err := c.job(root)
	if err != nil {
		return fmt.Errorf("%s: %w", c.Tree, err)
	}
	added, err := place(root, job)
	defer func() {
		if left := added.remove(); left != nil {
			err = errors.Join(err, left)
		}
	}()
	if err != nil {
		return fmt.Errorf("%s: %w", c.Tree, err)
	}
	return c.start(ctx, job)
}

func (c Command) check() error {
	info, err := os.Stat(c.Tree)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s: is no directory", c.Tree)
	}
	if slash, err := os.Stat("/"); err != nil || os.SameFile(slash, info) {
		return fmt.Errorf("%s: is this machine's own root", c.Tree)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s: a shell in a tree needs root, this is user %d", c.Tree, os.Geteuid())
	}
	return nil
}

// A job is what the second life of the program has to do.
type job struct {
	Tree     string
	Name     string // of the machine that the tree plays
	Args     []string
	Resolv   string // content of resolv.conf
	Files    []file // read-only, over what the tree has
	Terminal bool   // standard input is one, and ours
}

// A file is shown in the tree at Path while the command runs.
type file struct {
	Path, Content string
	Mode          os.FileMode
}

// noServices is what invoke-rc.d asks before a package's script starts a
// service: 101 is no (policy-rc.d specification, "Exit codes").
const noServices = "#!/bin/sh\nexit 101\n"

func (c Command) job(root *os.Root) (*job, error) {
	j := &job{Tree: c.Tree, Name: hostname(c.Tree), Args: c.Args}
	if len(j.Args) == 0 {
		for _, sh := range []string{"bin/bash", "usr/bin/bash", "bin/sh", "usr/bin/sh"} {
			// Lstat: a link to an absolute path is right, and leads out of an os.Root.
			if _, err := root.Lstat(sh); err == nil {
				j.Args = []string{"/" + sh}
				break
			}
		}
		if len(j.Args) == 0 {
			return nil, errors.New("is no tree with a shell: there is no bin/sh")
		}
	}
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	j.Resolv = string(resolv)
	if _, err := root.Lstat("usr/sbin/invoke-rc.d"); err == nil {
		j.Files = append(j.Files, file{"usr/sbin/policy-rc.d", noServices, 0o755})
	}
	if f, ok := c.Stdin.(*os.File); ok {
		group, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCGPGRP)
		j.Terminal = err == nil && group == unix.Getpgrp()
	}
	return j, nil
}

// hostname is the tree's name as far as it can be one of a machine.
func hostname(tree string) string {
	abs, err := filepath.Abs(tree)
	if err != nil {
		abs = tree
	}
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '.':
			return r
		}
		return '-'
	}, filepath.Base(abs))
	return name[:min(len(name), 64)] // HOST_NAME_MAX
}

// again holds, in the environment of the program's second life, its job.
const again = "ROOKERY_IN_TREE"

// start runs the second life and waits for it.
func (c Command) start(ctx context.Context, j *job) error {
	text, err := json.Marshal(j)
	if err != nil {
		return err
	}
	complaints, in, err := os.Pipe()
	if err != nil {
		return err
	}
	defer complaints.Close()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), again+"="+string(text))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
	cmd.ExtraFiles = []*os.File{in}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		// The first process of a namespace takes the others with it, and the
		// namespace its mounts: that is what leaves the tree clean.
		Pdeathsig: syscall.SIGKILL,
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = grace
	// Pdeathsig looks at the thread that started the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	in.Close()
	if err != nil {
		return fmt.Errorf("new namespaces: %w", err)
	}
	said, readErr := io.ReadAll(complaints)
	err = cmd.Wait()
	if j.Terminal {
		takeBack(int(c.Stdin.(*os.File).Fd()))
	}
	var ended *exec.ExitError
	switch {
	case len(said) > 0:
		return fmt.Errorf("%s: %s", c.Tree, said)
	case readErr != nil:
		return readErr
	case errors.As(err, &ended) && ended.ExitCode() >= 0:
		return Exit(ended.ExitCode())
	case errors.As(err, &ended):
		return Exit(128 + int(ended.Sys().(syscall.WaitStatus).Signal()))
	}
	return err
}

// takeBack puts this program into the foreground of its terminal again.
func takeBack(terminal int) {
	signal.Ignore(syscall.SIGTTOU) // what a background process gets for trying
	defer signal.Reset(syscall.SIGTTOU)
	unix.IoctlSetPointerInt(terminal, unix.TIOCSPGRP, unix.Getpgrp()) // the terminal may be gone
}
