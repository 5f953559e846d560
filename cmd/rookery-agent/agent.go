package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"rookery/agent/install"
	"rookery/agent/lldp"
	"rookery/agent/report"
	"rookery/image"
	"rookery/transport"
	"rookery/transport/rsync"
	"rookery/transport/swarm"
	"rookery/wire"
)

// An agent is one life of the agent, wherever it runs.
type agent struct {
	boot    string
	site    wire.Site
	api     *report.API
	http    string // base URL of the server's files
	listen  string // for the swarm, "" for none
	report  *report.Reporter
	console *report.Console
	log     *slog.Logger
	memory  int64          // for pieces, before there is a disk
	end     wire.Ending    // "" as the script says
	seedFor *time.Duration // nil as the script says
	extract image.Options

	inventory func() (wire.Inventory, error)
	machine   func() install.Machine
	neighbors *lldp.Listener // nil: not listened for
}

func newBoot() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func readSite(name string) (wire.Site, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return wire.Site{}, fmt.Errorf("site: %w", err)
	}
	var site wire.Site
	if err := wire.Strict(b, &site); err != nil {
		return wire.Site{}, fmt.Errorf("site: %s: %w", name, err)
	}
	return site, nil
}

// live says hello until the server wants something, and does it. Before a
// script is known nothing ends it but ctx: a machine that stands in a rack
// must not need a visit because a server was away.
func (a *agent) live(ctx context.Context) (wire.Ending, error) {
	for pause := 2 * time.Second; ; pause = min(2*pause, 30*time.Second) {
		welcome, err := a.hello(ctx)
		if err != nil {
			return wire.Shell, err
		}
		if welcome.Do == wire.Local {
			a.console.Print("rookery: this machine is installed, the server says: start from the own disk")
			return wire.Reboot, nil
		}
		script, err := a.script(ctx, welcome.Node)
		if err == nil {
			return a.installAndTell(ctx, script)
		}
		a.sendWhile(ctx, a.api.Send, func() { // so that the server knows as well
			sleep(ctx, pause)
		})
		if ctx.Err() != nil {
			return wire.Shell, err
		}
	}
}

// hello asks what to do until it is something other than wait.
func (a *agent) hello(ctx context.Context) (wire.Welcome, error) {
	const again = 2 * time.Second
	a.report.Start(wire.PhaseHello, "")
	var lastErr, lastWhy string
	var shown time.Time
	for pause := again; ; {
		welcome, mac, err := a.helloOnce(ctx)
		switch {
		case ctx.Err() != nil:
			a.report.Finish(wire.PhaseHello, "", nil, context.Cause(ctx))
			return wire.Welcome{}, context.Cause(ctx)
		case err != nil:
			if err.Error() != lastErr || time.Since(shown) > time.Minute {
				lastErr, shown = err.Error(), time.Now()
				a.log.Warn("hello: trying on", "err", err)
			}
			pause = min(pause+time.Second, 10*time.Second)
		case welcome.Do != wire.Wait:
			a.report.Finish(wire.PhaseHello, strings.TrimSpace(welcome.Node+" "+string(welcome.Do)), nil, nil)
			return welcome, nil
		default:
			lastErr, pause = "", again
			if welcome.Why != lastWhy || time.Since(shown) > time.Minute {
				lastWhy, shown = welcome.Why, time.Now()
				a.console.Print(waiting(mac, welcome.Why))
			}
		}
		sleep(ctx, pause)
	}
}

func (a *agent) helloOnce(ctx context.Context) (welcome wire.Welcome, mac string, err error) {
	inv, err := a.inventory()
	if err != nil {
		return wire.Welcome{}, "", err
	}
	for _, nic := range inv.NICs {
		if mac == "" || nic.Address != "" {
			mac = nic.MAC
		}
	}
	if a.neighbors != nil {
		for i, nic := range inv.NICs {
			inv.NICs[i].Neighbor = a.neighbors.Neighbor(nic.MAC)
		}
	}
	welcome, err = a.api.Hello(ctx, wire.Hello{Boot: a.boot, Inventory: inv})
	return welcome, mac, err
}

// hearNeighbors listens until it is told to be deaf. A machine without a listener is
// installed all the same, with peers that may stand elsewhere.
func hearNeighbors(ctx context.Context, log *slog.Logger) (l *lldp.Listener, deaf func()) {
	l, err := lldp.Listen(log)
	if err != nil {
		log.Info("switches are not heard", "err", err)
		return nil, func() {}
	}
	ctx, stop := context.WithCancel(ctx)
	var ear sync.WaitGroup
	ear.Go(func() {
		if err := l.Run(ctx); err != nil {
			log.Warn("switches are heard no more", "err", err)
		}
	})
	return l, func() { stop(); ear.Wait() }
}

