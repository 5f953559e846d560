package main

import (
	"bytes"
	"context"
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

// race times commands, which take turns, and gives the median of each. The last
// argument of each command is a new directory.
func (r *runner) race(commands ...[]string) ([]time.Duration, error) {
	times := make([][]time.Duration, len(commands))
	for range r.rounds {
		for i, command := range commands {
			dir := r.path("fresh")
			if err := os.Mkdir(dir, 0o755); err != nil {
				return nil, err
			}
			unix.Sync()
			took, _, err := r.time(slices.Concat(command, []string{dir})...)
			if err != nil {
				return nil, err
			}
			times[i] = append(times[i], took)
			if err := os.RemoveAll(dir); err != nil {
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
