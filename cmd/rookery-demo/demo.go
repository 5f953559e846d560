package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"rookery/disklayout"
	"rookery/lab"
	"rookery/server/fleet"
	"rookery/wire"
)

const (
	imageName = "debian12:1"
	maxNodes  = 16
)

// A machine is what the site knows of a node beforehand.
type machine struct {
	name     string
	mac      string
	address  string // without its prefix length
	firmware disklayout.Firmware
	late     bool // powered on when the first machine has begun to fetch
}

// machines are the demo's n machines: one of BIOS unless there is only one, and
// those past the second come late.
func machines(n int) []machine {
	var all []machine
	for i := range n {
		m := machine{
			name:     fmt.Sprintf("n%d", i+1),
			mac:      fmt.Sprintf("52:54:00:07:00:%02x", 11+i),
			address:  fmt.Sprintf("10.7.0.%d", 11+i),
			firmware: disklayout.UEFI,
			late:     i >= 2,
		}
		if i == 0 && n > 1 {
			m.firmware = disklayout.BIOS
		}
		all = append(all, m)
	}
	return all
}

// records are what the server is told of the machines.
func records(all []machine, authorizedKey string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "kind: Defaults\nimage: %s\nconsole: ttyS0,115200\nauthorizedKeys: [%q]\nonFailure: poweroff\n", imageName, authorizedKey)
	for _, m := range all {
		fmt.Fprintf(&b, "---\nkind: Node\nname: %s\nmacs: [%q]\naddress: %s/%d\n", m.name, m.mac, m.address, lab.Address.Bits())
	}
	return b.String()
}

type demo struct {
	network  *lab.Network
	made     lab.Made
	dir      string
	machines []machine
	screen   *screen

	server *lab.Server
	nodes  []*node
	events *os.File
	lost   error // of writing events
}

// run is the whole demo. Its errors read NODE: STEP: CAUSE, with "site" for
// what is no node. There is a report of whatever machines were powered on.
func (d *demo) run(ctx context.Context) (*report, error) {
	began := time.Now()
	defer d.close()
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"publish " + imageName, d.publish},
		{"initramfs", func(ctx context.Context) error { return d.made.Netboot(ctx, d.server) }},
		{"records", d.apply},
		{"machines", d.plug},
		{"serve", d.serve},
	} {
		start := time.Now()
		if err := step.do(ctx); err != nil {
			return nil, fmt.Errorf("site: %s: %w", step.name, err)
		}
		d.screen.say("site: %s: %.1f s", step.name, time.Since(start).Seconds())
	}
	err := d.install(ctx)
	views, _ := d.server.Watch()
	r := newReport(d.nodes, views, time.Since(began))
	if err == nil {
		err = unique(d.nodes)
	}
	return r, err
}

func (d *demo) publish(ctx context.Context) error {
	d.server = &lab.Server{
		Program: d.made.Rookery,
		State:   filepath.Join(d.dir, "state"),
		Log:     filepath.Join(d.dir, "server.log"),
		Flags:   d.network.ServeFlags(),
	}
	return d.made.Publish(ctx, d.server, imageName)
}

func (d *demo) apply(ctx context.Context) error {
	key := d.key()
	if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "demo", "-f", key).CombinedOutput(); err != nil {
		return fmt.Errorf("ssh-keygen: %w: %s", err, out)
	}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		return err
	}
	file := filepath.Join(d.dir, "nodes.yaml")
	if err := os.WriteFile(file, []byte(records(d.machines, strings.TrimSpace(string(public)))), 0o644); err != nil {
		return err
	}
	_, err = d.server.Run(ctx, "apply", "-f", file)
	return err
}

func (d *demo) key() string { return filepath.Join(d.dir, "key") }

func (d *demo) plug(context.Context) error {
	for _, m := range d.machines {
		n := &node{machine: m, step: stepOff, since: time.Now(), vm: &lab.VM{
			Name: m.name, MAC: m.mac, Firmware: m.firmware, Dir: filepath.Join(d.dir, m.name),
		}}
		if err := d.network.Plug(n.vm); err != nil {
			return err
		}
		d.nodes = append(d.nodes, n)
	}
	return nil
}

func (d *demo) serve(ctx context.Context) error {
	events, err := os.Create(filepath.Join(d.dir, "events.jsonl"))
	if err != nil {
		return err
	}
	d.events = events
	d.server.Event = func(e fleet.NodeEvent) { d.lost = errors.Join(d.lost, json.NewEncoder(events).Encode(e)) }
	return d.server.Start(ctx)
}

