package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A runner runs commands, times them and remembers what it ran.
type runner struct {
	ctx    context.Context
	work   string // a directory of its own
	rounds int
	said   []string
}

// say notes a command as a reader would type it.
func (r *runner) say(args []string) {
	self, _ := os.Executable()
	words := make([]string, len(args))
	for i, a := range args {
		a = strings.ReplaceAll(strings.ReplaceAll(a, self, "bench"), r.work+"/", "")
		if strings.ContainsAny(a, " $*|<>\n") {
			a = "'" + a + "'"
		}
		words[i] = a
	}
	line := strings.Join(words, " ") + "\n"
	if !slices.Contains(r.said, line) {
		r.said = append(r.said, line)
		fmt.Fprint(os.Stderr, "bench: ", line)
	}
}

// time runs a command and says how long it took and what it wrote.
func (r *runner) time(args ...string) (took time.Duration, out string, err error) {
	r.say(args)
	cmd := exec.CommandContext(r.ctx, args[0], args[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return 0, "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return time.Since(start), stdout.String(), nil
}

func (r *runner) run(args ...string) error {
	_, _, err := r.time(args...)
	return err
}

// path is a place in the work directory.
func (r *runner) path(name string) string { return filepath.Join(r.work, name) }

// race times commands, which take turns at being the first, and gives the median
// of each. The last argument of each command is a new directory, on a filesystem
// that was just made: ext4 looks at every inode that was freed in the last minutes
// before it takes one (recently_deleted in fs/ext4/ialloc.c), which takes longer
// than all else.
func (r *runner) race(commands ...[]string) ([]time.Duration, error) {
	times := make([][]time.Duration, len(commands))
	for round := range r.rounds {
		for i := range commands {
			i = (i + round) % len(commands)
			err := r.fresh(func(dir string) error {
				took, _, err := r.time(slices.Concat(commands[i], []string{dir})...)
				times[i] = append(times[i], took)
				return err
			})
			if err != nil {
				return nil, err
			}
		}
	}
	medians := make([]time.Duration, len(commands))
	for i := range times {
		medians[i] = median(times[i])
	}
	return medians, nil
}

// fresh makes a filesystem, mounts it for do, and removes it.
func (r *runner) fresh(do func(dir string) error) (err error) {
	file, dir := r.path("disk"), r.path("fresh")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 8<<30)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(file)) }()
	for _, command := range [][]string{
		{"mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", file},
		{"mkdir", "-p", dir},
		{"mount", "-o", "loop", file, dir},
	} {
		if err := r.run(command...); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0)) }()
	unix.Sync()
	return do(dir)
}
