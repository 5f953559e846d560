package main

import (
	"cmp"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"rookery/lab"
)

// A load is how many nodes there are, and how much they fetch over what links.
type load struct {
	n    int
	mbit int // of every link, each direction
	mib  int // of the image
}

// loads have ideal times of half a minute or more, so that the start of fifty
// programs is nothing, and rates that two processors can carry for all nodes.
var loads = []load{{8, 40, 128}, {16, 16, 128}, {32, 6, 64}, {50, 4, 56}}

func loadFor(n int) (load, error) {
	for _, l := range loads {
		if n >= 1 && n <= l.n {
			l.n = n
			return l, nil
		}
	}
	return load{}, fmt.Errorf("%d nodes: want 1 to %d", n, loads[len(loads)-1].n)
}

// unicastTimes bounds how many times the ideal time a copy for each node takes:
// beyond, such systems get as much less to copy.
const unicastTimes = 3

// swarmRow is one bout in out/bench/swarm.json. Times are over the ideal time, in
// which one link carries the file; a raw one has speeds in their place.
type swarmRow struct {
	Transport  string  `json:"transport"`
	N          int     `json:"n"`
	TOverIdeal float64 `json:"t_over_ideal,omitempty"` // = last
	Egress     float64 `json:"egress,omitempty"`       // bytes the server sent / bytes of the file
	CPU        float64 `json:"cpu_s_per_gib"`          // of all programs, for a GiB that a node got
	First      float64 `json:"first,omitempty"`
	Median     float64 `json:"median,omitempty"`
	Last       float64 `json:"last,omitempty"`
	Spread     float64 `json:"spread,omitempty"`      // last - first
	Others     float64 `json:"others_last,omitempty"` // of the nodes without a slow link
	Sent       float64 `json:"client_sent,omitempty"` // bytes a node sent / bytes of the file, mean
	Speed      float64 `json:"mb_s,omitempty"`
	CPUSeeder  float64 `json:"cpu_s_per_gib_seeder"`
	CPUPeer    float64 `json:"cpu_s_per_gib_peer"`
	Bytes      int64   `json:"bytes"`
	Mbit       int     `json:"rate_mbit,omitempty"`
	MTU        int     `json:"mtu,omitempty"`
	Ideal      float64 `json:"ideal_s,omitempty"`
	At         string  `json:"at"`
}

// columns of swarm.csv are the keys of swarm.json.
var columns = []string{"transport", "n", "t_over_ideal", "egress", "cpu_s_per_gib", "first", "median", "last", "spread", "others_last",
	"client_sent", "mb_s", "cpu_s_per_gib_seeder", "cpu_s_per_gib_peer", "bytes", "rate_mbit", "mtu", "ideal_s", "at"}

// A curve is what the nodes of a bout received over time.
type curve struct {
	Transport string      `json:"transport"`
	N         int         `json:"n"`
	Mbit      int         `json:"rate_mbit"`
	Every     float64     `json:"every_s"`
	Rates     [][]float64 `json:"mbit"` // by node, at each sample
}

// swarmReport is out/bench/swarm.json.
type swarmReport struct {
	Machine string     `json:"machine"`
	Rows    []swarmRow `json:"rows"`
	Curves  []curve    `json:"curves"`
}

// swarmConfig is the flags of bench swarm.
type swarmConfig struct {
	counts []int
	only   []string
	slow   bool
	loss   float64
	add    bool
	mib    int
	tcp    string
	bin    string
	out    string
}

