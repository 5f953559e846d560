package install

import (
	"context"
	"fmt"
	"sync"

	"rookery/image"
	"rookery/image/oci"
	"rookery/transport"
)

// A layer is one layer of the image on its way in.
type layer struct {
	oci.Layer
	at      []int // its places in the stack, mostly one
	pieces  *transport.Pieces
	spool   *spool
	sources []transport.Source // by turn
	swarm   Swarm              // nil: none
	needs   []need
}

// A need is a frame that the image needs of a layer.
type need struct {
	at, n int // of the layer at that place in the stack
	image.Frame
}

// want asks for what the view needs of the layer, and for nothing else.
func (l *layer) want(view *image.View) {
	ranges := []transport.Range{{Offset: l.IndexOffset, Size: l.IndexSize}}
	for _, at := range l.at {
		frames, needed := view.Layers[at].Frames, view.Needed(at)
		for _, n := range needed {
			l.needs = append(l.needs, need{at, n, frames[n]})
			ranges = append(ranges, transport.Range{Offset: frames[n].Offset, Size: frames[n].Size})
		}
		if len(needed) == len(frames) { // the seek table is little more, and makes a seed for everyone
			ranges = append(ranges, transport.Range{Offset: 0, Size: l.Size})
		}
	}
	l.pieces.Want(ranges...)
}

// extract gives x every frame whose pieces are complete, of all layers in
// whatever order they come, to workers of them at a time.
func extract(ctx context.Context, layers []*layer, x *image.Extractor, workers int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type job struct {
		pieces *transport.Pieces
		need
	}
	jobs := 0
	for _, l := range layers {
		jobs += len(l.needs)
	}
	ready := make(chan job, jobs)
	var pool sync.WaitGroup
	for range workers {
		pool.Go(func() {
			defer func() { // as in a step: the machine has to end in a known state
				if p := recover(); p != nil {
					cancel(fmt.Errorf("panic: %v", p))
				}
			}()
			var buf []byte
			for j := range ready {
				if ctx.Err() != nil {
					return
				}
				if int64(cap(buf)) < j.Size {
					buf = make([]byte, j.Size)
				}
				buf = buf[:j.Size]
				_, err := j.pieces.ReadAt(buf, j.Offset)
				if err != nil {
					err = fmt.Errorf("layer %d: frame %d: %w", j.at, j.n, err)
				} else {
					err = x.Frame(j.at, j.n, buf)
				}
				if err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	var arrivals sync.WaitGroup
	for _, l := range layers {
		arrivals.Go(func() {
			waits := newWaits(l.needs, l.pieces.Info())
			for piece := range l.pieces.Completed(ctx) {
				for _, n := range waits.arrived(piece) {
					ready <- job{l.pieces, l.needs[n]}
				}
			}
		})
	}
	arrivals.Wait()
	close(ready)
	pool.Wait()
	return context.Cause(ctx)
}

// waits says which needs a piece completes.
type waits struct {
	missing []int   // pieces, by need
	needs   [][]int // that touch a piece, by piece
}

func newWaits(needs []need, info transport.Info) *waits {
	w := &waits{missing: make([]int, len(needs)), needs: make([][]int, len(info.Hashes))}
	for i, f := range needs {
		first, last := f.Offset/info.PieceLength, (f.Offset+f.Size-1)/info.PieceLength
		// A frame beyond the layer waits for what never comes; the index was
		// signed so, and Finish names the frame.
		w.missing[i] = int(last - first + 1)
		for p := first; p <= last && p < int64(len(w.needs)); p++ {
			w.needs[p] = append(w.needs[p], i)
		}
	}
	return w
}

// arrived takes note of a piece and returns the needs it was the last for.
func (w *waits) arrived(piece int) (ready []int) {
	for _, i := range w.needs[piece] {
		if w.missing[i]--; w.missing[i] == 0 {
			ready = append(ready, i)
		}
	}
	return ready
}
