// Package report says what an agent does: to the server, to the consoles of
// the machine and to a log, in the same words.
package report

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"rookery/wire"
)

// Bounds of what is kept in memory.
const (
	maxQueue = 2000    // events that wait for the server; only Log events are given up for room
	maxBatch = 200     // events in one request
	maxText  = 4000    // bytes of one event's text
	maxLog   = 1 << 20 // bytes of the log
)

// A Reporter collects what happens. Its methods may be called by anybody at
// any time and never wait for the server or a console.
type Reporter struct {
	boot    string
	console *Console // nil: none
	mirror  func([]byte)

	mu      sync.Mutex
	seq     int
	queue   []wire.Event
	sending int // the first ones of queue are on their way
	lost    int // Log events given up
	changed chan struct{}
	log     []byte
	cut     int // bytes of log given up
	began   map[wire.Phase]time.Time
	phase   wire.Phase
}

// New is a reporter for one start of the agent. console may be nil; mirror,
// if not nil, gets every line of the log as it is written.
func New(boot string, console *Console, mirror func([]byte)) *Reporter {
	return &Reporter{
		boot: boot, console: console, mirror: mirror,
		changed: make(chan struct{}), began: map[wire.Phase]time.Time{}, phase: wire.PhaseBoot,
	}
}

// Start says that a phase begins.
func (r *Reporter) Start(phase wire.Phase, text string) {
	r.mu.Lock()
	r.began[phase] = time.Now()
	r.phase = phase
	r.mu.Unlock()
	r.add(wire.Event{Phase: phase, State: wire.Started, Text: text})
}

// Progress says how far a phase is. Of several that wait only the last is sent.
func (r *Reporter) Progress(phase wire.Phase, text string, t *wire.Transfer) {
	r.add(wire.Event{Phase: phase, State: wire.Progress, Text: text, Fetch: t})
}

// Finish says that a phase is over, and how it went: err nil is success.
func (r *Reporter) Finish(phase wire.Phase, text string, t *wire.Transfer, err error) {
	e := wire.Event{Phase: phase, State: wire.Finished, Text: text, Fetch: t}
	if err != nil {
		e.State, e.Text = wire.Failed, err.Error()
	}
	r.mu.Lock()
	if began, ok := r.began[phase]; ok {
		e.Took = time.Since(began).Seconds()
	}
	r.mu.Unlock()
	r.add(e)
}

// Log adds a line to the log.
func (r *Reporter) Log(line string) { r.say(wire.Log, line) }

// Switch says how the phase that runs goes on, and why.
func (r *Reporter) Switch(text string) { r.say(wire.Switched, text) }

func (r *Reporter) say(state wire.State, text string) {
	r.mu.Lock()
	phase := r.phase
	r.mu.Unlock()
	r.add(wire.Event{Phase: phase, State: state, Text: text})
}

func (r *Reporter) add(e wire.Event) {
	e.Text = strings.ToValidUTF8(printable(e.Text), "?")
	if len(e.Text) > maxText {
		e.Text = strings.ToValidUTF8(e.Text[:maxText], "") + "..."
	}
	e.Boot, e.Time = r.boot, time.Now().UTC()
	if r.console != nil {
		r.console.Show(e)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seq++
	e.Seq = r.seq
	if e.State != wire.Progress {
		r.keep(e.Time.Format("2006-01-02T15:04:05.000Z ") + Line(e) + "\n")
	}
	r.queue = append(coalesce(r.queue, r.sending, e), e)
	if len(r.queue) > maxQueue {
		r.giveUp()
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// coalesce takes the waiting progress out of queue that e makes old.
func coalesce(queue []wire.Event, sending int, e wire.Event) []wire.Event {
	if e.State != wire.Progress {
		return queue
	}
	for i := len(queue) - 1; i >= sending; i-- {
		if queue[i].State == wire.Progress && queue[i].Phase == e.Phase {
			return slices.Delete(queue, i, i+1)
		}
	}
	return queue
}

// giveUp drops the oldest waiting log lines. There are few other events, all
// of which matter.
func (r *Reporter) giveUp() {
	surplus := len(r.queue) - maxQueue*3/4
	kept := r.queue[:r.sending]
	for _, e := range r.queue[r.sending:] {
		if e.State == wire.Log && surplus > 0 {
			surplus--
			r.lost++
			continue
		}
		kept = append(kept, e)
	}
	clear(r.queue[len(kept):])
	r.queue = kept
}

// keep adds to the log, which keeps its beginning and its end.
func (r *Reporter) keep(line string) {
	if r.mirror != nil {
		r.mirror([]byte(line))
	}
	r.log = append(r.log, line...)
	if len(r.log) > maxLog {
		half := maxLog / 2
		drop := maxLog / 4
		r.log = slices.Delete(r.log, half, half+drop)
		r.cut += drop
	}
}

// LogText is the log up to now.
func (r *Reporter) LogText() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	log := slices.Clone(r.log)
	if r.cut > 0 || r.lost > 0 {
		log = append(log, fmt.Sprintf("(%d bytes in the middle were not kept; %d lines never reached the server)\n", r.cut, r.lost)...)
	}
	return log
}

// ErrRefused is for a server that will never take these events.
var ErrRefused = errors.New("refused")

// Run gives the events to send, in their order and again until they are
// accepted, until ctx ends.
func (r *Reporter) Run(ctx context.Context, send func(context.Context, []wire.Event) error) error {
	defer r.sent(0) // what was on its way waits again
	pause, silent := firstPause, false
	for {
		batch, changed := r.next()
		if len(batch) == 0 {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		err := send(ctx, batch)
		if ctx.Err() != nil && err != nil {
			return nil
		}
		switch {
		case err == nil:
			r.sent(len(batch))
			pause, silent = firstPause, false
			continue
		case errors.Is(err, ErrRefused):
			r.sent(len(batch))
			r.local(fmt.Sprintf("server refused %d events: %v", len(batch), err))
			continue
		}
		r.sent(0)
		if !silent { // once per outage, and only here: the server does not hear it
			silent = true
			r.local(fmt.Sprintf("server does not take events, trying on: %v", err))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, longPause)
	}
}

const (
	firstPause = 250 * time.Millisecond
	longPause  = 5 * time.Second
)

// local is a line for the console and the log alone.
func (r *Reporter) local(line string) {
	e := wire.Event{State: wire.Log, Text: line, Time: time.Now().UTC()}
	if r.console != nil {
		r.console.Show(e)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep(e.Time.Format("2006-01-02T15:04:05.000Z ") + Line(e) + "\n")
}

// next is a copy of what to send, and a channel that closes when there is more.
func (r *Reporter) next() ([]wire.Event, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sending = 0
	for size := 2; r.sending < min(len(r.queue), maxBatch); r.sending++ {
		size += 600 + 6*len(r.queue[r.sending].Text) // JSON makes up to six bytes of one
		if size > wire.MaxEvents {
			break
		}
	}
	return slices.Clone(r.queue[:r.sending]), r.changed
}

// sent removes the first n events, which the server has.
func (r *Reporter) sent(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue = slices.Delete(r.queue, 0, n)
	r.sending = 0
	close(r.changed)
	r.changed = make(chan struct{})
}

// Flush waits until the server has everything.
func (r *Reporter) Flush(ctx context.Context) error {
	for {
		r.mu.Lock()
		left, changed := len(r.queue), r.changed
		r.mu.Unlock()
		if left == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%d events not accepted by the server: %w", left, ctx.Err())
		}
	}
}
