package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"rookery/lab"
)

func TestParseSwarm(t *testing.T) {
	for _, tt := range []struct {
		args   []string
		counts []int
		only   []string
		err    string
	}{
		{args: nil, counts: []int{1, 2, 4, 8, 16, 32, 50}},
		{args: []string{"-n", "8,50", "-only", "rookery aria2"}, counts: []int{8, 50}, only: []string{"rookery", "aria2"}},
		{args: []string{"-n", ""}, counts: nil},
		{args: []string{"-n", "51"}, err: "51 nodes: want 1 to 50"},
		{args: []string{"-n", "0"}, err: "0 nodes"},
		{args: []string{"-n", "8 1", "-slow"}, err: "1 node"},
		{args: []string{"-n", "many"}, err: "many"},
		{args: []string{"-only", "scp"}, err: `"scp" is not one of rookery rookery-multicast rookery-hybrid rookery-rsync http rsync udpcast udpcast-tuned aria2 libtorrent raw-rookery`},
		{args: []string{"8"}, err: `"8"`},
	} {
		c, err := parseSwarm(tt.args)
		switch {
		case tt.err != "":
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: %v, want %q", tt.args, err, tt.err)
			}
		case err != nil || !reflect.DeepEqual(c.counts, tt.counts) || len(c.only) != len(tt.only):
			t.Errorf("%q: %+v, %v", tt.args, c, err)
		}
	}
}

// Two processors carry what all nodes receive, and the start is nothing.
func TestLoads(t *testing.T) {
	for n := 1; n <= 50; n++ {
		l, err := loadFor(n)
		b := bout{load: l, data: lab.Dataset{Size: int64(l.mib) << 20}}
		if sum := float64(n*l.mbit) / 8; err != nil || l.n != n || sum > 45 || b.ideal() < 25*time.Second || b.ideal() > 2*time.Minute {
			t.Errorf("%d nodes: %+v, %v: %.0f MB/s for %s", n, l, err, sum, b.ideal())
		}
	}
}

func someBout(slow bool) (*bout, *result) {
	b := &bout{system: systems[0], load: load{n: 4, mbit: 8}, slow: slow, data: lab.Dataset{Size: 1 << 20}}
	return b, &result{
		took:   []time.Duration{1300 * time.Millisecond, 1100 * time.Millisecond, 1200 * time.Millisecond, 5 * time.Second},
		egress: 1 << 20, sent: 3 << 20, cpu: 40 * time.Millisecond, server: 10 * time.Millisecond,
		received: [][]int64{{0, 0, 0, 0}, {500_000, 0, 0, 1}, {1_000_000, 250_000, 0, 2}},
	}
}

func TestReport(t *testing.T) {
	b, r := someBout(true)
	const ideal = 1.048576
	row, c := b.report(r)
	want := swarmRow{
		Transport: "rookery-slow", N: 4, TOverIdeal: 5 / ideal, Egress: 1, CPU: 10.24, First: 1.1 / ideal, Median: 1.25 / ideal, Last: 5 / ideal,
		Spread: 5/ideal - 1.1/ideal, Others: 1.3 / ideal, Sent: 0.75, CPUSeeder: 2.56, CPUPeer: 7.68, Bytes: 1 << 20, Mbit: 8, MTU: 9000, Ideal: ideal, At: row.At,
	}
	near := func(got, want swarmRow) bool { // but for the last digits
		a, b := reflect.ValueOf(got), reflect.ValueOf(want)
		for i := range a.NumField() {
			if a.Field(i).Kind() == reflect.Float64 {
				if d := a.Field(i).Float() - b.Field(i).Float(); d > 2e-4 || d < -2e-4 {
					return false
				}
			} else if !a.Field(i).Equal(b.Field(i)) {
				return false
			}
		}
		return true
	}
	if !near(row, want) {
		t.Errorf("got  %+v\nwant %+v", row, want)
	}
	if want := [][]float64{{0, 8, 8}, {0, 0, 4}, {0, 0, 0}, {0, 0, 0}}; !reflect.DeepEqual(c.Rates, want) {
		t.Errorf("rates %v, want %v", c.Rates, want)
	}
	if !strings.HasSuffix(row.String(), "; without the slow one last 1.240") {
		t.Error(row)
	}

	b.system.raw, b.slow, r.began = true, false, 300*time.Millisecond
	raw := b.rawReport(r)
	if raw.Speed < 1.04 || raw.Speed > 1.05 || raw.Last != 0 || !strings.HasPrefix(raw.String(), "rookery: 1 MB/s, CPU s/GiB 2.56 + 7.68 = 10.24") {
		t.Errorf("raw: %+v: %s", raw, raw)
	}
}

