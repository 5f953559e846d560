// Package carousel decides which layers are sent by multicast, from what nodes
// say that they want, and has them sent.
package carousel

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"rookery/transport"
	"rookery/transport/multicast"
	"rookery/wire"
)

// A Layer is what can be sent, which may be the torrent file of one.
type Layer struct {
	Info  transport.Info
	Bytes io.ReaderAt
	First int64 // byte to begin with: the index, without which nobody can begin
}

// A Carousel sends layers for as long as enough nodes want them. All of it but Always
// is needed.
type Carousel struct {
	Group  string // addresses of which each layer has one
	Port   uint16
	Out    multicast.Outlet
	Rate   int64   // bytes a second on the wire, of all layers together
	Parity float64 // beyond the data, where no node says what it loses

	MinClients int           // want a layer: it is sent
	Wait       time.Duration // after the first of fewer: it is sent

	Layers func(wire.Digest) (Layer, bool)
	Quiet  func(wire.Digest, bool) // told whether a swarm is to repair itself meanwhile
	Always []wire.Digest           // sent whoever wants them
	Log    *slog.Logger

	mu   sync.Mutex
	jobs map[job]*sending
}

// A job is a layer at one rate, which has a group of its own.
type job struct {
	layer wire.Digest
	rate  int64 // as in a script; 0: the site's
}

// A sending is the life of a job, from the first word of a node.
type sending struct {
	demand  multicast.Demand
	settle  time.Duration // in what time others have to come to be waited for
	enough  bool          // wanted it at a time, and were told that it is about to be sent
	first   time.Time     // somebody wanted it
	came    []time.Time   // nodes, lately
	tried   time.Time     // it was started last
	running bool
	quiet   bool
}

// quietFrom is how many nodes hardly ever all lack the same.
const quietFrom = 4

// hearFor is how long it takes until all have said whether they hear a sender.
const hearFor = 6 * time.Second

// repairs says whether a swarm needs no seeder while a sender runs: enough of its
// nodes are served. Where a switch keeps the datagrams from them, they are not.
func repairs(nodes, served int, runs time.Duration) bool {
	return nodes >= quietFrom && (runs < hearFor || served >= quietFrom && 2*served >= nodes)
}

// maxJobs bounds what strangers can start.
const maxJobs = 64

// maxSettle is in what time as many as a tenth of the nodes have to come for more to be
// waited for, at the most. Who comes later has the next pass.
const maxSettle = 500 * time.Millisecond

// settle is that time for size bytes: as long as sending them takes, since who comes too
// late waits no longer than that for the next pass.
func (c *Carousel) settle(size, rate int64) time.Duration {
	takes := float64(size) / float64(c.rate(rate)) // seconds
	return time.Duration(min(takes, maxSettle.Seconds()) * float64(time.Second))
}

// rate is what is sent at for a script's rate.
func (c *Carousel) rate(script int64) int64 {
	if script > 0 {
		return min(c.Rate, script)
	}
	return c.Rate
}

