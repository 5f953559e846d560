package main

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"text/tabwriter"
	"time"

	"rookery/bench/sim"
)

// simReport is out/bench/sim.json.
type simReport struct {
	Rows []simRow `json:"rows"`
}

// A simRow is a scenario played with several seeds: the run in the middle by time.
type simRow struct {
	sim.Row
	Runs     int     `json:"runs"`
	Least    float64 `json:"t_least"` // of the runs
	Most     float64 `json:"t_most"`
	Measured float64 `json:"t_measured,omitempty"` // on real links, see measured
}

// A measuredRow is what bench swarm found on real links.
type measuredRow struct {
	load
	last, egress float64
}

// measured is what the simulation is held to, 2026-11-27.
var measured = []measuredRow{
	{load{1, 40, 128}, 1.008, 1.008},
	{load{2, 40, 128}, 1.019, 1.017},
	{load{4, 40, 128}, 1.025, 1.022},
	{load{8, 40, 128}, 1.040, 1.030},
	{load{16, 16, 128}, 1.060, 1.030},
	{load{32, 6, 64}, 1.101, 1.028},
	{load{50, 4, 56}, 1.114, 1.047},
}

// onLinks is what bench swarm does, on paper.
func onLinks(l load) sim.Scenario {
	return sim.Scenario{Name: "bench", N: l.n, Bytes: int64(l.mib) << 20, Piece: 32 << 10, Rate: float64(l.mbit) * 1e6 / 8, MTU: mtu, Window: 64 << 10, Queue: 400 * time.Millisecond}
}

// large is a site of 1 Gbit/s, the server's link as well, with an image of 2 GiB, in
// the pieces that package transport would make of it, and one switch. Of its packets
// many travel together, and four such parcels of a connection are under way: with
// fewer, each stops and waits for what says that one has come. Machines have fair
// queues.
func large(n int) sim.Scenario {
	return sim.Scenario{Name: "switch", N: n, Bytes: 2 << 30, Piece: 512 << 10, Rate: 125e6, MTU: 1500, Packet: 128 << 10, Window: 512 << 10, Fair: true}
}

// inRacks has racks of 40 nodes that share 10 Gbit/s each.
func inRacks(n int) sim.Scenario {
	c := large(n)
	c.Name, c.Rack, c.Uplink = "racks", 40, 1250e6
	return c
}

// withFaults has nodes that lose power, come late or have slow links.
func withFaults(n int) sim.Scenario {
	c := inRacks(n)
	c.Name, c.Die, c.Late, c.Slow = "racks, faults", 0.05, 0.10, 0.10
	return c
}

// A game is a scenario and how often it is played.
type game struct {
	sim.Scenario
	runs int
}

// games are what make sim plays.
func games() (all []game) {
	for _, n := range []int{1, 2, 4, 8, 16, 32, 50} {
		l, _ := loadFor(n) // all of them have one
		if i := slices.IndexFunc(measured, func(m measuredRow) bool { return m.n == n }); i >= 0 {
			l = measured[i].load
		}
		all = append(all, game{onLinks(l), 5})
	}
	for _, site := range []func(n int) sim.Scenario{large, inRacks, withFaults} {
		for _, n := range []int{100, 1000, 10_000} {
			all = append(all, game{site(n), 1})
		}
	}
	return all
}

func (g game) play() simRow {
	var rows []sim.Row
	for seed := range g.runs {
		g.Seed = uint64(seed)
		rows = append(rows, sim.Run(g.Scenario))
	}
	slices.SortFunc(rows, func(a, b sim.Row) int { return cmp.Compare(a.TOverIdeal, b.TOverIdeal) })
	r := simRow{Row: rows[len(rows)/2], Runs: g.runs, Least: rows[0].TOverIdeal, Most: rows[len(rows)-1].TOverIdeal}
	for _, m := range measured {
		if g.Name == "bench" && m.n == g.N {
			r.Measured = m.last
		}
	}
	return r
}

// simulate plays scenarios, as many at a time as there are processors.
func simulate(args []string) error {
	flags := flag.NewFlagSet("bench sim", flag.ContinueOnError)
	most := flags.Int("most", 10_000, "scenarios with more `nodes` are left out")
	only := flags.String("only", "", "`scenario`, all when empty: bench, switch, racks, or racks, faults")
	out := flags.String("o", "out/bench", "directory of the results")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	list := slices.DeleteFunc(games(), func(g game) bool { return g.N > *most || *only != "" && g.Name != *only })
	if len(list) == 0 {
		return fmt.Errorf("-most %d, -only %q: no scenario is left", *most, *only)
	}
	debug.SetGCPercent(400) // there is memory, and nearly nothing to collect
	rows := make([]simRow, len(list))
	var wg sync.WaitGroup
	turns := make(chan struct{}, runtime.GOMAXPROCS(0))
	for i, g := range slices.Backward(list) { // the long ones first
		turns <- struct{}{}
		wg.Go(func() {
			rows[i] = g.play()
			<-turns
		})
	}
	wg.Wait()
	writeSim(os.Stdout, rows)
	b, err := json.MarshalIndent(simReport{rows}, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(*out, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(*out, "sim.json"), append(b, '\n'), 0o644)
}

// writeSim writes the rows for people.
func writeSim(w io.Writer, rows []simRow) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer table.Flush()
	fmt.Fprintln(table, "scenario\tnodes\tfirst\tmedian\tlast\tof runs\tmeasured\tegress\tuplink copies\tlate\tslow\tdied")
	figure := func(f float64) string {
		if f == 0 {
			return ""
		}
		return fmt.Sprintf("%.3f", f)
	}
	for _, r := range rows {
		runs := ""
		if r.Runs > 1 {
			runs = fmt.Sprintf("%.3f to %.3f", r.Least, r.Most)
		}
		fmt.Fprintf(table, "%s\t%d\t%.3f\t%.3f\t%.3f\t%s\t%s\t%.3f\t%s\t%s\t%s\t%d\n", r.Scenario, r.N, r.First, r.Median, r.TOverIdeal,
			runs, figure(r.Measured), r.Egress, figure(r.UplinkCopies), figure(r.Late), figure(r.Slow), r.Died)
	}
}