func parseSwarm(args []string) (c swarmConfig, err error) {
	flags := flag.NewFlagSet("bench swarm", flag.ContinueOnError)
	n := flags.String("n", "1 2 4 8 16 32 50", "numbers of nodes")
	only := flags.String("only", "", "systems, all when empty: "+strings.Join(names(), " "))
	flags.BoolVar(&c.slow, "slow", false, "one node's link has a fifth of the rate")
	flags.Float64Var(&c.loss, "loss", 0, "`PERCENT` of the packets that come to a node and are lost, by chance")
	flags.BoolVar(&c.add, "add", false, "keep what earlier runs left in -o, but for what is measured again")
	flags.IntVar(&c.mib, "mib", 0, "size of the image in `MiB`, in place of the one that fits the number of nodes")
	flags.StringVar(&c.tcp, "tcp", "", "congestion `CONTROL` of all connections, such as cubic, in place of this machine's")
	flags.StringVar(&c.bin, "bin", "out", "where make build has put its programs, in bin/")
	flags.StringVar(&c.out, "o", "out/bench", "directory of the results")
	if err := flags.Parse(args); err != nil {
		return c, err
	}
	if c.loss < 0 || c.loss > 90 {
		return c, fmt.Errorf("-loss: %v, want 0 to 90", c.loss)
	}
	if flags.NArg() > 0 {
		return c, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	for _, word := range strings.FieldsFunc(*n, separator) {
		count, err := strconv.Atoi(word)
		if err == nil {
			_, err = loadFor(count)
		}
		if err == nil && c.slow && count < 2 {
			err = errors.New("1 node: a slow one needs others beside it")
		}
		if err != nil {
			return c, fmt.Errorf("-n: %w", err)
		}
		c.counts = append(c.counts, count)
	}
	c.only = strings.FieldsFunc(*only, separator)
	for _, name := range c.only {
		if !slices.Contains(names(), name) {
			return c, fmt.Errorf("-only: %q is not one of %s", name, strings.Join(names(), " "))
		}
	}
	return c, nil
}

func separator(r rune) bool { return r == ' ' || r == ',' }

func names() (list []string) {
	for _, s := range systems {
		list = append(list, s.name)
	}
	return list
}

// runSwarm measures systems that bring one file to many nodes.
func runSwarm(ctx context.Context, n *lab.Network, c swarmConfig) error {
	var err error
	if c.out, err = filepath.Abs(c.out); err != nil {
		return err
	}
	if c.bin, err = filepath.Abs(c.bin); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(c.out, "log"), 0o755); err != nil {
		return err
	}
	report := &swarmReport{Rows: []swarmRow{}, Curves: []curve{}}
	file := filepath.Join(c.out, "swarm.json")
	if c.add {
		if err := report.read(file); err != nil {
			return err
		}
	}
	report.Machine = machine(c.out)
	if err := report.write(c.out); err != nil { // what was there is not taken for what now fails
		return err
	}

	work, clean, err := workplace()
	if err != nil {
		return err
	}
	defer clean()
	m := &measurement{swarmConfig: c, ctx: ctx, network: n, work: work, report: report}
	for _, count := range c.counts {
		l, err := loadFor(count)
		if err != nil {
			return err
		}
		if c.mib > 0 {
			l.mib = c.mib
		}
		if err := m.measure(l, false); err != nil {
			return err
		}
	}
	if !c.slow && c.loss == 0 {
		raw := load{n: 1, mib: rawMiB}
		if c.mib > 0 {
			raw.mib = c.mib
		}
		if err := m.measure(raw, true); err != nil {
			return err
		}
	}
	if err := report.figures(c.out); err != nil {
		return err
	}
	if len(m.failed) > 0 {
		return fmt.Errorf("no figures of %s", strings.Join(m.failed, "; "))
	}
	return nil
}

// workplace is a directory for the bouts, in memory: what is measured is the
// network. It is gone with the lab.
func workplace() (work string, clean func(), err error) {
	// The lab's processes have numbers of their own, and this /proc knows them.
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return "", nil, fmt.Errorf("mount /proc: %w", err)
	}
	if work, err = os.MkdirTemp("", "bench-swarm"); err != nil {
		return "", nil, err
	}
	if err := unix.Mount("tmpfs", work, "tmpfs", 0, ""); err != nil {
		os.Remove(work)
		return "", nil, fmt.Errorf("tmpfs: %w", err)
	}
	return work, func() {
		unix.Unmount(work, unix.MNT_DETACH)
		os.RemoveAll(work)
	}, nil
}

// rawMiB takes some seconds, and is sent rawRounds times.
const (
	rawMiB    = 2 << 10
	rawRounds = 3
)

