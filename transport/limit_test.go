package transport_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rookery/transport"
)

func TestLimiter(t *testing.T) {
	const rate, users, seconds = 1 << 20, 4, 10
	synctest.Test(t, func(t *testing.T) {
		l := transport.NewLimiter(rate)
		ctx, cancel := context.WithTimeout(t.Context(), seconds*time.Second)
		defer cancel()
		var got [users]int
		var all sync.WaitGroup
		for i := range got {
			all.Go(func() {
				for l.Wait(ctx, 16<<10) == nil {
					got[i] += 16 << 10
				}
			})
		}
		all.Wait()
		sum := 0
		for i, n := range got {
			sum += n
			if share := rate * seconds / users; n < share*95/100 || n > share*105/100 {
				t.Errorf("user %d got %d bytes, want about %d", i, n, share)
			}
		}
		if most := rate*seconds + 64<<10; sum > most || sum < rate*seconds*98/100 {
			t.Errorf("%d bytes passed in %d s at %d a second", sum, seconds, rate)
		}

		time.Sleep(time.Hour) // a pause saves up no more than the burst
		begin := time.Now()
		for range 8 {
			if err := l.Wait(t.Context(), 16<<10); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(begin); took != time.Second/16 {
			t.Errorf("128 KiB after a pause took %s, want that of 64 KiB", took)
		}
	})
}

// Whoever goes away while waiting costs the others nothing.
func TestLimiterGivesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := transport.NewLimiter(64 << 10)
		begin := time.Now()
		if err := l.Wait(t.Context(), 64<<10); err != nil || time.Since(begin) > 0 {
			t.Errorf("the first 64 KiB took %s, %v", time.Since(begin), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		if err := l.Wait(ctx, 10<<20); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wait: %v, want %v", err, context.DeadlineExceeded)
		}
		if err := l.Wait(t.Context(), 64<<10); err != nil || time.Since(begin) != time.Second {
			t.Errorf("the next 64 KiB came after %s, %v; want 1s", time.Since(begin), err)
		}
	})
}

func TestNoLimit(t *testing.T) {
	l := transport.NewLimiter(0)
	if l != nil {
		t.Fatal("a limit of 0 is one")
	}
	if err := l.Wait(t.Context(), 1<<40); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, l := range []*transport.Limiter{nil, transport.NewLimiter(1)} {
		if err := l.Wait(ctx, 1<<20); !errors.Is(err, context.Canceled) {
			t.Errorf("Wait: %v, want %v", err, context.Canceled)
		}
	}
}
