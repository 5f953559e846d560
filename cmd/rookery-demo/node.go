package main

import (
	"sync"
	"time"

	"rookery/lab"
)

// Steps of a node that the demo itself waits for. While it installs, the
// agent's phases say more.
const (
	stepOff     = "off"
	stepNetboot = "netboot"
	stepInstall = "install"
	stepDone    = "done"
)

// A node is one machine on its way from power on to login.
type node struct {
	machine
	vm *lab.VM

	mu    sync.Mutex
	step  string // what is going on
	since time.Time
	took  []seconds // the steps before it
	found findings  // of the visit
}

// seconds is how long something took.
type seconds struct {
	Step    string  `json:"step"`
	Seconds float64 `json:"seconds"`
}

func (n *node) enter(step string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	n.took = append(n.took, seconds{n.step, now.Sub(n.since).Seconds()})
	n.step, n.since = step, now
}

// now is the step the node is in, and for how long.
func (n *node) now() (string, time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.step, time.Since(n.since)
}
