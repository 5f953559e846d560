// Package serve runs the services of a server together: when one fails, all
// stop.
package serve

import (
	"context"
	"fmt"
	"log/slog"
)

// A Part is one service. Run blocks until ctx ends, then returns nil; an
// earlier return ends the whole server.
type Part struct {
	Name string
	Run  func(ctx context.Context) error
}

// All runs parts until ctx ends or one of them returns, then stops the others
// and waits for them. Its error is that of the part which ended first.
func All(ctx context.Context, log *slog.Logger, parts ...Part) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error)
	for _, p := range parts {
		go func() {
			err := p.Run(ctx)
			switch {
			case err != nil:
				err = fmt.Errorf("%s: %w", p.Name, err)
			case ctx.Err() == nil:
				err = fmt.Errorf("%s: ended by itself", p.Name)
			}
			ended <- err
		}()
	}
	var first error
	for range parts {
		err := <-ended
		switch {
		case err == nil:
		case first == nil:
			first = err
		default:
			log.Error("service ended badly while stopping", "err", err)
		}
		stop()
	}
	return first
}
