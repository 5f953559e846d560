package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"rookery/lab"
	"rookery/server/fleet"
	"rookery/wire"
)

// A screen shows how far the nodes are: on a terminal one line per node that
// moves on, else a line whenever a node enters a phase and of all sometimes.
type screen struct {
	out   io.Writer
	width func() int // of the terminal; nil when it is none
	drawn int        // lines of the table that stand on the terminal
	last  map[string]string
}

func (s *screen) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

// follow shows the nodes until ctx ends, and then once more.
func (s *screen) follow(ctx context.Context, server *lab.Server, nodes []*node) {
	every, all := 250*time.Millisecond, 40
	if s.width != nil {
		all = 1
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 0; ; n++ {
		views, _ := server.Watch()
		rows := make([]row, len(nodes))
		for i, n := range nodes {
			rows[i] = rowOf(n, views)
		}
		s.draw(rows, n%all == 0 || ctx.Err() != nil)
		if ctx.Err() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (s *screen) draw(rows []row, all bool) {
	if s.width != nil {
		if s.drawn > 0 {
			fmt.Fprintf(s.out, "\x1b[%dA", s.drawn) // ECMA-48 CUU: back to the first line
		}
		for _, r := range rows {
			fmt.Fprintf(s.out, "\r%.*s\x1b[K\n", s.width()-1, r)
		}
		s.drawn = len(rows)
		return
	}
	if s.last == nil {
		s.last = map[string]string{}
	}
	for _, r := range rows {
		if all && r.stage != stepDone || s.last[r.name] != r.stage {
			fmt.Fprintln(s.out, r)
		}
		s.last[r.name] = r.stage
	}
}

// A row is what is shown of one node.
type row struct {
	name, firmware string
	stage          string
	since          time.Duration
	text           string
	fetch          *wire.Transfer // while it fetches
}

// rowOf joins what the demo and what the server know of n.
func rowOf(n *node, views []fleet.View) row {
	step, since := n.now()
	r := row{name: n.name, firmware: string(n.firmware), stage: step, since: since}
	if step != stepInstall {
		return r
	}
	for _, v := range views {
		if v.Name != n.name || len(v.Phases) == 0 {
			continue
		}
		r.stage, r.text = string(v.Phase), v.Text
		r.since = time.Since(v.Phases[len(v.Phases)-1].Started)
		if v.Phase == wire.PhaseFetch || v.Phase == wire.PhaseLinger {
			r.fetch = v.Fetch
		}
	}
	return r
}

func (r row) String() string {
	line := fmt.Sprintf("%-4s %-4s %-10s %4.0f s", r.name, r.firmware, r.stage, r.since.Seconds())
	switch f := r.fetch; {
	case f != nil && f.Total > 0:
		line += fmt.Sprintf("  %s %3.0f %%  %5.1f MB/s  %d peers", bar(f.Done, f.Total), 100*float64(f.Done)/float64(f.Total), float64(f.Rate)/1e6, f.Peers)
	case r.text != "":
		line += "  " + strings.Join(strings.Fields(r.text), " ")
	}
	return line
}

// bar is twenty columns of done of total.
func bar(done, total int64) string {
	const columns = 20
	n := int(columns * min(done, total) / total)
	return "[" + strings.Repeat("#", n) + strings.Repeat("-", columns-n) + "]"
}
