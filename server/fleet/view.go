package fleet

import (
	"context"
	"maps"
	"slices"
	"time"

	"rookery/disklayout"
	"rookery/wire"
)

// A View is all there is to know of one machine: a node, or a new machine that
// nobody accepted yet, which has no name and no record.
type View struct {
	Name   string `json:"name,omitempty"`
	New    bool   `json:"new,omitempty"`
	MAC    string `json:"mac,omitempty"` // to speak of a new machine by
	Record *Node  `json:"record,omitempty"`

	Next    wire.Do    `json:"next,omitempty"`   // install, local; wait: not accepted
	ID      string     `json:"id,omitempty"`     // of the installation last asked for
	Image   wire.Image `json:"image,omitzero"`   // the version it installs, once it began
	Wants   string     `json:"wants,omitempty"`  // the image that its records name
	Layout  string     `json:"layout,omitempty"` // where it comes from; of Node alone
	Address string     `json:"address,omitempty"`
	Rack    *Rack      `json:"rack,omitempty"` // of Node alone

	Groups   []string  `json:"groups,omitempty"`   // that it is in, the one that counts most first
	Settings []Setting `json:"settings,omitempty"` // its own and those of others for it; of Node alone

	Phase   wire.Phase     `json:"phase,omitempty"` // the latest
	State   wire.State     `json:"state,omitempty"` // of that phase: started, finished or failed
	Text    string         `json:"text,omitempty"`
	Percent float64        `json:"percent"` // of the image's bytes
	Phases  []Phase        `json:"phases,omitempty"`
	Turns   []Turn         `json:"turns,omitempty"` // how phases went on, and why
	Fetch   *wire.Transfer `json:"fetch,omitempty"`
	Error   *Failure       `json:"error,omitempty"`

	Firmware  disklayout.Firmware `json:"firmware,omitempty"`
	Inventory *wire.Inventory     `json:"inventory,omitempty"`
	Boots     []Boot              `json:"boots,omitempty"`
	Seen      time.Time           `json:"seen,omitzero"`
	Installed time.Time           `json:"installed,omitzero"`
}

func (r records) view(n Node, s Status) View {
	v := View{
		Name: n.Name, Record: &n, Next: s.Next, ID: s.ID, Image: s.Image.Image, Address: n.Address, Wants: r.settings(n).Image,
		Text: s.Text, Phases: s.Phases, Turns: s.Turns, Fetch: s.Fetch, Error: s.Error,
		Boots: s.Boots, Seen: s.Seen, Installed: s.Installed,
	}
	for _, g := range r.groupsOf(n) {
		v.Groups = append(v.Groups, g.Name)
	}
	if len(n.MACs) > 0 {
		v.MAC = n.MACs[0]
	}
	if last := len(s.Phases) - 1; last >= 0 {
		v.Phase, v.State = s.Phases[last].Phase, s.Phases[last].State
	}
	if s.Fetch != nil && s.Fetch.Total > 0 {
		v.Percent = 100 * float64(s.Fetch.Done) / float64(s.Fetch.Total)
	}
	if s.Inventory != nil {
		v.Inventory, v.Firmware = s.Inventory, s.Inventory.Firmware
	}
	return v
}

// Nodes are all nodes by name, then the new machines by MAC address.
func (f *Fleet) Nodes() []View {
	f.mu.RLock()
	defer f.mu.RUnlock()
	all := []View{}
	for _, name := range slices.Sorted(maps.Keys(f.records.nodes)) {
		all = append(all, f.records.view(f.records.nodes[name], f.machines[name].status))
	}
	for _, c := range f.newcomers.list() {
		all = append(all, c.view())
	}
	return all
}

func (c *newcomer) view() View {
	return View{
		New: true, MAC: c.Inventory.NICs[0].MAC, Next: wire.Wait,
		Firmware: c.Inventory.Firmware, Inventory: &c.Inventory, Seen: c.Seen,
	}
}

// Node is one node, or the new machine of a MAC address, or ErrNotFound.
func (f *Fleet) Node(ctx context.Context, name string) (View, error) {
	n, status, records, err := f.node(name)
	if err != nil {
		f.mu.RLock()
		defer f.mu.RUnlock()
		if c := f.newcomers.find(normalMAC(name)); c != nil {
			return c.view(), nil
		}
		return View{}, err
	}
	v := records.view(n, status)
	v.Settings = records.settingsFrom(n)
	v.Rack = records.rack(n, status, time.Now())
	if _, v.Layout, err = f.layout(ctx, n, status, records); err != nil {
		v.Layout = err.Error()
	}
	return v, nil
}

// A GroupView is a group's record and the names of the nodes in it.
type GroupView struct {
	Group
	Nodes []string `json:"nodes"`
}

func (r records) groupView(g Group) GroupView {
	v := GroupView{g, []string{}}
	for name, n := range r.nodes {
		if slices.Contains(n.Groups, g.Name) {
			v.Nodes = append(v.Nodes, name)
		}
	}
	slices.Sort(v.Nodes)
	return v
}

// Groups are all groups by name.
func (f *Fleet) Groups() []GroupView {
	f.mu.RLock()
	records := f.records // takes a while with all nodes, and nobody writes to these maps
	f.mu.RUnlock()
	all := []GroupView{}
	for _, name := range slices.Sorted(maps.Keys(records.groups)) {
		all = append(all, records.groupView(records.groups[name]))
	}
	return all
}
