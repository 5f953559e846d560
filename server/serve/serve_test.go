package serve

import (
	"context"
	"errors"
	"log/slog"
	"testing"
)

func waits(ctx context.Context) error { <-ctx.Done(); return nil }

func TestAllStopsEverythingWhenOnePartFails(t *testing.T) {
	broken := errors.New("port is taken")
	stopped := false
	err := All(t.Context(), slog.New(slog.DiscardHandler),
		Part{"http", func(ctx context.Context) error { waits(ctx); stopped = true; return nil }},
		Part{"dhcp", func(context.Context) error { return broken }},
	)
	if !errors.Is(err, broken) || err.Error() != "dhcp: port is taken" {
		t.Errorf("All: %v, want dhcp: %v", err, broken)
	}
	if !stopped {
		t.Error("All returned before the other part had stopped")
	}
}

func TestAllReturnsNilWhenTheContextEnds(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := All(ctx, slog.New(slog.DiscardHandler), Part{"a", waits}, Part{"b", waits}); err != nil {
		t.Errorf("All: %v, want nil", err)
	}
}

func TestAllDoesNotLoseAPartThatEndsQuietly(t *testing.T) {
	err := All(t.Context(), slog.New(slog.DiscardHandler),
		Part{"a", waits}, Part{"b", func(context.Context) error { return nil }})
	if err == nil || err.Error() != "b: ended by itself" {
		t.Errorf("All: %v, want b: ended by itself", err)
	}
}
