package install

import (
	"context"
	"fmt"
	"sync"

	"rookery/image"
	"rookery/transport"
)

// extract gives x every frame whose pieces are complete, in whatever order
// they come, to workers of them at a time.
func extract(ctx context.Context, pieces *transport.Pieces, index *image.Index, x *image.Extractor, workers int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ready := make(chan int, len(index.Frames))
	var pool sync.WaitGroup
	for range workers {
		pool.Go(func() {
			defer func() { // as in a step: the machine has to end in a known state
				if p := recover(); p != nil {
					cancel(fmt.Errorf("panic: %v", p))
				}
			}()
			var buf []byte
			for n := range ready {
				if ctx.Err() != nil {
					return
				}
				frame := index.Frames[n]
				if int64(cap(buf)) < frame.Size {
					buf = make([]byte, frame.Size)
				}
				buf = buf[:frame.Size]
				_, err := pieces.ReadAt(buf, frame.Offset)
				if err == nil {
					err = x.Frame(0, n, buf)
				}
				if err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	waits := newWaits(index.Frames, pieces.Info())
	for piece := range pieces.Completed(ctx) {
		for _, n := range waits.arrived(piece) {
			ready <- n
		}
	}
	close(ready)
	pool.Wait()
	return context.Cause(ctx)
}

// waits says which frames a piece completes.
type waits struct {
	missing []int   // pieces, by frame
	frames  [][]int // frames that touch a piece, by piece
}

func newWaits(frames []image.Frame, info transport.Info) *waits {
	w := &waits{missing: make([]int, len(frames)), frames: make([][]int, len(info.Hashes))}
	for n, f := range frames {
		first, last := f.Offset/info.PieceLength, (f.Offset+f.Size-1)/info.PieceLength
		// A frame beyond the layer waits for what never comes; the index was
		// signed so, and Finish names the frame.
		w.missing[n] = int(last - first + 1)
		for p := first; p <= last && p < int64(len(w.frames)); p++ {
			w.frames[p] = append(w.frames[p], n)
		}
	}
	return w
}

// arrived takes note of a piece and returns the frames it was the last for.
func (w *waits) arrived(piece int) (ready []int) {
	for _, n := range w.frames[piece] {
		if w.missing[n]--; w.missing[n] == 0 {
			ready = append(ready, n)
		}
	}
	return ready
}
