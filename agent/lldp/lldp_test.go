package lldp

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A hub is an ear in virtual time, with two cards.
type hub struct {
	frames chan []byte // the first byte is the card's
	joins  atomic.Int32
	close  sync.Once
	closed chan struct{}
}

func (h *hub) join(map[int]net.Interface) (map[int]net.Interface, error) {
	h.joins.Add(1)
	cards := map[int]net.Interface{}
	for i := range 2 {
		cards[i] = net.Interface{Index: i, Name: fmt.Sprintf("eth%d", i), HardwareAddr: net.HardwareAddr{0x52, 0x54, 0, 0, 0, byte(i)}}
	}
	return cards, nil
}

func (h *hub) receive(frame []byte, until time.Time) (n, card int, err error) {
	select {
	case f := <-h.frames:
		return copy(frame, f[1:]), int(f[0]), nil
	case <-time.After(time.Until(until)):
		return 0, 0, os.ErrDeadlineExceeded
	case <-h.closed:
		return 0, 0, os.ErrClosed
	}
}

func (h *hub) Close() error {
	h.close.Do(func() { close(h.closed) })
	return nil
}

// says has a switch speak to a card.
func (h *hub) says(card byte, name string) {
	h.frames <- slices.Concat([]byte{card}, frame(chassis, port, ttl, tlv(5, name), end))
	synctest.Wait()
}

// Whoever sends frames as fast as can be gets a hello every ten seconds out of a
// machine, and as many lines in its log.
func TestManyFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		hub := &hub{frames: make(chan []byte), closed: make(chan struct{})}
		var log bytes.Buffer
		l := newListener(hub, slog.New(slog.NewTextHandler(&log, nil)))
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- l.Run(ctx) }()
		within := func(d time.Duration) bool {
			select {
			case <-l.News:
				return true
			case <-time.After(d):
				return false
			}
		}
		news := func() bool {
			synctest.Wait()
			select {
			case <-l.News:
				return true
			default:
				return false
			}
		}

		var told []time.Duration
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for i := range 25_000 {
			hub.says(0, fmt.Sprintf("leaf%d", i%2))
			hub.frames <- fmt.Appendf([]byte{0}, "frame %d of nobody", i)
			if news() {
				told = append(told, time.Since(start))
			}
			<-tick.C
		}
		if want := []time.Duration{0, 10 * time.Second, 20 * time.Second}; !slices.Equal(told, want) {
			t.Errorf("told %d times, at %v at first, want %v", len(told), told[:min(len(told), 4)], want)
		}
		if n := hub.joins.Load(); n > 26 {
			t.Errorf("it looks for cards %d times in 25 s, want once a second", n)
		}
		if n := strings.Count(log.String(), "\n"); n != len(told) {
			t.Errorf("%d lines in the log, want %d:\n%.1000s", n, len(told), &log)
		}

		hub.says(1, "leaf08")
		if !news() {
			t.Error("the other card is not told of at once")
		}
		again := within(pause)
		if at := l.Neighbor("52:54:00:00:00:00"); !again || at == nil || at.Switch != "leaf1" {
			t.Errorf("after the pause it is told of %v, want leaf1, which was the last", at)
		}
		time.Sleep(pause - look)
		hub.says(0, "leaf1")
		hub.says(1, "leaf08")
		if within(10 * pause) {
			t.Error("it tells what is no news")
		}
		hub.says(0, "leaf9")
		if !news() {
			t.Error("what comes long after the last news is not told at once")
		}
		// A hello may have taken leaf10 along, for other reasons.
		hub.says(0, "leaf10")
		hub.says(0, "leaf9")
		hub.says(0, "leaf9")
		if !within(pause + look) {
			t.Error("leaf9 is not told again")
		}
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}
