package multicast

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"rookery/transport"
)

const (
	batchFor   = 3 * time.Millisecond   // is sent at a time: queues in switches are short
	mixFor     = 100 * time.Millisecond // of blocks take turns: a burst of losses hits each of them a little
	mixMost    = 16 << 20               // bytes of these
	hearingFor = 600 * time.Millisecond // after a pass to hear what is lacked
	endsWith   = 8                      // datagrams that say that it ends: some get lost
)

// A Sender sends one layer to one group for as long as it runs.
type Sender struct {
	Info   transport.Info
	Layer  io.ReaderAt
	First  int64 // byte of the layer to begin with, such as the index
	Out    Outlet
	To     netip.AddrPort
	Rate   int64              // bytes a second on the wire, at the most
	Shared *transport.Limiter // beside Rate, of several Senders; may be nil
	Parity float64            // sent beyond the data where no node says what it loses
	Demand *Demand
	Always bool // all of it, again and again, whatever is known of who wants it
	Log    *slog.Logger
}

// Run sends until ctx ends, and returns nil then. It fails when it can read or
// send no more.
func (s *Sender) Run(ctx context.Context) error {
	out, err := s.Out.Open()
	if err != nil {
		return fmt.Errorf("send to %s: %w", s.To, err)
	}
	defer out.Close()
	l, err := newLayout(s.Info, shardFor(out.mtu, s.Info))
	if err != nil {
		return err
	}
	r := &round{Sender: s, layout: l, out: out, rate: s.Rate, own: transport.NewLimiter(s.Rate), sender: rand.Uint32(),
		cursor: make([]int, l.blocks()), sent: make([]time.Time, l.blocks())}
	first := l.of(int(s.First / s.Info.PieceLength))
	few := 0 // passes in a row that were over blocks of which little is lacked
	for ctx.Err() == nil {
		clients := s.Demand.fresh(time.Now())
		orders := pass(needs(clients, r.sent), first, s.Always, few >= maxFew)
		if len(orders) == 0 {
			wait(ctx, s.Demand.Changed(), time.Second)
			continue
		}
		if few++; orders[len(orders)-1].need > little {
			few = 0
		}
		r.pass++
		if err := r.send(ctx, orders); err != nil && ctx.Err() == nil {
			return fmt.Errorf("send to %s: %w", s.To, err)
		}
		s.hear(ctx, r.over)
	}
	return nil
}

// hear waits until every node has said what it lacks after a pass, or has had
// the time to.
func (s *Sender) hear(ctx context.Context, since time.Time) {
	for {
		changed := s.Demand.Changed()
		now, late := time.Now(), false
		for _, c := range s.Demand.fresh(now) {
			late = late || c.at.Before(since)
		}
		left := hearingFor - now.Sub(since)
		if !late || left <= 0 || ctx.Err() != nil {
			return
		}
		wait(ctx, changed, left)
	}
}

func wait(ctx context.Context, changed <-chan struct{}, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-changed:
	case <-timer.C:
	}
}

// A round is one Run.
type round struct {
	*Sender
	*layout
	out    *Out
	pace   pace
	rate   int64 // bytes a second: what pace says
	own    *transport.Limiter
	sender uint32
	seq    uint32
	pass   uint32
	cursor []int // row that a block is to go on with: those who lack some want others than before
	sent   []time.Time
	over   time.Time // what was sent last: who heard it may have spoken since
	batch  []byte
	waits  int // datagrams in batch
}

// send sends one pass, some blocks at a time in turns. The next ones are read and
// encoded meanwhile.
func (r *round) send(ctx context.Context, orders []order) (err error) {
	last := uint32(orders[len(orders)-1].block)
	ahead := r.prepare(&orders)
	for ahead != nil {
		g := <-ahead
		ahead = r.prepare(&orders)
		if err = g.err; err == nil {
			err = r.group(ctx, g, last)
		}
		if err != nil {
			break
		}
	}
	if ahead != nil {
		<-ahead
	}
	return errors.Join(err, r.flush(ctx))
}

// A group is blocks that take turns.
type group struct {
	orders []order
	tables [][][]byte // rows
	last   bool       // of the pass, or nearly
	ends   bool       // the pass
	err    error
}

