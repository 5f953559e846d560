// Command rookery-demo turns bare virtual machines on a private network into
// Debian machines, and watches: the server, the firmware, the agents, the swarm
// and the logins are the real ones.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/term"

	"rookery/lab"
)

const usage = `usage: rookery-demo [--nodes N] [--out DIR]

Installs N virtual machines (default 3) over a private network, from what
"make build kernel image" left in DIR (default out), and logs in to each.
With one node it is a UEFI one. DIR/demo keeps consoles, events.jsonl, the
server's log and report.json.
`

func main() {
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	nodes := flag.Int("nodes", 3, "")
	out := flag.String("out", "out", "")
	flag.Parse()
	if flag.NArg() > 0 || *nodes < 1 || *nodes > maxNodes {
		fmt.Fprintf(os.Stderr, "rookery-demo: want --nodes 1 to %d and no arguments\n\n%s", maxNodes, usage)
		os.Exit(2)
	}
	code, err := lab.Enter(func(network *lab.Network) int {
		if err := run(network, *nodes, *out); err != nil {
			fmt.Printf("demo: %v\n", err)
			return 1
		}
		return 0
	})
	if err != nil {
		fmt.Printf("demo: %v\n", err)
	}
	os.Exit(code)
}

func run(network *lab.Network, nodes int, out string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	limit := lab.Within(10 * time.Minute)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %s", limit.Round(time.Second)))
	defer cancel()

	dir := filepath.Join(out, "demo")
	made := lab.In(out)
	if err := made.Check(); err != nil {
		return fmt.Errorf("site: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("site: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("site: %w", err)
	}
	show := &screen{out: os.Stdout}
	if fd := int(os.Stdout.Fd()); term.IsTerminal(fd) {
		show.width = func() int {
			width, _, err := term.GetSize(fd)
			if err != nil || width <= 0 {
				return 80
			}
			return width
		}
	}
	d := &demo{network: network, made: made, dir: dir, machines: machines(nodes), screen: show}
	report, err := d.run(ctx)
	if report != nil {
		err = errors.Join(err, report.save(filepath.Join(dir, "report.json")))
	}
	if err != nil {
		return err
	}
	fmt.Print("\n", report.table(), "\n")
	fmt.Printf("demo: %d nodes installed and booted from their own disks in %.0f s\n", nodes, report.Seconds)
	return nil
}
