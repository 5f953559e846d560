package main

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"rookery/lab"
)

func TestParseRacks(t *testing.T) {
	for _, tt := range []struct {
		args []string
		only []string
		err  string
	}{
		{args: nil},
		{args: []string{"-only", "rookery,libtorrent"}, only: []string{"rookery", "libtorrent"}},
		{args: []string{"-only", "scp"}, err: `"scp" is not one of rookery rookery-unknown libtorrent`},
		{args: []string{"8"}, err: `"8"`},
	} {
		c, err := parseRacks(tt.args)
		switch {
		case tt.err != "":
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: %v, want %q", tt.args, err, tt.err)
			}
		case err != nil || len(c.only) != len(tt.only) || len(tt.only) > 0 && !reflect.DeepEqual(c.only, tt.only):
			t.Errorf("%q: %+v, %v", tt.args, c, err)
		}
	}
}

func TestRackReport(t *testing.T) {
	b := &bout{system: systems[0], load: load{n: 4, mbit: 8}, in: 2, data: lab.Dataset{Size: 1_000_000}}
	if b.ideal() != 4*time.Second || b.rack(1) != 0 || b.rack(2) != 1 {
		t.Errorf("ideal %s, nodes in racks %d and %d", b.ideal(), b.rack(1), b.rack(2))
	}
	row := b.rackReport("rookery", &result{
		took:   []time.Duration{5 * time.Second, 4 * time.Second, 6 * time.Second, 5 * time.Second},
		egress: 2_000_000, into: []int64{1_100_000, 1_400_000}, outOf: []int64{0, 500_000},
	})
	if row.T != 1.5 || row.First != 1 || row.Median != 1.25 || row.CopiesMax != 1.4 || row.Egress != 2 || row.Uplink != 2 || row.Nodes != 2 ||
		!reflect.DeepEqual(row.Copies, []float64{1.1, 1.4}) || !reflect.DeepEqual(row.CopiesOut, []float64{0, 0.5}) {
		t.Errorf("%+v", row)
	}
	report := &racksReport{Rows: []rackRow{{Transport: "libtorrent", CopiesMax: 3, T: 3}, {Transport: "rookery", CopiesMax: mostCopies, T: mostTime}}}
	if err := report.verdict(); err != nil {
		t.Errorf("what is asked is reached: %v", err)
	}
	for _, missed := range []rackRow{{Transport: "rookery", CopiesMax: 1.31, T: 1}, {Transport: "rookery", CopiesMax: 1, T: 1.21}} {
		report.Rows[1] = missed
		if err := report.verdict(); err != errMissed {
			t.Errorf("%+v: %v, want %v", missed, err, errMissed)
		}
	}
}