// prepare begins to read the first of some orders, and takes them off; nil when there are none.
func (r *round) prepare(orders *[]order) <-chan group {
	if len(*orders) == 0 {
		return nil
	}
	r.adapt(time.Now())
	mix := int(min(float64(mixMost), float64(r.rate)*mixFor.Seconds()) / float64(r.size(0)))
	n := min(max(1, mix), len(*orders))
	g := group{orders: (*orders)[:n]}
	*orders = (*orders)[n:]
	g.ends = len(*orders) == 0
	g.last = float64(len(*orders)*r.size(0)) < float64(r.rate)*lastFor.Seconds()
	done := make(chan group, 1)
	go func() {
		for _, o := range g.orders {
			rows, err := r.read(o.block)
			g.tables, g.err = append(g.tables, rows), errors.Join(g.err, err)
		}
		done <- g
	}()
	return done
}

// adapt changes the rate to what is to be sent at by now.
func (r *round) adapt(now time.Time) {
	r.pace = r.pace.next(r.Rate, r.Demand.fresh(now), now)
	rate := r.Rate
	if r.pace.rate > 0 {
		rate = r.pace.rate
	}
	if rate != r.rate {
		r.Log.Info("multicast goes at another rate", "from", r.rate, "to", rate)
		r.rate, r.own = rate, transport.NewLimiter(rate)
	}
}

// group sends what is ordered of some blocks, a row of each in turn, data before
// parity.
func (r *round) group(ctx context.Context, g group, last uint32) error {
	orders, tables := g.orders, g.tables
	counts := make([]int, len(orders))
	for i, o := range orders {
		counts[i] = o.count(r.rows(o.block), 0)
	}
	h := header{sender: r.sender, pass: r.pass, last: last}
	copy(h.layer[:], r.info.InfoHash[:])
	sent := 0
	for k, enough := 0, false; ; k++ {
		if !enough && k+endsWith >= slices.Min(counts) { // what is lost is known as late as can be
			enough = true
			clients := r.Demand.fresh(time.Now())
			for i, o := range orders {
				rows := r.rows(o.block)
				counts[i] = min(o.count(rows, parity(clients, r.Parity, r.data(o.block, 0), g.last)), r.all(o.block))
			}
		}
		if k >= slices.Max(counts) {
			break
		}
		for i, o := range orders {
			if k >= counts[i] {
				continue
			}
			row := (r.cursor[o.block] + k) % r.all(o.block)
			h.block, h.row = uint32(o.block), uint16(row)
			if enough {
				left := sum(counts) - sent
				if g.ends && left <= endsWith {
					h.ends = uint16(left)
				}
				if left == 1 {
					r.over = time.Now()
				}
			}
			sent++
			if err := r.datagram(ctx, h, tables[i][row]); err != nil {
				return err
			}
		}
	}
	if err := r.flush(ctx); err != nil {
		return err
	}
	for i, o := range orders {
		r.cursor[o.block] = (r.cursor[o.block] + counts[i]) % r.all(o.block)
		r.sent[o.block] = r.over
	}
	return nil
}

func sum(counts []int) (all int) {
	for _, n := range counts {
		all += n
	}
	return all
}

// read is the rows of a block.
func (r *round) read(b int) ([][]byte, error) {
	all := make([]byte, r.all(b)*r.shard)
	if n, err := r.Layer.ReadAt(all[:r.size(b)], r.start(b)); n < r.size(b) {
		return nil, fmt.Errorf("read: %w", err)
	}
	rows := make([][]byte, r.all(b))
	for i := range rows {
		rows[i] = all[i*r.shard : (i+1)*r.shard]
	}
	return rows, r.encode(b, rows)
}

func (r *round) datagram(ctx context.Context, h header, shard []byte) error {
	h.seq = r.seq
	r.seq++
	r.batch = append(appendHeader(r.batch, h), shard...)
	r.waits++
	size := headerSize + r.shard
	if r.waits >= r.out.most(size) || float64(len(r.batch)+size) > float64(r.rate)*batchFor.Seconds() {
		return r.flush(ctx)
	}
	return nil
}

func (r *round) flush(ctx context.Context) error {
	if r.waits == 0 {
		return ctx.Err()
	}
	size := headerSize + r.shard
	n := r.waits * wireSize(r.To.Addr(), size)
	if err := r.Shared.Wait(ctx, n); err != nil {
		return err
	}
	if err := r.own.Wait(ctx, n); err != nil {
		return err
	}
	err := r.out.write(r.batch, size, r.To)
	r.batch, r.waits = r.batch[:0], 0
	return err
}
