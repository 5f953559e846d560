package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"rookery/lab"
)

// The racks of bench racks: the uplink of each has a part of the rate of the nodes'
// and the server's links.
const (
	rackCount  = 4
	rackNodes  = 8
	rackMbit   = 24
	uplinkPart = 4
)

// What is asked of Rookery when it knows of the racks.
const (
	mostCopies = 1.3 // by each uplink
	mostTime   = 1.2 // over what the uplinks allow
)

// A rackRow is one bout in out/bench/racks.json. Times are over the ideal time, in
// which each uplink carries the file once.
type rackRow struct {
	Transport string    `json:"transport"`
	Racks     int       `json:"racks"`
	Nodes     int       `json:"nodes_per_rack"`
	CopiesMax float64   `json:"uplink_copies_max"` // bytes that came into a rack / bytes of the file
	Copies    []float64 `json:"uplink_copies"`
	CopiesOut []float64 `json:"uplink_copies_out"` // that went out of it
	T         float64   `json:"t_over_ideal"`
	First     float64   `json:"first"`
	Median    float64   `json:"median"`
	Egress    float64   `json:"egress"` // bytes the server sent / bytes of the file
	CPU       float64   `json:"cpu_s_per_gib"`
	Bytes     int64     `json:"bytes"`
	Mbit      int       `json:"rate_mbit"`
	Uplink    int       `json:"uplink_mbit"`
	Ideal     float64   `json:"ideal_s"`
	At        string    `json:"at"`
}

// racksReport is out/bench/racks.json.
type racksReport struct {
	Machine string    `json:"machine"`
	Rows    []rackRow `json:"rows"`
}

// racksConfig is the flags of bench racks.
type racksConfig struct {
	only []string
	add  bool
	mib  int
	bin  string
	out  string
}

// rackSystems are those that are measured. All but one have the server's records say
// where the nodes stand.
var rackSystems = []struct {
	name, system string
	known        bool
}{
	{"rookery", "rookery", true},
	{"rookery-unknown", "rookery", false},
	{"libtorrent", "libtorrent", true},
}

func parseRacks(args []string) (c racksConfig, err error) {
	var all []string
	for _, s := range rackSystems {
		all = append(all, s.name)
	}
	flags := flag.NewFlagSet("bench racks", flag.ContinueOnError)
	only := flags.String("only", "", "systems, all when empty: "+strings.Join(all, " "))
	flags.BoolVar(&c.add, "add", false, "keep what earlier runs left in -o, but for what is measured again")
	flags.IntVar(&c.mib, "mib", 24, "size of the image in `MiB`")
	flags.StringVar(&c.bin, "bin", "out", "where make build has put its programs, in bin/")
	flags.StringVar(&c.out, "o", "out/bench", "directory of the results")
	if err := flags.Parse(args); err != nil {
		return c, err
	}
	if flags.NArg() > 0 {
		return c, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	c.only = strings.FieldsFunc(*only, separator)
	for _, name := range c.only {
		if !slices.Contains(all, name) {
			return c, fmt.Errorf("-only: %q is not one of %s", name, strings.Join(all, " "))
		}
	}
	return c, nil
}

// runRacks measures what the uplinks of racks carry until all nodes are done.
func runRacks(ctx context.Context, n *lab.Network, c racksConfig) error {
	for _, dir := range []*string{&c.out, &c.bin} {
		var err error
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(c.out, "log"), 0o755); err != nil {
		return err
	}
	file := filepath.Join(c.out, "racks.json")
	report := &racksReport{Rows: []rackRow{}}
	if c.add {
		if err := readJSON(file, report); err != nil {
			return err
		}
	}
	report.Machine = machine(c.out)
	if err := report.write(file); err != nil { // what was there is not taken for what now fails
		return err
	}
	work, clean, err := workplace()
	if err != nil {
		return err
	}
	defer clean()
	data, err := lab.NewDataset(ctx, lab.In(c.bin), filepath.Join(work, "load"), int64(c.mib)<<20)
	if err != nil {
		return fmt.Errorf("image of %d MiB: %w", c.mib, err)
	}
	var failed []string
	for _, s := range rackSystems {
		if len(c.only) > 0 && !slices.Contains(c.only, s.name) {
			continue
		}
		system := systems[slices.IndexFunc(systems, func(other system) bool { return other.name == s.system })]
		if err := system.missing(); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %s: left out: %v\n", s.name, err)
			continue
		}
		b := &bout{
			system: system, load: load{n: rackCount * rackNodes, mbit: rackMbit, mib: c.mib}, in: rackCount, data: *data,
			dir: filepath.Join(work, "bout"), logs: filepath.Join(c.out, "log", s.name+"-racks"),
		}
		report.Rows = slices.DeleteFunc(report.Rows, func(r rackRow) bool { return r.Transport == s.name })
		err := b.declare(ctx, s.known)
		var r *result
		if err == nil {
			r, err = b.run(ctx, n)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "bench: %s: %v\n", s.name, err)
			failed = append(failed, s.name)
			continue
		}
		row := b.rackReport(s.name, r)
		report.Rows = append(report.Rows, row)
		fmt.Fprintln(os.Stderr, "bench:", row)
		if err := report.write(file); err != nil {
			return err
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("no figures of %s", strings.Join(failed, "; "))
	}
	return report.verdict()
}