// close ends all that was started. What it could complain about is nothing
// against what the demo showed before.
func (d *demo) close() {
	for _, n := range d.nodes {
		n.vm.PowerOff()
	}
	if d.server != nil {
		d.server.Stop()
	}
	if d.events != nil {
		d.events.Close()
	}
}

// install lets every node go its way, all at the same time. The first failure
// ends the others.
func (d *demo) install(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var nodes, watchers sync.WaitGroup
	for _, n := range d.nodes {
		nodes.Go(func() {
			if err := d.story(ctx, n); err != nil {
				cancel(fmt.Errorf("%s: %w", n.name, err))
			}
		})
	}
	watching, stop := context.WithCancel(context.Background()) // the screen shows how it ended, too
	watchers.Go(func() { d.screen.follow(watching, d.server, d.nodes) })
	watchers.Go(func() {
		select {
		case <-d.server.Ended():
			cancel(fmt.Errorf("site: serve: ended by itself; see %s", d.server.Log))
		case <-watching.Done():
		}
	})
	nodes.Wait()
	stop()
	watchers.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return d.lost
}

// story is a node's way from power on to a login that finds everything as it
// should be.
func (d *demo) story(ctx context.Context, n *node) error {
	for _, step := range []struct {
		name  string
		limit time.Duration
		do    func(context.Context) error
	}{
		{stepOff, 5 * time.Minute, func(ctx context.Context) error { return d.turn(ctx, n) }},
		{"power on", time.Minute, func(context.Context) error { return n.vm.PowerOn() }},
		{stepNetboot, 3 * time.Minute, func(ctx context.Context) error { return d.heard(ctx, n) }},
		{stepInstall, 7 * time.Minute, func(ctx context.Context) error { return d.installed(ctx, n) }},
		{"restart", 2 * time.Minute, func(ctx context.Context) error { return d.said(ctx, n, n.name+" .* starts from its own disk") }},
		{"login", 4 * time.Minute, func(ctx context.Context) error { return d.said(ctx, n, n.name+" login: ") }},
		{"ssh", time.Minute, func(ctx context.Context) error { return d.visit(ctx, n) }},
	} {
		n.enter(step.name)
		limit := lab.Within(step.limit)
		ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %s", limit.Round(time.Second)))
		err := step.do(ctx)
		cancel()
		var failed *failure
		if errors.As(err, &failed) {
			return failed
		}
		if err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	n.enter(stepDone)
	return nil
}

// A failure is what the agent said before it gave up; its own step counts.
type failure struct{ fleet.Failure }

func (f *failure) Error() string { return string(f.Step) + ": " + f.Cause }

// turn waits until it is n's turn: a late one comes when the first fetches.
func (d *demo) turn(ctx context.Context, n *node) error {
	if !n.late {
		return nil
	}
	_, err := d.server.Until(ctx, d.nodes[0].name, func(v fleet.View) bool {
		return slices.ContainsFunc(v.Phases, func(p fleet.Phase) bool { return p.Phase == wire.PhaseFetch })
	})
	return err
}

// heard waits for the agent. Until it speaks, the console is all there is.
func (d *demo) heard(ctx context.Context, n *node) error {
	_, err := d.until(ctx, n, func(v fleet.View) bool { return len(v.Phases) > 0 })
	if err != nil {
		return fmt.Errorf("%w; console: %s", err, n.vm.Console.Tail(3))
	}
	return nil
}

func (d *demo) installed(ctx context.Context, n *node) error {
	v, err := d.until(ctx, n, func(v fleet.View) bool { return v.Error != nil || v.Next == wire.Local })
	if v.Error != nil {
		return &failure{*v.Error}
	}
	return err
}

// until is Server.Until for as long as the machine is on.
func (d *demo) until(ctx context.Context, n *node, wanted func(fleet.View) bool) (fleet.View, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		select {
		case <-n.vm.Off():
			cancel(n.vm.Console.Ended())
		case <-ctx.Done():
		}
	})
	v, err := d.server.Until(ctx, n.name, wanted)
	cancel(nil)
	watcher.Wait()
	return v, err
}

func (d *demo) said(ctx context.Context, n *node, pattern string) error {
	_, err := n.vm.Console.Expect(ctx, pattern)
	return err
}