func TestReportIsWritten(t *testing.T) {
	dir := t.TempDir()
	b, r := someBout(false)
	report := &swarmReport{Machine: "here"}
	for _, name := range []string{"rookery", "udpcast", "rookery"} { // the last in the place of the first
		b.system.name = name
		row, c := b.report(r)
		report.drop(name, b.n)
		report.add(row, &c)
	}
	report.add(swarmRow{Transport: "raw-rookery", N: 1, Speed: 300, CPU: 3}, nil)
	if err := errors.Join(report.write(dir), report.figures(dir)); err != nil {
		t.Fatal(err)
	}

	again := &swarmReport{}
	if err := again.read(filepath.Join(dir, "swarm.json")); err != nil || !reflect.DeepEqual(again, report) || len(again.Rows) != 3 || len(again.Curves) != 2 {
		t.Errorf("%v, read %+v, wrote %+v", err, again, report)
	}
	if err := again.read(filepath.Join(dir, "none.json")); err != nil {
		t.Errorf("no earlier report: %v", err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "swarm.json"))
	if err != nil {
		t.Fatal(err)
	}
	var document struct{ Rows []map[string]any }
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"transport", "n", "t_over_ideal", "egress", "cpu_s_per_gib", "first", "median", "last"} {
		if _, ok := document.Rows[0][key]; !ok {
			t.Errorf("no key %s in %v", key, document.Rows[0])
		}
	}
	if _, ok := document.Rows[2]["t_over_ideal"]; ok {
		t.Errorf("a raw row says what was not measured: %v", document.Rows[2])
	}
	for i := range reflect.TypeFor[swarmRow]().NumField() {
		name, _, _ := strings.Cut(reflect.TypeFor[swarmRow]().Field(i).Tag.Get("json"), ",")
		if len(columns) <= i || columns[i] != name {
			t.Errorf("column %d is not %s: %v", i, name, columns)
		}
	}

	f, err := os.Open(filepath.Join(dir, "swarm.csv"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines, err := csv.NewReader(f).ReadAll()
	if err != nil || len(lines) != 4 || lines[1][0] != "udpcast" || lines[1][1] != "4" || lines[3][2] != "" {
		t.Errorf("csv: %v, %v", lines, err)
	}
	for _, name := range []string{"time", "rates", "bandwidth"} {
		f, err := os.Open(filepath.Join(dir, name+".png"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := png.Decode(f); err != nil {
			t.Errorf("%s.png: %v", name, err)
		}
		if svg, err := os.ReadFile(filepath.Join(dir, name+".svg")); err != nil || !strings.Contains(string(svg), "</svg>") {
			t.Errorf("%s.svg: %v", name, err)
		}
	}
	alone := &swarmReport{Rows: []swarmRow{{Transport: "http", N: 1, TOverIdeal: 1}}, Curves: []curve{{"http", 1, 8, 0.5, [][]float64{nil}}}}
	if err := alone.figures(t.TempDir()); err != nil {
		t.Errorf("figures of one node that was done at once: %v", err)
	}
	if err := (&swarmReport{}).figures(dir); err != nil {
		t.Errorf("figures of nothing: %v", err)
	}
}

func TestSmooth(t *testing.T) {
	var y []float64
	for _, p := range smooth([]float64{0, 10, 0, 10, 0, 10}, 0.5) {
		y = append(y, p.Y)
	}
	if want := []float64{0, 10. / 3, 5, 4, 6, 5, 20. / 3}; !nearly(y, want) {
		t.Errorf("%v, want %v", y, want)
	}
	if got := sum([][]float64{{1, 2}, {10, 20, 30}}); !nearly(got, []float64{11, 22, 30}) {
		t.Errorf("sum %v", got)
	}
}

func nearly(a, b []float64) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if d := a[i] - b[i]; d > 1e-9 || d < -1e-9 {
			return false
		}
	}
	return true
}

func TestStatTime(t *testing.T) {
	const stat = "42 (a name) with) S 1 42 42 0 -1 4194560 100 200 0 0 11 22 33 44 20 0 1 0 100 1000"
	if got := statTime(stat); got != 1100*time.Millisecond {
		t.Errorf("%s, want 1.1s", got)
	}
	if got := statTime("42 (gone"); got != 0 {
		t.Errorf("cut off: %s", got)
	}
}

// here starts programs where the test is.
type here struct{}

func (here) Start(cmd *exec.Cmd) error { return cmd.Start() }

func TestProcess(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("too long"))
	defer cancel()
	for _, tt := range []struct {
		name string
		spec spec
		err  string
	}{
		{name: "ends well", spec: spec{args: []string{"true"}}},
		{name: "says it", spec: spec{args: []string{"sh", "-c", `printf "at 10 %%\\rdone\n"; exec sleep 100`}, said: regexp.MustCompile("^done$")}},
		{name: "waits itself", spec: spec{args: []string{"sh", "-c", `cat "$0"`, goArg}, code: []byte("script\n"), said: regexp.MustCompile("^script$")}},
		{name: "fails", spec: spec{args: []string{"sh", "-c", "echo no disk; exit 3"}}, err: "p: ended (exit status 3): no disk"},
		{name: "says nothing", spec: spec{args: []string{"true"}, said: regexp.MustCompile("done")}, err: "p: ended (exit status 0): "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.spec.name = "p"
			p, err := start(here{}, tt.spec, t.TempDir(), t.TempDir(), true)
			if err != nil {
				t.Fatal(err)
			}
			defer p.kill()
			gate, err := p.open(ctx)
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-p.marked:
				t.Fatal("did not wait")
			default:
			}
			if err := p.let(gate); err != nil {
				t.Fatal(err)
			}
			_, err = p.until(ctx, p.marked)
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || err.Error() != tt.err) {
				t.Errorf("%v, want %q", err, tt.err)
			}
		})
	}
}

