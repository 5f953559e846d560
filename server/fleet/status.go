package fleet

import (
	"slices"
	"time"

	"rookery/wire"
)

// Status is where a node is in its installation. Its methods return a changed
// copy; what a Status points to is never written again.
type Status struct {
	Next wire.Do `json:"next"` // what its next start from the network does: install or local

	// ID is that of the installation which was last asked for; Image is what
	// it installs, since its script was first fetched, and Named the name that
	// was looked up for it.
	ID    string `json:"id"`
	Image Image  `json:"image"`
	Named string `json:"named,omitempty"`

	Boot   string `json:"boot,omitempty"`   // the latest start of the agent
	Script string `json:"script,omitempty"` // the installation whose script that start fetched
	Seq    int    `json:"seq,omitempty"`    // its latest event

	Phases []Phase        `json:"phases,omitempty"` // of that start, in the order they began
	Text   string         `json:"text,omitempty"`   // what it is doing
	Turns  []Turn         `json:"turns,omitempty"`  // the latest, oldest first
	Fetch  *wire.Transfer `json:"fetch,omitempty"`
	Error  *Failure       `json:"error,omitempty"` // the latest, until an installation succeeds

	Inventory *wire.Inventory   `json:"inventory,omitempty"`
	Before    map[string]string `json:"before,omitempty"` // the switches that its cards heard in the start before: see Rack
	Relay     string            `json:"relay,omitempty"`  // through which it reached the DHCP server: see Rack
	Boots     []Boot            `json:"boots,omitempty"`  // the latest, oldest first
	Seen      time.Time         `json:"seen,omitzero"`    // last heard of
	Installed time.Time         `json:"installed,omitzero"`
}

// A Phase is one step of an installation. Times are the server's.
type Phase struct {
	Phase   wire.Phase `json:"phase"`
	State   wire.State `json:"state"` // started, finished or failed
	Started time.Time  `json:"started"`
	Seconds float64    `json:"seconds"` // as the agent measured it, once it is over
}

// A Turn is how a phase went on from then on, and why.
type Turn struct {
	Phase wire.Phase `json:"phase"`
	Time  time.Time  `json:"time"`
	Text  string     `json:"text"`
}

// A Failure is why an installation did not go on.
type Failure struct {
	Step  wire.Phase `json:"step"`
	Cause string     `json:"cause"`
	Boot  string     `json:"boot"`
	Time  time.Time  `json:"time"`
}

// A Boot is one start of the agent on a node.
type Boot struct {
	ID   string    `json:"id"`
	Time time.Time `json:"time"`
}

// Bounds of what a node's status remembers.
const (
	maxBoots = 16 // starts of its agent
	maxTurns = 8
)

// request asks for a new installation, or that there be none.
func (s Status) request(do wire.Do, id string) Status {
	return Status{
		Next: do, ID: id,
		Boot: s.Boot, Seq: s.Seq, // a running agent goes on counting
		Inventory: s.Inventory, Before: s.Before, Relay: s.Relay, Boots: s.Boots, Seen: s.Seen, Installed: s.Installed,
	}
}

// hello is s after the machine said hello, which it may repeat.
func (s Status) hello(h wire.Hello, now time.Time) Status {
	before := s.Inventory
	s.Inventory, s.Seen = &h.Inventory, now
	if s.Boot == h.Boot {
		return s
	}
	s.Before = heard(before)
	s.Boot, s.Script, s.Seq = h.Boot, "", 0
	s.Phases, s.Text, s.Fetch, s.Turns = nil, "", nil, nil
	s.Boots = append(slices.Clone(s.Boots), Boot{h.Boot, now})
	s.Boots = s.Boots[max(0, len(s.Boots)-maxBoots):]
	return s
}

// started is when the latest start of the agent was.
func (s Status) started() time.Time {
	if len(s.Boots) == 0 {
		return time.Time{}
	}
	return s.Boots[len(s.Boots)-1].Time
}

// fetched is s after the running agent got the script.
func (s Status) fetched(named string, image Image) Status {
	s.Script, s.Named, s.Image = s.ID, named, image
	return s
}

// event is s after an event. It says false, and s is as it was, when the event
// is of another start of the agent or was seen already.
func (s Status) event(e wire.Event, now time.Time) (Status, bool) {
	if e.Boot != s.Boot || e.Seq <= s.Seq {
		return s, false
	}
	s.Seq, s.Seen = e.Seq, now
	switch e.State {
	case wire.Log:
		return s, true
	case wire.Switched:
		s.Turns = append(slices.Clone(s.Turns), Turn{e.Phase, now, e.Text})
		s.Turns = s.Turns[max(0, len(s.Turns)-maxTurns):]
		return s, true
	}
	if e.Fetch != nil {
		s.Fetch = e.Fetch
	}
	p := Phase{Phase: e.Phase, State: wire.Started, Started: now}
	i := slices.IndexFunc(s.Phases, func(p Phase) bool { return p.Phase == e.Phase })
	if i >= 0 && e.State != wire.Started {
		p.Started = s.Phases[i].Started
	}
	switch e.State {
	case wire.Started, wire.Progress:
		s.Text = e.Text
	case wire.Finished, wire.Failed:
		s.Text, p.State, p.Seconds = "", e.State, max(0, e.Took)
	}
	s.Phases = slices.Clone(s.Phases)
	if i >= 0 {
		s.Phases[i] = p
	} else {
		s.Phases = append(s.Phases, p)
	}
	switch {
	case e.State == wire.Failed:
		s.Error = &Failure{e.Phase, e.Text, e.Boot, now}
	case e.Phase == wire.PhaseEnd && e.State == wire.Finished && s.succeeded():
		s.Next, s.Error, s.Installed = wire.Local, nil, now
	}
	return s, true
}

// succeeded says whether the agent carried out the script of the installation
// that was last asked for. An agent that fails ends too, and one that was at
// work when a new installation was asked for has the wrong script.
func (s Status) succeeded() bool {
	return s.Script != "" && s.Script == s.ID &&
		!slices.ContainsFunc(s.Phases, func(p Phase) bool { return p.State == wire.Failed })
}
