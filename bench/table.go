package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// A row is one figure and what is asked of it.
type row struct {
	what   string
	value  float64
	unit   string // "" for a ratio
	op     string // atLeast, atMost, or "": nothing is asked
	asked  float64
	detail string // of what it was made
}

const (
	atLeast = ">="
	atMost  = "<="
)

func (r row) number(v float64) string {
	if r.unit == "files" {
		return fmt.Sprintf("%.0f files", v)
	}
	return strings.TrimSpace(fmt.Sprintf("%.3f %s", v, r.unit))
}

func (r row) bound() string {
	if r.op == "" {
		return ""
	}
	return r.op + " " + r.number(r.asked)
}

func (r row) missed() bool {
	switch r.op {
	case atLeast:
		return r.value < r.asked
	case atMost:
		return r.value > r.asked
	}
	return false
}

func (r row) verdict() string {
	switch {
	case r.op == "":
		return ""
	case r.missed():
		return "**MISSED**"
	}
	return "ok"
}

func writeTable(w io.Writer, rows []row) {
	fmt.Fprintf(w, "| what | measured | asked | | of |\n|---|---|---|---|---|\n")
	for _, r := range rows {
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", r.what, r.number(r.value), r.bound(), r.verdict(), r.detail)
	}
}

// summary is the last line of a run.
func summary(rows []row) (line string, ok bool) {
	asked := 0
	var missed []string
	for _, r := range rows {
		if r.op != "" {
			asked++
		}
		if r.missed() {
			missed = append(missed, r.what)
		}
	}
	if len(missed) > 0 {
		return fmt.Sprintf("bench: MISSED %d of %d: %s", len(missed), asked, strings.Join(missed, "; ")), false
	}
	return fmt.Sprintf("bench: all %d ok", asked), true
}

// median is the middle one, of an even number the mean of the middle two.
func median(times []time.Duration) time.Duration {
	if len(times) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(times))
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}
