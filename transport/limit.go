package transport

import (
	"context"
	"sync"
	"time"
)

// burst is what passes a Limiter at once after a pause, in bytes.
const burst = 64 << 10

// A Limiter bounds a rate, shared by all who wait for it, who pass in the order
// they came. Whoever takes small portions in turn gets a fair share. nil is no
// limit.
type Limiter struct {
	rate float64 // bytes a second

	mu   sync.Mutex
	paid time.Time // what has passed is paid for by then
}

// NewLimiter is a limit of rate bytes a second, or nil when rate is 0.
func NewLimiter(rate int64) *Limiter {
	if rate <= 0 {
		return nil
	}
	return &Limiter{rate: float64(rate)}
}

// Wait returns when n more bytes may pass, or with the error of ctx.
func (l *Limiter) Wait(ctx context.Context, n int) error {
	if l == nil {
		return ctx.Err()
	}
	l.mu.Lock()
	now := time.Now()
	if earliest := now.Add(-l.time(burst)); l.paid.Before(earliest) {
		l.paid = earliest
	}
	l.paid = l.paid.Add(l.time(n))
	wait := l.paid.Sub(now)
	l.mu.Unlock()
	if wait <= 0 {
		return ctx.Err()
	}
	err := pause(ctx, wait)
	if err != nil { // they do not pass: not at the cost of those who come
		l.mu.Lock()
		l.paid = l.paid.Add(-l.time(n))
		l.mu.Unlock()
	}
	return err
}

// time is how long n bytes take.
func (l *Limiter) time(n int) time.Duration {
	return time.Duration(float64(n) / l.rate * float64(time.Second))
}