// A measurement is one run of bench swarm.
type measurement struct {
	swarmConfig
	ctx     context.Context
	network *lab.Network
	work    string
	report  *swarmReport
	failed  []string
}

// measure has all systems that are wanted carry one load. What fails has no row.
func (m *measurement) measure(l load, raw bool) error {
	var wanted []system
	for _, s := range systems {
		if s.raw == raw && (len(m.only) == 0 || slices.Contains(m.only, s.name)) {
			wanted = append(wanted, s)
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	dir := filepath.Join(m.work, "load")
	data, err := lab.NewDataset(m.ctx, lab.In(m.bin), dir, int64(l.mib)<<20)
	if err != nil {
		return fmt.Errorf("image of %d MiB: %w", l.mib, err)
	}
	for _, s := range wanted {
		name := fmt.Sprintf("%s-%d", s.name, l.n)
		if err := s.missing(); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %s: left out: %v\n", name, err)
			continue
		}
		b := &bout{system: s, load: l, slow: m.slow, loss: m.loss, data: *data, tcp: m.tcp, dir: filepath.Join(dir, "bout"), logs: filepath.Join(m.out, "log", name)}
		m.report.drop(b.transport(), b.n)
		row, curve, err := m.one(b)
		if m.ctx.Err() != nil {
			return context.Cause(m.ctx)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "bench: %s: %v\n", name, err)
			m.failed = append(m.failed, name)
			continue
		}
		m.report.add(row, curve)
		fmt.Fprintln(os.Stderr, "bench:", row)
		if err := m.report.write(m.out); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// one carries out a bout, or of a raw one the rounds, of which the median counts.
func (m *measurement) one(b *bout) (swarmRow, *curve, error) {
	var err error
	switch size := b.data.Size * unicastTimes / int64(b.n); {
	case b.system.files && size < b.data.Size:
		dir := b.dir + "-image"
		defer os.RemoveAll(dir)
		var smaller *lab.Dataset
		if smaller, err = lab.NewDataset(m.ctx, b.data.Programs, dir, size); err == nil {
			b.data = *smaller
		}
	case b.system.unicast:
		b.data, err = b.data.Part(size)
	}
	rounds := 1
	if b.system.raw {
		rounds = rawRounds
	}
	var rows []swarmRow
	for err == nil && len(rows) < rounds {
		var r *result
		if r, err = b.run(m.ctx, m.network); err != nil {
			break
		}
		if !b.system.raw {
			row, curve := b.report(r)
			return row, &curve, nil
		}
		rows = append(rows, b.rawReport(r))
	}
	if err != nil {
		return swarmRow{}, nil, err
	}
	slices.SortFunc(rows, func(a, b swarmRow) int { return cmp.Compare(a.Speed, b.Speed) })
	return rows[len(rows)/2], nil, nil
}

func (r swarmRow) String() string {
	if r.Speed > 0 {
		return fmt.Sprintf("%s: %.0f MB/s, CPU s/GiB %.2f + %.2f = %.2f", r.Transport, r.Speed, r.CPUSeeder, r.CPUPeer, r.CPU)
	}
	s := fmt.Sprintf("%s, %d nodes, %d Mbit/s, %.0f MiB: first %.3f, median %.3f, last %.3f of %.1f s; egress %.3f; %.1f CPU s/GiB",
		r.Transport, r.N, r.Mbit, float64(r.Bytes)/(1<<20), r.First, r.Median, r.Last, r.Ideal, r.Egress, r.CPU)
	if r.Others > 0 {
		s += fmt.Sprintf("; without the slow one last %.3f", r.Others)
	}
	return s
}

// rawReport makes a speed of what was seen. The time until the peer has been told
// of the seeder is none of the engines'.
func (b *bout) rawReport(r *result) swarmRow {
	row := b.row(r)
	row.Speed = digits(float64(b.data.Size) / 1e6 / (r.took[0] - r.began).Seconds())
	return row
}

// row has what both kinds of rows have.
func (b *bout) row(r *result) swarmRow {
	gib := float64(b.data.Size) * float64(b.n) / (1 << 30)
	return swarmRow{
		Transport: b.transport(), N: b.n, Bytes: b.data.Size, At: time.Now().UTC().Format(time.RFC3339),
		CPU: digits(r.cpu.Seconds() / gib), CPUSeeder: digits(r.server.Seconds() / gib), CPUPeer: digits((r.cpu - r.server).Seconds() / gib),
	}
}

// report makes ratios of what was seen.
func (b *bout) report(r *result) (swarmRow, curve) {
	took := slices.Sorted(slices.Values(r.took))
	over := func(d time.Duration) float64 { return digits(ratio(d, b.ideal())) }
	row := b.row(r)
	row.First, row.Median, row.Last = over(took[0]), over(median(took)), over(took[b.n-1])
	row.Egress = digits(float64(r.egress) / float64(b.data.Size))
	row.Sent = digits(float64(r.sent) / float64(b.data.Size) / float64(b.n))
	row.Mbit, row.MTU, row.Ideal = b.mbit, mtu, digits(b.ideal().Seconds())
	row.TOverIdeal, row.Spread = row.Last, digits(row.Last-row.First)
	if b.slow {
		row.Others = over(slices.Max(r.took[:b.n-1]))
	}
	return row, curve{row.Transport, b.n, b.mbit, sampleEvery.Seconds(), rates(r.received, b.n)}
}

// Added to the name of a system in a bout with a slow node, or with losses.
const (
	slowSuffix = "-slow"
	lossSuffix = "-loss"
)

// transport is what the row is called.
func (b *bout) transport() string {
	name := b.system.name
	if b.loss > 0 {
		name += lossSuffix + strconv.FormatFloat(b.loss, 'f', -1, 64)
	}
	if b.slow {
		name += slowSuffix
	}
	return name
}

// rates are megabits a second, by node, from the bytes of all nodes at each sample.
func rates(samples [][]int64, nodes int) [][]float64 {
	list := make([][]float64, nodes)
	for i := range list {
		before := int64(0)
		for _, s := range samples {
			list[i] = append(list[i], digits(float64(s[i]-before)*8/1e6/sampleEvery.Seconds()))
			before = s[i]
		}
	}
	return list
}

// digits leaves those of a figure that mean something.
func digits(f float64) float64 { return math.Round(f*1e4) / 1e4 }

// add takes a bout in. A raw one has no curve.
func (r *swarmReport) add(row swarmRow, c *curve) {
	r.Rows = append(r.Rows, row)
	if c != nil {
		r.Curves = append(r.Curves, *c)
	}
}

// drop forgets a bout of an earlier run.
func (r *swarmReport) drop(transport string, n int) {
	r.Rows = slices.DeleteFunc(r.Rows, func(row swarmRow) bool { return row.Transport == transport && row.N == n })
	r.Curves = slices.DeleteFunc(r.Curves, func(c curve) bool { return c.Transport == transport && c.N == n })
}

func (r *swarmReport) read(file string) error { return readJSON(file, r) }

// readJSON reads a report that there may not be.
func readJSON(file string, into any) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

// write writes the tables into dir.
func (r *swarmReport) write(dir string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	var table strings.Builder
	if err := r.table(&table); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "swarm.json"), append(b, '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, "swarm.csv"), []byte(table.String()), 0o644))
}

// table writes the rows with the names that they have in JSON.
func (r *swarmReport) table(w io.Writer) error {
	out := csv.NewWriter(w)
	out.Write(columns)
	for _, row := range r.Rows {
		b, err := json.Marshal(row)
		if err != nil {
			return err
		}
		var values map[string]any
		d := json.NewDecoder(strings.NewReader(string(b)))
		d.UseNumber()
		if err := d.Decode(&values); err != nil {
			return err
		}
		line := make([]string, len(columns))
		for i, c := range columns {
			if v, ok := values[c]; ok {
				line[i] = fmt.Sprint(v)
			}
		}
		out.Write(line)
	}
	out.Flush()
	return out.Error()
}
