package tree

import (
	"context"
	"fmt"
	"runtime"
	"sync"

	"rookery/image"
)

// Verify lists in what the files below dir, without x, differ from v: contents,
// which are all read, and whatever else a version says of a file.
func Verify(ctx context.Context, v *image.View, dir string, x Excludes) ([]Change, error) {
	t, err := FromDir(dir, x)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	if err := t.hash(ctx); err != nil {
		return nil, err
	}
	changes, _ := Diff(v, &image.View{Entries: t.Entries})
	return changes, nil
}

// hash reads all contents for their hashes.
func (t *Tree) hash(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	jobs := make(chan *image.Entry)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for e := range jobs {
				var err error
				if e.SHA256, err = hash(ctx, t, *e); err != nil {
					cancel(fmt.Errorf("%q: %w", e.Path, err))
					return
				}
			}
		})
	}
	for i := range t.Entries {
		if t.Entries[i].Size == 0 {
			continue
		}
		select {
		case jobs <- &t.Entries[i]:
		case <-ctx.Done():
		}
	}
	close(jobs)
	workers.Wait()
	return context.Cause(ctx)
}
