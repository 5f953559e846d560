package transport

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// A Step is one source of a Policy.
type Step struct {
	Name string // for people
	Source
	From []Origin // what it brings
}

// A Policy is a Source that begins with the first of several. When no new bytes
// arrive, or the latest one fails, the next one joins, and all go on together.
// It is let go when those before it bring pieces again, so that a swarm which
// recovers is not left for the server. The zero durations are good defaults.
type Policy struct {
	Steps    []Step
	Stall    time.Duration     // without a new byte: the next source joins (0: 20 s)
	Patience time.Duration     // without a new byte from any of them: give up (0: 10 min)
	Switched func(text string) // told of every change and why; may be nil
}

func (y *Policy) String() string { return names(y.Steps) }

func names(steps []Step) string {
	var all []string
	for _, s := range steps {
		all = append(all, s.Name)
	}
	return strings.Join(all, ", ")
}

// maxRest bounds how long a source that fails is left alone.
const maxRest = 8 * time.Second

// A run is one of the sources at work.
type run struct {
	ctx    context.Context // nil: it is not at work
	stop   context.CancelFunc
	failed error // why it is not
	said   error // when it failed last
	next   time.Time
	rest   time.Duration // before next
	before int64         // what it had brought when it began
}

// Fetch ends with nil, with ctx, with ErrStorage, or with what every source
// said last once Patience is over.
func (y *Policy) Fetch(ctx context.Context, p *Pieces) error {
	type end struct {
		step int
		err  error
	}
	runs, ended := make([]run, len(y.Steps)), make(chan end, len(y.Steps))
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	c := newCourse(len(y.Steps), orDefault(y.Stall, 20*time.Second), orDefault(y.Patience, 10*time.Minute), time.Now())
	tick := time.NewTicker(c.stall / 20)
	defer tick.Stop()
	for {
		now, joined := y.look(p, runs), c.joined
		switch c = c.next(now); {
		case c.over:
			return y.despair(p, runs, c.patience)
		case c.joined > joined:
			y.tell("%s joins %s: %v", y.Steps[joined].Name, names(y.Steps[:joined]), c.why)
		case c.joined < joined:
			y.tell("%s leaves %s: new pieces come without it", y.Steps[c.joined].Name, names(y.Steps[:c.joined]))
		}
		for i := range runs {
			r := &runs[i]
			switch {
			case i >= c.joined && r.ctx != nil:
				r.stop()
			case i < c.joined && r.ctx == nil && !now.now.Before(r.next):
				r.ctx, r.stop = context.WithCancel(ctx)
				r.failed, r.before = nil, now.brought[i]
				running.Go(func() { ended <- end{i, y.Steps[i].Fetch(r.ctx, p)} })
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		case e := <-ended:
			r, name := &runs[e.step], y.Steps[e.step].Name
			left := r.ctx.Err() != nil
			r.stop()
			r.ctx = nil
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case e.err == nil:
				return nil
			case errors.Is(e.err, ErrStorage):
				return fmt.Errorf("%s: %w", name, e.err)
			case left:
			default:
				news := r.fails(e.err, p.broughtBy(y.Steps[e.step]) > r.before)
				if news && (e.step < c.joined-1 || c.joined == c.of) { // else it is why the next one joins
					y.tell("%s: %v", name, e.err)
				}
			}
		}
	}
}

// fails has the source rest, the longer the more often it failed: one that
// fails at once, as of a server being restarted, would spin. It says whether
// that is news, as it is after any work.
func (r *run) fails(err error, worked bool) (news bool) {
	if news = worked || r.said == nil; news {
		r.rest = time.Second / 2
	}
	r.rest = min(2*r.rest, maxRest)
	r.failed, r.said, r.next = err, err, time.Now().Add(r.rest)
	return news
}

func (y *Policy) look(p *Pieces, runs []run) sight {
	s := sight{now: time.Now(), arrived: p.Arrived(), idle: p.Idle()}
	for i := range runs {
		s.brought = append(s.brought, p.broughtBy(y.Steps[i]))
		s.failed = append(s.failed, runs[i].failed)
	}
	return s
}

// despair is what every source said last.
func (y *Policy) despair(p *Pieces, runs []run, patience time.Duration) error {
	var errs []error
	for i, r := range runs {
		if r.said == nil {
			r.said = fmt.Errorf("%w for %s", ErrStalled, patience)
		}
		errs = append(errs, fmt.Errorf("%s: %w", y.Steps[i].Name, r.said))
	}
	return fmt.Errorf("%d of %d pieces missing: %w", p.Missing(), p.wantedN(), errors.Join(errs...))
}

func (y *Policy) tell(format string, args ...any) {
	if y.Switched != nil {
		y.Switched(fmt.Sprintf(format, args...))
	}
}

func (p *Pieces) broughtBy(s Step) (n int64) {
	for _, from := range s.From {
		n += p.Brought(from)
	}
	return n
}

// A sight is what a Policy sees when it looks.
type sight struct {
	now     time.Time
	arrived int64   // changes with every byte
	idle    bool    // nothing can arrive, and nobody is to blame
	brought []int64 // verified bytes, by source
	failed  []error // by source; nil: it runs, or has not joined
}

// A course is which of the sources take part, and what that depends on.
type course struct {
	stall, patience time.Duration

	of, joined int   // the first joined ones take part
	why        error // the last one joined
	over       bool  // nothing comes from any of them

	arrived int64
	alive   time.Time     // when it last changed
	quiet   time.Time     // alive, or when the sources changed
	since   time.Time     // the last one joined
	stays   time.Duration // before it is let go
	limit   time.Duration // of quiet
	earlier int64         // what the sources before the last have brought
	works   time.Time     // when that last changed
}

func newCourse(of int, stall, patience time.Duration, now time.Time) course {
	return course{
		stall: stall, patience: patience, of: of, joined: min(1, of), limit: stall, stays: stall,
		alive: now, quiet: now, since: now, works: now,
	}
}

// next is the course after s was seen.
func (c course) next(s sight) course {
	if s.arrived != c.arrived || s.idle {
		c.arrived, c.alive, c.quiet = s.arrived, s.now, s.now
	}
	var earlier int64
	for _, n := range s.brought[:max(0, c.joined-1)] {
		earlier += n
	}
	if earlier > c.earlier {
		c.works = s.now
	}
	c.earlier = earlier
	change := func(joined int, why error) course {
		c.joined, c.why, c.quiet, c.since = joined, why, s.now, s.now
		c.earlier = 0
		for _, n := range s.brought[:joined-1] {
			c.earlier += n
		}
		return c
	}
	switch {
	case c.of == 0, c.joined == c.of && s.now.Sub(c.alive) >= c.patience:
		c.over = true
		return c
	case c.joined < c.of && s.failed[c.joined-1] != nil:
		return change(c.joined+1, s.failed[c.joined-1])
	case c.joined < c.of && s.now.Sub(c.quiet) >= c.limit:
		return change(c.joined+1, fmt.Errorf("%w for %s", ErrStalled, c.limit))
	case c.joined > 1 && s.now.Sub(c.since) >= c.stays && s.now == c.works:
		// Without it they may soon have nothing more to give: then it is
		// missed earlier, and stays for longer.
		c.limit, c.stays = c.stall/4, 2*c.stays
		return change(c.joined-1, nil)
	}
	return c
}

func orDefault(d, otherwise time.Duration) time.Duration {
	if d == 0 {
		return otherwise
	}
	return d
}