// installAndTell carries out a script, and says hello again when a neighbor is heard.
func (a *agent) installAndTell(ctx context.Context, script wire.Script) (wire.Ending, error) {
	telling, stop := context.WithCancel(ctx)
	var teller sync.WaitGroup
	defer teller.Wait()
	defer stop()
	if a.neighbors != nil {
		teller.Go(func() { a.tell(telling, a.neighbors.News) })
	}
	return a.install(ctx, script, a.api.Send)
}

// tell says hello for each piece of news, until ctx ends. What the server wants of a
// machine that installs is in its script.
func (a *agent) tell(ctx context.Context, news <-chan struct{}) {
	for {
		select {
		case <-news:
		case <-ctx.Done():
			return
		}
		for pause := time.Second; ctx.Err() == nil; pause = min(2*pause, 30*time.Second) {
			_, _, err := a.helloOnce(ctx)
			if err == nil {
				break
			}
			a.log.Info("hello: neighbors: trying on", "err", err)
			sleep(ctx, pause)
		}
	}
}

// waiting is what a person in front of an unknown machine reads.
func waiting(mac, why string) string {
	rule := strings.Repeat("=", 78)
	text := "waiting: this machine is " + mac + " - accept it with:\n\n" +
		"    rookery node accept " + mac + " --name NAME --image IMAGE"
	if why != "" {
		text += "\n\n(" + printable(why) + ")"
	}
	return "\n" + rule + "\n\n  " + strings.ReplaceAll(text, "\n", "\n  ") + "\n\n" + rule + "\n"
}

// printable keeps what the server said from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || 0x80 <= r && r < 0xa0 {
			return -1
		}
		return r
	}, s[:min(len(s), 500)])
}

// script fetches the install script and verifies it. A right one of another
// node would make this machine that node once more.
func (a *agent) script(ctx context.Context, node string) (wire.Script, error) {
	a.report.Start(wire.PhaseScript, "")
	sealed, err := a.api.Script(ctx)
	var s wire.Script
	if err == nil {
		s, err = wire.Open(sealed, a.site.Key)
	}
	if err == nil && s.Node != node {
		err = fmt.Errorf("script: is for %s, and this machine is %s", s.Node, node)
	}
	text := ""
	if err == nil {
		text = fmt.Sprintf("%s: %s, installation %s", s.Node, s.Image.Name, s.ID)
	}
	a.report.Finish(wire.PhaseScript, text, nil, err)
	return s, err
}

// install carries out a verified script while send takes the events.
func (a *agent) install(ctx context.Context, script wire.Script, send func(context.Context, []wire.Event) error) (ending wire.Ending, err error) {
	if a.end != "" {
		script.Ending, script.OnFailure = a.end, a.end
	}
	if a.seedFor != nil {
		script.SeedFor = int(a.seedFor.Round(time.Second).Seconds())
	}
	download := transport.NewLimiter(script.Download)
	site := &install.Site{
		Base: a.http, Client: filesClient(), Groups: script.Multicast, Mirrors: script.Mirrors, Download: download, Switched: a.report.Switch,
	}
	if a.site.CA != "" {
		if site.TLS, err = report.TLS(a.site.CA); err != nil {
			return script.OnFailure, err
		}
		if site.SSH, err = rsync.Authority(a.site.CA); err != nil {
			return script.OnFailure, err
		}
	}
	peerCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	var peer sync.WaitGroup
	defer peer.Wait()
	defer stop()
	if a.listen != "" {
		ln, err := net.Listen("tcp", a.listen)
		if err != nil {
			return script.OnFailure, fmt.Errorf("swarm: %w", err)
		}
		site.Peer = swarm.NewPeer(ln, a.log)
		site.Peer.Limit(transport.NewLimiter(script.Upload), download)
		peer.Go(func() {
			if err := site.Peer.Run(peerCtx); err != nil {
				a.log.Error("swarm", "err", err)
			}
		})
	}
	a.sendWhile(ctx, send, func() {
		in := &install.Install{
			Script: script, Machine: a.machine(), Network: site, Report: a.report, Log: a.log,
			Extract: a.extract, Memory: a.memory,
		}
		ending, err = in.Run(ctx)
	})
	return ending, err
}

// sendWhile gives events to send while do runs, and beyond the end of ctx:
// do's own end is among them.
func (a *agent) sendWhile(ctx context.Context, send func(context.Context, []wire.Event) error, do func()) {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	var sender sync.WaitGroup
	defer sender.Wait()
	defer stop()
	sender.Go(func() { _ = a.report.Run(ctx, send) }) // ends with nil alone
	do()
}

// filesClient fetches manifests and ranges: without a limit for the whole,
// since the sources have their own rule for silence.
func filesClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		ResponseHeaderTimeout: 30 * time.Second,
		DisableCompression:    true,
		MaxIdleConnsPerHost:   4,
		IdleConnTimeout:       30 * time.Second,
	}}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
