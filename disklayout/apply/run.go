package apply

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"rookery/disklayout"
)

// Run runs a program and waits for it. An error carries the end of what the
// program printed.
type Run func(ctx context.Context, name string, args ...string) error

// path is where programs are looked for, whatever the environment says: the
// first process has none, and users' leave out sbin.
const path = "/usr/sbin:/usr/bin:/sbin:/bin"

// Look finds the program that Host runs for name, so that its lack is known
// before anything is written.
func Look(name string) (string, error) {
	if filepath.IsAbs(name) {
		return exec.LookPath(name)
	}
	for _, dir := range filepath.SplitList(path) {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", fmt.Errorf("%s: not found in %s", name, path)
}

// Host runs programs of this system.
func Host(ctx context.Context, name string, args ...string) error {
	found, err := Look(name)
	if err != nil {
		return err
	}
	return run(ctx, "", found, args)
}

// Chroot runs programs of the system below root. Their names are absolute
// paths there.
func Chroot(root string) Run {
	return func(ctx context.Context, name string, args ...string) error {
		return run(ctx, root, name, args)
	}
}

func run(ctx context.Context, root, name string, args []string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 5 * time.Second // a grandchild may still hold the output
	if root != "" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		cmd.Dir = "/"
	}
	cmd.Env = []string{"PATH=" + path, "LC_ALL=C", "HOME=/root"}
	var out tail
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		command := disklayout.Command{Name: name, Args: args}
		if said := strings.TrimSpace(string(out.kept)); said != "" {
			return fmt.Errorf("%s: %w: %s", command, err, said)
		}
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// tail keeps the end of what is written to it.
type tail struct{ kept []byte }

const tailSize = 2 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.kept = append(t.kept, b...)
	t.kept = t.kept[max(len(t.kept)-tailSize, 0):]
	return len(b), nil
}
