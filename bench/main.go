// Bench measures what Rookery answers for, beside the tools that others use for
// the same, and says of each figure whether it is what was asked. Package main.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"rookery/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:])
	if err != nil && err != errMissed {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
	}
	if err != nil {
		stop()
		os.Exit(1)
	}
}

// errMissed is when all was measured, and the last line has said what is too little.
var errMissed = errors.New("missed")

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		args = []string{""}
	}
	switch args[0] {
	case "child": // one thing to be timed, by a bench above
		return child(ctx, args[1:])
	case "peer": // and another
		if len(args) != 4 {
			return fmt.Errorf("peer: %q", args[1:])
		}
		return peer(ctx, args[1], args[2], args[3])
	case "files":
		if len(args) != 3 {
			return fmt.Errorf("files: %q", args[1:])
		}
		return files(ctx, args[1], args[2])
	case "sim":
		return simulate(args[1:])
	case "swarm":
		c, err := parseSwarm(args[1:])
		if err != nil {
			return err
		}
		return inLab(func(n *lab.Network) error { return runSwarm(ctx, n, c) })
	case "racks":
		c, err := parseRacks(args[1:])
		if err != nil {
			return err
		}
		return inLab(func(n *lab.Network) error { return runRacks(ctx, n, c) })
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	rounds := flags.Int("rounds", 5, "how often each thing is timed")
	trees := flags.String("trees", "out/cache/bench", "what scripts/benchtree made")
	small := flags.String("small", "out/cache/debian12.tar", "what scripts/image made")
	report := flags.String("o", "bench/image.md", "where the report goes")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if os.Getuid() != 0 {
		return errors.New("needs root: owners and device nodes are part of what is extracted")
	}
	work, err := os.MkdirTemp(*trees, ".work") // go build ./... passes over what begins with a dot
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	r := &runner{ctx: ctx, work: work, rounds: *rounds}
	rows, err := r.image(filepath.Join(*trees, "main.tar"), filepath.Join(*trees, "upgraded.tar"), *small)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "# The image in numbers\n\n%s. Written by `make bench`.\n\n", machine(work))
	writeTable(&b, rows)
	fmt.Fprintf(&b, "\nTimes are medians of %d rounds, in which the programs take turns,\n"+
		"each on an ext4 that was just made, after a `sync`; what they read is in the page cache. The commands:\n\n```\n%s```\n", *rounds, strings.Join(r.said, ""))
	line, ok := summary(rows)
	fmt.Fprintf(&b, "\n%s\n", line)
	os.Stdout.Write(b.Bytes())
	if err := os.WriteFile(*report, b.Bytes(), 0o644); err != nil {
		return err
	}
	if !ok {
		return errMissed
	}
	return nil
}

// inLab runs do in a private network.
func inLab(do func(*lab.Network) error) error {
	var err error
	code, labErr := lab.Enter(func(n *lab.Network) int {
		if err = do(n); err != nil {
			return 1
		}
		return 0
	})
	if err = errors.Join(err, labErr); err == nil && code != 0 {
		return errMissed // the instance inside has said why
	}
	return err
}

// machine says where and when.
func machine(dir string) string {
	cpu := "unknown processor"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
				cpu = strings.TrimSpace(value)
				break
			}
		}
	}
	fs := "unknown filesystem"
	if out, err := exec.Command("findmnt", "-no", "FSTYPE", "-T", dir).Output(); err == nil {
		fs = strings.TrimSpace(string(out))
	}
	kernel := "unknown kernel"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:])
	}
	return fmt.Sprintf("%s, %d cores (%s), %s, Linux %s, %s", time.Now().UTC().Format("2006-01-02 15:04 UTC"), runtime.NumCPU(), cpu, fs, kernel, runtime.Version())
}
