package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"rookery/lab"
)

// A bout is one system that brings a file to some nodes at once, on links that
// all have the same rate.
type bout struct {
	system system
	load
	loss float64 // percent of the packets that come to a node
	slow bool    // the last node's link has a fifth of the rate
	in   int     // racks that the nodes are in, as many in each; 0: all on one switch
	data lab.Dataset
	tcp  string // congestion control of all; "": this machine's
	dir  string // for what the nodes write
	logs string // directory for what the programs say

	server *lab.Host
	nodes  []*lab.Host
	racks  []*lab.Rack
}

const (
	mtu         = 9000 // at 1500 the processors are busy with packets and no more with programs
	sampleEvery = 500 * time.Millisecond
)

func nodeName(i int) string { return fmt.Sprintf("n%d", i+1) }

// ip is the server's address.
func (b *bout) ip() string {
	if b.system.raw {
		return "127.0.0.1"
	}
	return "10.7.0.2"
}

// url is the server's.
func (b *bout) url() string { return "http://" + b.ip() + ":80" }

func nodeAddress(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 7, 0, byte(10 + i)}) }

// ideal is the time in which a link carries the file, of racks their uplinks.
func (b *bout) ideal() time.Duration {
	if b.system.raw {
		return 0
	}
	mbit := b.mbit
	if b.in > 0 {
		mbit /= uplinkPart
	}
	return time.Duration(float64(b.data.Size*8) / float64(mbit*1e6) * float64(time.Second))
}

// limit is how long a bout may take at the most.
func (b *bout) limit() time.Duration {
	times := 4.0
	if b.in > 0 {
		times = 8 // who does not know of racks is held up by their uplinks
	}
	if b.system.unicast {
		times = float64(b.n) * 2.5 // some of many are starved by the others
	}
	if b.loss > 0 {
		times *= 2
	}
	if b.slow {
		times = max(times, 2*slowness)
	}
	return time.Duration(times*float64(b.ideal())) + 30*time.Second
}

// A result is what was seen of a bout.
type result struct {
	took     []time.Duration // from the start, by node
	egress   int64           // bytes the server sent
	sent     int64           // bytes all nodes sent
	cpu      time.Duration   // of all programs
	server   time.Duration   // of the server's programs
	received [][]int64       // by node, at each sample, since the start
	began    time.Duration   // when bytes had begun to flow
	into     []int64         // bytes that came into each rack, from the start
	outOf    []int64         // and went out
}

