package carousel

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"rookery/transport"
	"rookery/wire"
)

func TestDecide(t *testing.T) {
	c := &Carousel{MinClients: 3, Wait: 10 * time.Second}
	const s = time.Second
	for _, tt := range []struct {
		name string
		state
		want act
	}{
		{"one, just now", state{clients: 1, since: s}, stay},
		{"one, for as long as it has to wait", state{clients: 1, since: 10 * s}, start},
		{"enough, and more are coming", state{clients: 3, enough: true, since: s, lately: 1}, stay},
		{"many, and some are coming", state{clients: 40, enough: true, since: s, lately: 4}, stay},
		{"many, and hardly any are coming", state{clients: 41, enough: true, since: s, lately: 4}, start},
		{"enough", state{clients: 3, enough: true, since: s}, start},
		{"enough, of whom some have gone", state{clients: 1, enough: true, since: s}, start},
		{"enough, who have all gone", state{enough: true, since: s}, forget},
		{"enough, and it runs", state{clients: 3, enough: true, since: s, running: true}, stay},
		{"one is left", state{clients: 1, since: 100 * s, running: true}, stay},
		{"none is left", state{since: 100 * s, running: true}, stop},
		{"none is left of those who waited", state{since: s}, forget},
		{"always", state{always: true}, start},
		{"always, and it runs", state{always: true, running: true}, stay},
	} {
		if got := c.decide(tt.state); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
}

// What is sent in a moment does not wait longer for those who may come yet.
func TestSettle(t *testing.T) {
	c := &Carousel{Rate: 10 << 20}
	for _, tt := range []struct {
		size, rate int64
		want       time.Duration
	}{
		{1 << 30, 0, maxSettle},
		{1 << 20, 0, 100 * time.Millisecond},
		{1 << 20, 4 << 20, 250 * time.Millisecond},
		{1 << 20, 40 << 20, 100 * time.Millisecond},
		{1 << 40, 1, maxSettle},
	} {
		if got := c.settle(tt.size, tt.rate); got != tt.want {
			t.Errorf("%d bytes at %d: %s, want %s", tt.size, tt.rate, got, tt.want)
		}
	}
}

// Nodes that a switch keeps the datagrams from need the seeder, whatever they asked for.
func TestRepairs(t *testing.T) {
	for _, tt := range []struct {
		name          string
		nodes, served int
		runs          time.Duration
		want          bool
	}{
		{"nobody", 0, 0, 0, false},
		{"few", 3, 3, time.Minute, false},
		{"some, who have said nothing yet", 4, 0, hearFor / 2, true},
		{"some who hear it", 4, 4, time.Minute, true},
		{"many who hear nothing", 50, 0, hearFor, false},
		{"some hear it, and many do not", 50, 4, time.Minute, false},
		{"half of them hear it", 50, 25, time.Minute, true},
	} {
		if got := repairs(tt.nodes, tt.served, tt.runs); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestHear(t *testing.T) {
	layer := wire.DigestOf(nil)
	c := &Carousel{MinClients: 2, Wait: time.Hour, Rate: 10, Log: slog.New(slog.DiscardHandler),
		Layers: func(d wire.Digest) (Layer, bool) { return Layer{Info: transport.Info{Length: 5}}, d == layer }}
	for _, tt := range []struct {
		want wire.Want
		size int64
		err  string
	}{
		{want: wire.Want{Client: "a", Layer: layer}},
		{want: wire.Want{Client: "a", Layer: layer}},
		{want: wire.Want{Client: "b", Layer: layer}, size: 5},
		{want: wire.Want{Client: "c", Layer: layer, Rate: 1 << 20}},       // of another group
		{want: wire.Want{Client: "a", Layer: layer, Done: true}, size: 5}, // b was told that it is about to be sent
		{want: wire.Want{Client: "b", Layer: layer}, size: 5},
		{want: wire.Want{Client: "b", Layer: layer, Done: true}},
		{want: wire.Want{Client: "a", Layer: layer}},
		{want: wire.Want{Client: "d", Layer: wire.DigestOf([]byte("x"))}, err: "no such layer"},
		{want: wire.Want{Client: "d", Layer: layer, Lacks: []byte{255}}, err: "lacks: 1 blocks, the layer has 0 pieces"},
	} {
		size, err := c.Hear(tt.want)
		if size != tt.size || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%+v: %d, %v, want %d, %q", tt.want, size, err, tt.size, tt.err)
		}
	}
	for rate := int64(2 << 20); ; rate++ { // strangers start only so many
		if _, err := c.Hear(wire.Want{Client: "e", Layer: layer, Rate: rate}); err != nil {
			if len(c.jobs) != maxJobs {
				t.Errorf("%d jobs: %v", len(c.jobs), err)
			}
			break
		}
	}
}

// A sender that cannot send does not end the server, and is tried again. When nobody
// wants the layer any more it is forgotten.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		layer := wire.DigestOf(nil)
		var calls atomic.Int64
		asked := make(chan struct{}, 100)
		c := &Carousel{MinClients: 1, Wait: time.Minute, Rate: 1 << 20, Group: "239.192.0.0/16", Log: slog.New(slog.DiscardHandler),
			Quiet: func(wire.Digest, bool) {},
			Layers: func(wire.Digest) (Layer, bool) {
				asked <- struct{}{}
				return Layer{}, calls.Add(1) == 1 // withdrawn after it was asked for
			}}
		ended := make(chan error, 1)
		ctx, stop := context.WithCancel(t.Context())
		defer func() { stop(); synctest.Wait() }()
		go func() { ended <- c.Run(ctx) }()
		if _, err := c.Hear(wire.Want{Client: "a", Layer: layer}); err != nil {
			t.Fatal(err)
		}
		late := time.After(maxSettle + 2*retryAfter)
		for n := range 3 { // once for the word, and twice to send
			select {
			case <-asked:
			case <-late:
				t.Fatalf("tried %d times, want 2 at least", n-1)
			}
		}
		time.Sleep(time.Minute)
		c.mu.Lock()
		defer c.mu.Unlock()
		if len(c.jobs) != 0 {
			t.Errorf("%d jobs that nobody wants", len(c.jobs))
		}
		select {
		case err := <-ended:
			t.Error(errors.Join(errors.New("it ended"), err))
		default:
		}
	})
}
