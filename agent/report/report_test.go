package report

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rookery/wire"
)

// flaky is a server that is away for a while and sometimes takes events
// without managing to say so.
type flaky struct {
	mu    sync.Mutex
	calls int
	has   []wire.Event
	fail  func(call int) (stored bool, err error)
}

func (f *flaky) send(_ context.Context, events []wire.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	stored, err := true, error(nil)
	if f.fail != nil {
		stored, err = f.fail(f.calls)
	}
	for _, e := range events {
		if stored && (len(f.has) == 0 || e.Seq > f.has[len(f.has)-1].Seq) {
			f.has = append(f.has, e)
		}
	}
	return err
}

func states(events []wire.Event) (list []string) {
	for _, e := range events {
		list = append(list, string(e.Phase)+" "+string(e.State))
	}
	return list
}

func TestEveryPhaseArrivesOnceAndInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &flaky{fail: func(call int) (bool, error) {
			return call%2 == 0, map[bool]error{true: errors.New("connection reset")}[call < 12]
		}}
		r := New("b", nil, nil)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = r.Run(ctx, server.send) })
		var want []string
		for _, phase := range []wire.Phase{wire.PhasePlan, wire.PhaseFetch, wire.PhaseLoader} {
			r.Start(phase, "")
			for i := range 1000 {
				r.Progress(phase, "", &wire.Transfer{Done: int64(i)})
			}
			time.Sleep(time.Second)
			r.Finish(phase, "", nil, nil)
			want = append(want, string(phase)+" started", string(phase)+" finished")
		}
		if err := r.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		wg.Wait()
		got := slices.DeleteFunc(states(server.has), func(s string) bool { return strings.HasSuffix(s, " progress") })
		if !slices.Equal(got, want) {
			t.Errorf("the server has %v, want %v", got, want)
		}
		if len(server.has) > 20 {
			t.Errorf("the server was told %d things: progress does not coalesce", len(server.has))
		}
		if !slices.IsSortedFunc(server.has, func(a, b wire.Event) int { return a.Seq - b.Seq }) {
			t.Error("events out of order")
		}
		last := server.has[len(server.has)-1]
		if last.State != wire.Finished || math.Abs(last.Took-1) > 0.01 {
			t.Errorf("last event: %+v, want one that took 1 s", last)
		}
	})
}

func TestMemoryIsBounded(t *testing.T) {
	r := New("b", nil, nil)
	r.Start(wire.PhaseFetch, "")
	for i := range 6 * maxQueue {
		r.Log(fmt.Sprint("line ", i, strings.Repeat("x", 100)))
	}
	r.Finish(wire.PhaseFetch, "", nil, errors.New("disk: broke"))
	if len(r.queue) > maxQueue || len(r.LogText()) > maxLog+100 {
		t.Errorf("%d events and %d bytes are kept", len(r.queue), len(r.LogText()))
	}
	if r.queue[0].State != wire.Started || r.queue[len(r.queue)-1].State != wire.Failed {
		t.Error("a phase event was lost to log lines")
	}
	log := string(r.LogText())
	if !strings.Contains(log, "line 0x") || !strings.Contains(log, "FAILED") || !strings.Contains(log, "were not kept") {
		t.Error("the log has lost its beginning, its end, or does not say what is missing")
	}
}

func TestBatchesFitTheServer(t *testing.T) {
	r := New(strings.Repeat("0", 32), nil, nil)
	for range 300 {
		r.Log(strings.Repeat("<", 2*maxText))
	}
	server := &flaky{}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		_ = r.Run(ctx, func(ctx context.Context, events []wire.Event) error {
			if _, err := decodeAgain(events); err != nil {
				t.Error(err)
			}
			return server.send(ctx, events)
		})
	})
	if err := r.Flush(ctx); err != nil {
		t.Error(err)
	}
	cancel()
	wg.Wait()
}

func TestAServerThatRefusesDoesNotBlock(t *testing.T) {
	r := New("b", nil, nil)
	r.Start(wire.PhasePlan, "")
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		_ = r.Run(ctx, func(context.Context, []wire.Event) error { return fmt.Errorf("%w: 400", ErrRefused) })
	})
	if err := r.Flush(ctx); err != nil {
		t.Error(err)
	}
	cancel()
	wg.Wait()
	if !strings.Contains(string(r.LogText()), "server refused 1 events") {
		t.Errorf("log: %s", r.LogText())
	}
}

func TestFlushEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New("b", nil, nil)
		r.Log("x")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := r.Flush(ctx); err == nil || !strings.Contains(err.Error(), "1 events not accepted") {
			t.Errorf("Flush: %v", err)
		}
	})
}

func TestConsole(t *testing.T) {
	var tty, serial bytes.Buffer
	c := NewConsole(Screen{W: &tty, Redraw: true}, Screen{W: &serial})
	now := time.Now()
	for i := range 12 {
		c.Show(wire.Event{Phase: wire.PhaseFetch, State: wire.Progress, Time: now.Add(time.Duration(i) * time.Second),
			Fetch: &wire.Transfer{Total: 12e6, Done: int64(i) * 1e6, Rate: 1e6, Peers: 3}})
	}
	c.Show(wire.Event{Phase: wire.PhaseFetch, State: wire.Failed, Took: 12.34, Text: "piece 3: \x1b[31mbad"})
	c.Close(time.Minute)
	if got := strings.Count(tty.String(), "\n"); got != 1 {
		t.Errorf("tty has %d lines, want progress in one place:\n%q", got, tty.String())
	}
	if got := strings.Count(serial.String(), "\n"); got != 4 {
		t.Errorf("serial has %d lines, want progress every 5 s:\n%s", got, serial.String())
	}
	for _, want := range []string{"fetch [#############...]  83% of 12.0 MB    1.0 MB/s 3 peers", "fetch: FAILED after 12.3 s: piece 3: ?[31mbad"} {
		if !strings.Contains(serial.String(), want) {
			t.Errorf("serial does not show %q:\n%s", want, serial.String())
		}
	}
}

// A progress line that wraps is drawn below the last one, again and again.
func TestProgressFitsTheScreen(t *testing.T) {
	for _, phase := range wire.Phases {
		line := Line(wire.Event{Phase: phase, State: wire.Progress, Fetch: &wire.Transfer{
			Total: 99_999_900_000, Done: 99_999_900_000, Rate: 1_234_500_000, Peers: 24,
		}})
		if len(line) > 79 {
			t.Errorf("%d columns, want 79 at the most: %s", len(line), line)
		}
	}
}

// stuck is a serial port with flow control and nobody there.
type stuck struct{ free chan struct{} }

func (s stuck) Write(b []byte) (int, error) { <-s.free; return len(b), io.ErrClosedPipe }

func TestAStuckConsoleHoldsNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		c := NewConsole(Screen{W: stuck{free}})
		for range 1000 {
			c.Print("line")
		}
		c.Close(time.Second)
		close(free)
		synctest.Wait()
	})
}

func TestLogger(t *testing.T) {
	r := New("b", nil, nil)
	r.Logger().With("node", "n1").WithGroup("g").Warn("odd", "disk", "/dev/sda", "err", errors.New("it broke"))
	if got := r.queue[0].Text; got != `warn: odd node=n1 g.disk=/dev/sda g.err="it broke"` {
		t.Errorf("log line %q", got)
	}
}