func TestProcessUsesTime(t *testing.T) {
	p, err := start(here{}, spec{name: "p", args: []string{"sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo done; exec sleep 100"},
		said: regexp.MustCompile("done")}, t.TempDir(), t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	defer p.kill()
	if _, err := p.until(t.Context(), p.marked); err != nil {
		t.Fatal(err)
	}
	alive := p.cpu()
	p.kill()
	if dead := p.cpu(); alive < 20*time.Millisecond || dead < alive-10*time.Millisecond {
		t.Errorf("%s while it lives, %s afterwards", alive, dead)
	}
}

func TestSame(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, n int, last byte) string {
		b := make([]byte, n)
		if n > 0 {
			b[n-1] = last
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const mib = 1 << 20
	whole := write("whole", 3*mib, 1)
	for _, tt := range []struct {
		got string
		ok  bool
	}{
		{write("copy", 3*mib, 1), true},
		{write("other", 3*mib, 2), false},
		{write("short", 3*mib-1, 0), false},
		{write("a MiB less", 2*mib, 0), false},
		{write("long", 3*mib+1, 1), false},
		{write("empty", 0, 0), false},
		{filepath.Join(dir, "none"), false},
	} {
		if err := lab.Same(whole, tt.got); (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.got, err)
		}
	}
}

func TestSystems(t *testing.T) {
	if err := (system{needs: []string{"sh", "no-such-program"}}).missing(); err == nil || !strings.Contains(err.Error(), "no-such-program") || !strings.Contains(err.Error(), "make deps") {
		t.Error(err)
	}
	for _, s := range systems {
		b := &bout{system: s, load: load{n: 3, mbit: 8}, dir: "/bout", data: lab.Dataset{
			File: "/layer/x", Torrent: []byte("d4:infod6:lengthi1eee"), Size: 1, Digest: "sha256:" + "12", Programs: lab.Made{Rookery: "/bin/rookery", Agent: "/bin/agent"},
		}}
		if s.raw {
			b.n = 1
		}
		if strings.HasPrefix(s.name, "rookery") {
			continue // signs scripts of a real image
		}
		c := s.cast(b)
		if len(c.nodes) != b.n || len(c.servers) == 0 && c.starter == nil {
			t.Errorf("%s: %+v", s.name, c)
		}
		if torrent, ok := c.files[torrentFile]; ok && torrent != "d8:announce"+torrentURL(b)+"4:infod6:lengthi1eee" {
			t.Errorf("%s: torrent %q", s.name, torrent)
		}
	}
}

func torrentURL(b *bout) string {
	if b.system.raw {
		return "28:http://127.0.0.1:80/announce"
	}
	return "27:http://10.7.0.2:80/announce"
}