// Hear takes note of what a node says, and returns the size of what it wants when that
// is sent or is about to be, and else 0. The error is about what is not known here.
func (c *Carousel) Hear(w wire.Want) (size int64, err error) {
	layer, ok := c.Layers(w.Layer)
	if !ok {
		return 0, fmt.Errorf("%s: no such layer", w.Layer)
	}
	if blocks, pieces := len(w.Lacks), len(layer.Info.Hashes); blocks > pieces { // it is kept
		return 0, fmt.Errorf("%s: lacks: %d blocks, the layer has %d pieces", w.Layer, blocks, pieces)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s, err := c.job(job{w.Layer, w.Rate})
	if err != nil {
		return 0, err
	}
	s.settle = c.settle(layer.Info.Length, w.Rate)
	now := time.Now()
	if s.demand.Hear(w, now) {
		s.came = append(s.came, now)
	}
	clients, _ := s.demand.Clients(now)
	s.enough = clients > 0 && (s.enough || clients >= c.MinClients)
	if s.running || s.enough {
		return layer.Info.Length, nil
	}
	return 0, nil
}

// job finds or makes what is known of a job. Called by who holds mu.
func (c *Carousel) job(j job) (*sending, error) {
	if s := c.jobs[j]; s != nil {
		return s, nil
	}
	if len(c.jobs) >= maxJobs {
		return nil, fmt.Errorf("%d layers are being sent, no more are", maxJobs)
	}
	if c.jobs == nil {
		c.jobs = map[job]*sending{}
	}
	s := &sending{first: time.Now()}
	c.jobs[j] = s
	return s, nil
}

// A state is what a job's beginning and end depend on.
type state struct {
	clients int           // want it
	enough  bool          // did, and have not all gone
	since   time.Duration // the first one did
	lately  int           // of these have come just now
	running bool
	always  bool
}

// An act is what to do about a job.
type act int

const (
	stay act = iota
	start
	stop
	forget
)

func (c *Carousel) decide(s state) act {
	switch {
	case s.always:
		if !s.running {
			return start
		}
	case s.clients == 0 && s.running:
		return stop
	case s.clients == 0 && !s.running:
		return forget
	case s.running:
	case s.since >= c.Wait, s.enough && s.lately*10 < s.clients:
		return start
	}
	return stay
}

const (
	lookEvery  = 100 * time.Millisecond
	retryAfter = 5 * time.Second
)

// Run starts and stops senders until ctx ends.
func (c *Carousel) Run(ctx context.Context) error {
	shared := transport.NewLimiter(c.Rate)
	var running sync.WaitGroup
	defer running.Wait()
	stops := map[job]context.CancelFunc{}
	defer func() {
		for _, stop := range stops {
			stop()
		}
	}()
	always := map[job]bool{}
	for _, d := range c.Always {
		always[job{d, 0}] = true
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		c.mu.Lock()
		for j := range always {
			_, _ = c.job(j)
		}
		all := maps.Clone(c.jobs)
		c.mu.Unlock()
		for j, s := range all {
			now := time.Now()
			c.mu.Lock()
			clients, served := s.demand.Clients(now)
			s.came = slices.DeleteFunc(s.came, func(at time.Time) bool { return now.Sub(at) >= s.settle })
			seen := state{
				clients: clients, enough: s.enough, since: now.Sub(s.first), lately: len(s.came),
				running: s.running, always: always[j],
			}
			act := c.decide(seen)
			if act == start && now.Sub(s.tried) < retryAfter && !s.tried.IsZero() {
				act = stay
			}
			switch act {
			case start:
				s.running, s.tried = true, now
			case stop, forget: // who comes from now on is another job's
				delete(c.jobs, j)
			}
			quiet := s.running && act != stop && repairs(clients, served, now.Sub(s.tried))
			turns := quiet != s.quiet
			s.quiet = quiet
			c.mu.Unlock()
			if turns {
				c.Quiet(j.layer, quiet)
			}
			switch act {
			case start:
				one, end := context.WithCancel(ctx)
				stops[j] = end
				c.Log.Info("multicast begins", "layer", short(j.layer), "clients", clients)
				running.Go(func() {
					defer end()
					err := c.send(one, j, s, shared, always[j])
					if err != nil && one.Err() == nil {
						c.Log.Error("multicast", "layer", short(j.layer), "err", err)
					}
					c.mu.Lock()
					defer c.mu.Unlock()
					s.running = false
				})
			case stop:
				c.Log.Info("multicast ends: nobody wants it any more", "layer", short(j.layer))
				stops[j]()
				delete(stops, j)
			case forget:
				delete(stops, j)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func short(d wire.Digest) string { return d.Hex()[:12] }

func (c *Carousel) send(ctx context.Context, j job, s *sending, shared *transport.Limiter, always bool) error {
	layer, ok := c.Layers(j.layer)
	if !ok {
		return fmt.Errorf("%s is no longer there", j.layer)
	}
	group, err := multicast.GroupOf(c.Group, layer.Info.InfoHash, j.rate)
	if err != nil {
		return err
	}
	sender := &multicast.Sender{
		Info: layer.Info, Layer: layer.Bytes, First: layer.First, Out: c.Out, To: netip.AddrPortFrom(group, c.Port),
		Rate: c.rate(j.rate), Shared: shared, Parity: c.Parity, Demand: &s.demand, Always: always,
		Log: c.Log.With("layer", short(j.layer)),
	}
	return sender.Run(ctx)
}