// declare has the server's records say what nodes there are and, when the racks are
// to be known, where they stand.
func (b *bout) declare(ctx context.Context, known bool) error {
	var records strings.Builder
	for i := range b.n {
		fmt.Fprintf(&records, "---\nkind: Node\nname: %s\nmacs: [\"52:54:00:07:01:%02x\"]\naddress: %s/24\nboot: local\n", nodeName(i), i, nodeAddress(i))
		if known {
			fmt.Fprintf(&records, "rack: r%d\n", b.rack(i)+1)
		}
	}
	file := filepath.Join(b.data.State, "nodes.yaml")
	if err := os.WriteFile(file, []byte(records.String()), 0o644); err != nil {
		return err
	}
	_, err := (&lab.Server{Program: b.data.Programs.Rookery, State: b.data.State}).Run(ctx, "apply", "-f", file)
	return err
}

// rackReport makes ratios of what was seen.
func (b *bout) rackReport(name string, r *result) rackRow {
	took := slices.Sorted(slices.Values(r.took))
	over := func(d time.Duration) float64 { return digits(ratio(d, b.ideal())) }
	copies := func(bytes []int64) (all []float64) {
		for _, n := range bytes {
			all = append(all, digits(float64(n)/float64(b.data.Size)))
		}
		return all
	}
	row := rackRow{
		Transport: name, Racks: b.in, Nodes: b.n / b.in, Copies: copies(r.into), CopiesOut: copies(r.outOf),
		T: over(took[b.n-1]), First: over(took[0]), Median: over(median(took)),
		Egress: digits(float64(r.egress) / float64(b.data.Size)),
		CPU:    digits(r.cpu.Seconds() / (float64(b.data.Size) * float64(b.n) / (1 << 30))),
		Bytes:  b.data.Size, Mbit: b.mbit, Uplink: b.mbit / uplinkPart, Ideal: digits(b.ideal().Seconds()),
		At: time.Now().UTC().Format(time.RFC3339),
	}
	row.CopiesMax = slices.Max(row.Copies)
	return row
}

func (r rackRow) String() string {
	return fmt.Sprintf("%s, %d racks of %d, uplinks of %d Mbit/s, %.0f MiB: first %.3f, median %.3f, last %.3f of %.1f s; by an uplink at most %.3f copies; egress %.3f; %.1f CPU s/GiB",
		r.Transport, r.Racks, r.Nodes, r.Uplink, float64(r.Bytes)/(1<<20), r.First, r.Median, r.T, r.Ideal, r.CopiesMax, r.Egress, r.CPU)
}

// verdict says whether Rookery's figures are what is asked.
func (r *racksReport) verdict() error {
	var rows []row
	for _, got := range r.Rows {
		if got.Transport == "rookery" {
			rows = append(rows,
				row{what: "copies by an uplink", value: got.CopiesMax, op: atMost, asked: mostCopies},
				row{what: "time over what the uplinks allow", value: got.T, op: atMost, asked: mostTime})
		}
	}
	if len(rows) == 0 {
		return nil
	}
	line, ok := summary(rows)
	fmt.Fprintln(os.Stderr, line)
	if !ok {
		return errMissed
	}
	return nil
}

func (r *racksReport) write(file string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}
