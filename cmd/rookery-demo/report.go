package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"rookery/disklayout"
	"rookery/lab"
	"rookery/server/fleet"
	"rookery/wire"
)

// A report is what is left of a demo.
type report struct {
	Seconds  float64      `json:"seconds"` // from the first step of the site to the last check
	Image    string       `json:"image"`
	Accel    string       `json:"accel"`    // how the machines ran: kvm, tcg
	Slowness float64      `json:"slowness"` // by how much deadlines were longer
	Nodes    []nodeReport `json:"nodes"`
}

type nodeReport struct {
	Name       string              `json:"name"`
	MAC        string              `json:"mac"`
	Firmware   disklayout.Firmware `json:"firmware"`
	Phases     []seconds           `json:"phases"` // of the agent, as it measured them
	Steps      []seconds           `json:"steps"`  // of the machine, as the demo saw them
	Bytes      int64               `json:"bytes"`  // of the image
	FromServer int64               `json:"fromServer"`
	FromPeers  int64               `json:"fromPeers"`
	Uploaded   int64               `json:"uploaded"`
	Found      findings            `json:"found,omitempty"` // by ssh
	Error      *fleet.Failure      `json:"error,omitempty"`
}

func newReport(nodes []*node, views []fleet.View, took time.Duration) *report {
	r := &report{Seconds: took.Seconds(), Image: imageName, Accel: lab.Accel(), Slowness: lab.Slowness()}
	for _, n := range nodes {
		nr := nodeReport{Name: n.name, MAC: n.mac, Firmware: n.firmware, Steps: n.took, Found: n.found}
		for _, v := range views {
			if v.Name != n.name {
				continue
			}
			nr.Error = v.Error
			for _, p := range v.Phases {
				nr.Phases = append(nr.Phases, seconds{string(p.Phase), p.Seconds})
			}
			if f := v.Fetch; f != nil {
				nr.Bytes, nr.FromServer, nr.FromPeers, nr.Uploaded = f.Total, f.FromServer, f.FromPeers, f.Uploaded
			}
		}
		r.Nodes = append(r.Nodes, nr)
	}
	return r
}

func (r *report) save(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// shown are the columns of seconds: the agent's phases, and around them what a
// watcher in front of the machine sees.
var shown = []string{
	stepNetboot, string(wire.PhaseBoot), string(wire.PhaseNetwork), string(wire.PhaseHello), string(wire.PhaseScript), string(wire.PhasePlan),
	string(wire.PhasePartition), string(wire.PhaseFetch), string(wire.PhaseFixup), string(wire.PhaseLoader),
	string(wire.PhaseLinger), string(wire.PhaseEnd), "restart", "login",
}

// table is the report for people: seconds per phase, then bytes.
func (r *report) table() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "node\tfirmware\t%s\tfrom server\tfrom peers\t\n", strings.Join(shown, "\t"))
	for _, n := range r.Nodes {
		fmt.Fprintf(w, "%s\t%s\t", n.Name, n.Firmware)
		all := slices.Concat(n.Steps, n.Phases)
		for _, name := range shown {
			cell := "-"
			if i := slices.IndexFunc(all, func(s seconds) bool { return s.Step == name }); i >= 0 {
				cell = fmt.Sprintf("%.1f", all[i].Seconds)
			}
			fmt.Fprintf(w, "%s\t", cell)
		}
		fmt.Fprintf(w, "%.1f MB\t%.1f MB\t\n", float64(n.FromServer)/1e6, float64(n.FromPeers)/1e6)
	}
	w.Flush()
	return b.String()
}