// run carries the bout out on a new network.
func (b *bout) run(ctx context.Context, n *lab.Network) (r *result, err error) {
	limit := b.limit()
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done in %s", limit.Round(time.Second)))
	defer cancel()
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := b.plug(n); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	for _, dir := range []string{b.dir, b.logs} {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
			return nil, err
		}
	}
	defer os.RemoveAll(b.dir)

	var all []*process
	defer func() {
		for _, p := range all {
			p.kill()
		}
	}()
	cast := b.system.cast(b)
	for name, text := range cast.files {
		if err := os.WriteFile(b.path(name), []byte(text), 0o755); err != nil {
			return nil, err
		}
	}
	spawn := func(host *lab.Host, s spec, gated bool) (*process, error) {
		p, err := start(host, s, b.dir, b.logs, gated)
		if err == nil {
			all = append(all, p)
		}
		return p, err
	}
	for _, s := range cast.servers {
		p, err := spawn(b.server, s, false)
		if err == nil {
			_, err = p.until(ctx, p.marked)
		}
		if err != nil {
			return nil, fmt.Errorf("server: %w", err)
		}
	}
	var nodes, gated []*process
	for i, s := range cast.nodes {
		p, err := spawn(b.nodes[i], s, cast.starter == nil)
		if err != nil {
			return nil, fmt.Errorf("node: %w", err)
		}
		nodes = append(nodes, p)
	}
	for _, p := range nodes {
		if p.ready != nil {
			if _, err := p.until(ctx, p.set); err != nil {
				return nil, fmt.Errorf("node: %w", err)
			}
		}
	}
	if gated = nodes; cast.starter != nil {
		p, err := spawn(b.server, *cast.starter, true)
		if err != nil {
			return nil, fmt.Errorf("server: %w", err)
		}
		gated = []*process{p}
	}
	gates := make([]*os.File, len(gated))
	for i, p := range gated {
		if gates[i], err = p.open(ctx); err != nil {
			return nil, err
		}
	}
	r, err = b.watch(ctx, all, nodes, func() error {
		for i, p := range gated {
			if err := p.let(gates[i]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range nodes {
		if err := b.system.check(b, i); err != nil {
			return nil, fmt.Errorf("%s: %w", nodeName(i), err)
		}
	}
	return r, nil
}

// plug makes the server and the nodes.
func (b *bout) plug(n *lab.Network) error {
	var err error
	if b.server, err = n.Host("server", "", netip.MustParseAddr("10.7.0.2")); err != nil {
		return err
	}
	if b.system.raw { // by loopback
		b.nodes = []*lab.Host{b.server}
		return nil
	}
	b.nodes, b.racks = nil, nil
	for range b.in {
		r, err := n.Rack(b.mbit/uplinkPart, mtu)
		if err != nil {
			return err
		}
		b.racks = append(b.racks, r)
	}
	for i := range b.n {
		host := n.Host
		if b.in > 0 {
			host = b.racks[b.rack(i)].Host
		}
		h, err := host(nodeName(i), "", nodeAddress(i))
		if err != nil {
			return err
		}
		b.nodes = append(b.nodes, h)
	}
	all := append(slices.Clone(b.nodes), b.server)
	for i, h := range all {
		if b.tcp != "" {
			if err := h.Congestion(b.tcp); err != nil {
				return err
			}
		}
		if b.loss > 0 && h != b.server {
			if err := h.Lose(b.loss); err != nil {
				return err
			}
		}
		mbit := b.mbit
		if b.slow && i == b.n-1 {
			mbit = max(1, mbit/slowness)
		}
		if err := errors.Join(h.Link(mbit, mtu), h.Knows(all)); err != nil {
			return err
		}
	}
	return nil
}

const slowness = 5

// rack is the one that node i is in.
func (b *bout) rack(i int) int { return i / (b.n / b.in) }

// watch lets the programs go and looks on until every node is done.
func (b *bout) watch(ctx context.Context, all, nodes []*process, let func() error) (*result, error) {
	in0, out0, served0, err := b.traffic()
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		p.before = p.cpu()
	}
	r := &result{}
	t0 := time.Now()
	if err := let(); err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	go func() {
		at, err := finish(ctx, nodes)
		for _, at := range at {
			r.took = append(r.took, at.Sub(t0))
		}
		done <- err
	}()
	tick := time.NewTicker(b.every())
	defer tick.Stop()
	for ended := false; !ended; {
		select {
		case err := <-done:
			if err != nil {
				return nil, err
			}
			ended = true
		case <-tick.C:
		}
		in, out, served, err := b.traffic()
		if err != nil {
			return nil, err
		}
		for i := range in {
			in[i] -= in0[i]
		}
		if !ended { // every sample is as long as the others
			r.received = append(r.received, in)
		}
		r.sent, r.egress = out-out0, served-served0
		if r.began == 0 && slices.Max(in) > flowing {
			r.began = time.Since(t0)
		}
	}
	for _, rack := range b.racks {
		in, out, err := rack.Traffic()
		if err != nil {
			return nil, err
		}
		r.into, r.outOf = append(r.into, in), append(r.outOf, out)
	}
	for _, p := range all {
		used := p.cpu() - p.before
		r.cpu += used
		if !slices.Contains(nodes, p) {
			r.server += used
		}
	}
	return r, nil
}

// finish waits until all are done and says when each was, or until one fails.
func finish(ctx context.Context, nodes []*process) ([]time.Time, error) {
	waiting, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	at, errs := make([]time.Time, len(nodes)), make([]error, len(nodes))
	var all sync.WaitGroup
	for i, p := range nodes {
		all.Go(func() {
			if at[i], errs[i] = p.until(waiting, p.marked); errs[i] != nil {
				fail(errs[i])
			}
		})
	}
	all.Wait()
	if ctx.Err() == nil && waiting.Err() != nil {
		return nil, context.Cause(waiting) // and nothing of those who were not waited for
	}
	return at, several(errs)
}

// flowing is how many bytes have to have come before somebody is not just
// looking for others.
const flowing = 1 << 20

// every is the time between samples.
func (b *bout) every() time.Duration {
	if b.system.raw {
		return 10 * time.Millisecond
	}
	return sampleEvery
}

// traffic is what each node has received, all have sent, and the server has.
func (b *bout) traffic() (in []int64, out, served int64, err error) {
	if b.system.raw {
		n, err := b.server.Loopback()
		return []int64{n}, 0, n, err
	}
	for _, h := range b.nodes {
		received, sent, err := h.Traffic()
		if err != nil {
			return nil, 0, 0, err
		}
		in, out = append(in, received), out+sent
	}
	_, served, err = b.server.Traffic()
	return in, out, served, err
}

// several is the first of some errors, and how many there are.
func several(errs []error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) > 1 {
		return fmt.Errorf("%w (and %d more)", errs[0], len(errs)-1)
	}
	return errors.Join(errs...)
}

// target is where node i writes.
func (b *bout) target(i int) string { return b.path("target-" + nodeName(i)) }

// path is a place in the bout's directory.
func (b *bout) path(name string) string { return filepath.Join(b.dir, name) }
