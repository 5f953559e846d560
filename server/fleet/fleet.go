// Package fleet knows the nodes: what each is to be, what it is told when it
// asks, and where it is in its installation. What must not be forgotten is in
// the store before anybody is told.
package fleet

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"rookery/disklayout"
	"rookery/server/store"
	"rookery/wire"
)

// The errors that callers tell apart.
var (
	ErrNotFound = errors.New("not found")
	ErrConflict = errors.New("conflict")          // the node's state does not allow it
	ErrToken    = errors.New("token is not good") // say hello again
)

// conflict is an error that is ErrConflict, and need not say so.
type conflict struct{ error }

func (conflict) Is(target error) bool { return target == ErrConflict }
func (c conflict) Unwrap() error      { return c.error }

// Images finds the version that "debian12", "debian12:latest" or "debian12:1"
// names; the error is ErrNotFound when there is none.
type Images func(ctx context.Context, name string) (Image, error)

// An Image is a version of an image.
type Image struct {
	wire.Image        // what a script says of it
	Layout     string `json:"layout,omitempty"` // what its label says of the disk, as JSON; "" when it has none
}

// once asks images for each name only once.
func (images Images) once() Images {
	type answer struct {
		image Image
		err   error
	}
	known := map[string]answer{}
	return func(ctx context.Context, name string) (Image, error) {
		a, ok := known[name]
		if !ok {
			a.image, a.err = images(ctx, name)
			known[name] = a
		}
		return a.image, a.err
	}
}

// Config is what a fleet works with; all of it is needed, but Server and Multicast.
type Config struct {
	Server   netip.Addr // its own address, which no node can have
	Store    store.Store
	Images   Images
	Key      ed25519.PrivateKey // signs scripts
	TokenKey []byte             // makes tokens
	Log      *slog.Logger

	Multicast *wire.Multicast // how layers are sent; nil: not at all
}

// A Fleet is safe for use by many goroutines.
type Fleet struct {
	Config

	// changing is held by who decides and saves; so reading never waits for a
	// disk. Its holder may read what follows, and needs mu to write it.
	changing sync.Mutex

	mu        sync.RWMutex
	records   records
	ids       index
	seen      seen
	machines  map[string]machine // by node
	revisions map[[2]string]uint64
	newcomers newcomers
	lastN     int64
	news      chan struct{} // closed at the next event
}

// A machine is a node's state. What it points to is never written again.
type machine struct {
	status  Status
	history []NodeEvent
	live    *NodeEvent // the latest progress, when it is newer than the history
}

// kindStatus is the store's kind of what happened to a node.
const kindStatus = "Status"

type savedMachine struct {
	Status  Status      `json:"status"`
	History []NodeEvent `json:"history,omitempty"`
}

// New returns the fleet that is in the store.
func New(ctx context.Context, c Config) (*Fleet, error) {
	f := &Fleet{
		Config:    c,
		records:   records{nodes: map[string]Node{}, groups: map[string]Group{}, layouts: map[string]disklayout.Layout{}, server: c.Server},
		machines:  map[string]machine{},
		revisions: map[[2]string]uint64{},
		news:      make(chan struct{}),
	}
	for _, kind := range []string{kindNode, kindGroup, kindLayout, kindDefaults, kindStatus} {
		all, err := c.Store.List(ctx, kind)
		if err != nil {
			return nil, fmt.Errorf("fleet: %w", err)
		}
		for _, r := range all {
			if err := f.load(r); err != nil {
				return nil, fmt.Errorf("fleet: %s %q: %w", kind, r.Name, err)
			}
		}
	}
	f.ids = newIndex(f.records.nodes)
	return f, nil
}

func (f *Fleet) load(r store.Record) error {
	f.revisions[[2]string{r.Kind, r.Name}] = r.Revision
	switch r.Kind {
	case kindNode:
		var n Node
		err := json.Unmarshal(r.Value, &n)
		f.records.nodes[r.Name] = n
		return err
	case kindGroup:
		var g Group
		err := json.Unmarshal(r.Value, &g)
		f.records.groups[r.Name] = g
		return err
	case kindLayout:
		var l disklayout.Layout
		err := json.Unmarshal(r.Value, &l)
		f.records.layouts[r.Name] = l
		return err
	case kindDefaults:
		return json.Unmarshal(r.Value, &f.records.defaults)
	}
	var m savedMachine
	err := json.Unmarshal(r.Value, &m)
	f.machines[r.Name] = machine{status: m.Status, history: m.History}
	if i := m.Status.Inventory; i != nil {
		f.seen.hello(r.Name, *i)
	}
	for _, e := range m.History {
		f.lastN = max(f.lastN, e.N)
	}
	return err
}

// A change is a new value of a record; without one the record is deleted.
type change struct {
	kind, name string
	value      any // a document's, or machine
}

func (m machine) change(node string) change { return change{kindStatus, node, m} }

// save puts changes in the store, all or none, and then where everyone sees
// them. Called by who holds changing.
func (f *Fleet) save(ctx context.Context, changes ...change) error {
	if len(changes) == 0 {
		return nil
	}
	var all []store.Record
	for _, c := range changes {
		r := store.Record{Kind: c.kind, Name: c.name, Revision: f.revisions[[2]string{c.kind, c.name}]}
		value := c.value
		if m, ok := value.(machine); ok {
			value = savedMachine{m.status, m.history}
		}
		if value != nil {
			b, err := json.Marshal(value)
			if err != nil {
				return fmt.Errorf("fleet: %s %q: %w", c.kind, c.name, err)
			}
			r.Value = b
		}
		all = append(all, r)
	}
	revision, err := f.Store.Put(ctx, all...)
	if err != nil {
		return fmt.Errorf("fleet: %w", err)
	}
	f.publish(revision, changes)
	return nil
}

// publish shows changes to everyone.
func (f *Fleet) publish(revision uint64, changes []change) {
	f.mu.Lock()
	defer f.mu.Unlock()
	// Records are few and change seldom: whoever reads them holds on to a map
	// that nobody writes to.
	r := &f.records
	r.nodes, r.groups, r.layouts = cloneIf(kindNode, changes, r.nodes), cloneIf(kindGroup, changes, r.groups), cloneIf(kindLayout, changes, r.layouts)
	for _, c := range changes {
		f.revisions[[2]string{c.kind, c.name}] = revision
		switch v := c.value.(type) {
		case machine:
			f.machines[c.name] = v
		case nil:
			delete(f.revisions, [2]string{c.kind, c.name})
			switch c.kind {
			case kindNode:
				delete(r.nodes, c.name)
			case kindGroup:
				delete(r.groups, c.name)
			case kindStatus:
				delete(f.machines, c.name)
			}
		default:
			r.set(c.name, v)
		}
	}
	if slices.ContainsFunc(changes, func(c change) bool { return c.kind == kindNode }) {
		f.ids = newIndex(f.records.nodes)
		f.settle()
	}
	close(f.news)
	f.news = make(chan struct{})
}

func cloneIf[V any](kind string, changes []change, m map[string]V) map[string]V {
	if slices.ContainsFunc(changes, func(c change) bool { return c.kind == kind }) {
		return maps.Clone(m)
	}
	return m
}

// settle takes machines that have become nodes off the list of newcomers;
// what they said of themselves is the node's now.
func (f *Fleet) settle() {
	for _, c := range f.newcomers.list() {
		name, _ := f.ids.match(c.Inventory)
		if name == "" {
			continue
		}
		f.newcomers.remove(c)
		if m := f.machines[name]; m.status.Inventory == nil {
			m.status.Inventory, m.status.Seen = &c.Inventory, c.Seen
			f.machines[name] = m
		}
	}
}

// newID is the ID of a new installation: 32 hex digits.
func newID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// Accept makes a node of a machine that said hello and that nobody knew. n is
// its record; the MAC address is added to it, and the machine's UUID when it
// has one of its own.
func (f *Fleet) Accept(ctx context.Context, mac string, n Node) error {
	f.changing.Lock()
	defer f.changing.Unlock()
	mac = normalMAC(mac)
	c := f.newcomers.find(mac)
	if c == nil {
		if name, _ := f.ids.match(wire.Inventory{NICs: []wire.NIC{{MAC: mac}}}); name != "" {
			return conflict{fmt.Errorf("accept: %s is node %s already", mac, name)}
		}
		return fmt.Errorf("accept: no new machine with MAC address %s: %w", mac, ErrNotFound)
	}
	if _, taken := f.records.nodes[n.Name]; taken {
		return conflict{fmt.Errorf("accept: node %s: there is one already", n.Name)}
	}
	if n = n.normal(); !slices.Contains(n.MACs, mac) {
		n.MACs = append([]string{mac}, n.MACs...)
	}
	if uuid := strings.ToLower(c.Inventory.UUID); n.UUID == "" && usableUUID(uuid) && f.ids[id{"uuid", uuid}] == nil {
		n.UUID = uuid
	}
	return f.put(ctx, n)
}

// Edit changes the record of a node that exists. What edit is given is a copy,
// it may write to all of it.
func (f *Fleet) Edit(ctx context.Context, name string, edit func(*Node) error) error {
	f.changing.Lock()
	defer f.changing.Unlock()
	n, ok := f.records.nodes[name]
	if !ok {
		return fmt.Errorf("node %s: %w", name, ErrNotFound)
	}
	n = n.clone()
	if err := edit(&n); err != nil {
		return err
	}
	if n.Name != name {
		return Problems{{Record: "node " + name, Key: "name", Reason: fmt.Sprintf("%.80q: a node keeps its name", n.Name)}}
	}
	return f.put(ctx, n)
}

// Put creates or replaces the record of a node.
func (f *Fleet) Put(ctx context.Context, n Node) error {
	f.changing.Lock()
	defer f.changing.Unlock()
	return f.put(ctx, n)
}

func (f *Fleet) put(ctx context.Context, n Node) error {
	d := document{kind: kindNode, name: n.Name, value: n.normal()}
	if err := d.check(); err != nil {
		return Problems{d.problem(err)}
	}
	_, err := f.apply(ctx, []document{d})
	return err
}

// Delete forgets a node and what happened to it.
func (f *Fleet) Delete(ctx context.Context, name string) error {
	f.changing.Lock()
	defer f.changing.Unlock()
	if _, ok := f.records.nodes[name]; !ok {
		return fmt.Errorf("node %s: %w", name, ErrNotFound)
	}
	f.Log.Info("node deleted", "node", name)
	return f.save(ctx, change{kindNode, name, nil}, change{kindStatus, name, nil})
}

// DeleteGroup forgets a group. ErrConflict while a node is in it.
func (f *Fleet) DeleteGroup(ctx context.Context, name string) error {
	f.changing.Lock()
	defer f.changing.Unlock()
	g, ok := f.records.groups[name]
	if !ok {
		return fmt.Errorf("group %s: %w", name, ErrNotFound)
	}
	if in := f.records.groupView(g).Nodes; len(in) > 0 {
		return conflict{fmt.Errorf("group %s: node %s is in it", name, in[0])}
	}
	f.Log.Info("group deleted", "group", name)
	return f.save(ctx, change{kindGroup, name, nil})
}

// Install asks for a new installation of a node, at its next start from the
// network.
func (f *Fleet) Install(ctx context.Context, name string) error {
	f.changing.Lock()
	defer f.changing.Unlock()
	n, ok := f.records.nodes[name]
	if !ok {
		return fmt.Errorf("node %s: %w", name, ErrNotFound)
	}
	n.Boot = wire.Install
	if err := f.records.checkNode(ctx, n, f.ids, f.Images); err != nil {
		return conflict{fmt.Errorf("node %s: %w", name, err)}
	}
	m := f.machines[name]
	m.status = m.status.request(wire.Install, newID())
	m.live = nil
	f.Log.Info("installation asked for", "node", name, "id", m.status.ID)
	return f.save(ctx, m.change(name))
}

// Hello answers a machine's hello: whether it waits, installs or starts from
// its own disk.
func (f *Fleet) Hello(ctx context.Context, h wire.Hello) (wire.Welcome, error) {
	f.changing.Lock()
	defer f.changing.Unlock()
	now := time.Now()
	name, err := f.ids.match(h.Inventory)
	if name == "" {
		f.greet(h, now)
		mac := h.Inventory.NICs[0].MAC
		if err != nil {
			return wire.Welcome{Do: wire.Wait, Why: err.Error()}, nil
		}
		return wire.Welcome{Do: wire.Wait, Why: mac + " is not known here: rookery node accept " + mac + " --name NAME --image IMAGE"}, nil
	}

	m := f.machines[name]
	was := m.status
	m.status = was.hello(h, now)
	if relay := f.seen.hello(name, h.Inventory); relay != "" {
		m.status.Relay = relay
	}
	if was.Boot != h.Boot {
		m.live = nil
		f.Log.Info("hello", "node", name, "boot", h.Boot, "next", string(m.status.Next))
	}
	if was.Boot != h.Boot || was.Relay != m.status.Relay || !sameInventory(was.Inventory, m.status.Inventory) {
		err = f.save(ctx, m.change(name))
	} else {
		f.show(name, m)
	}
	if err != nil {
		return wire.Welcome{}, err
	}
	w := wire.Welcome{Do: m.status.Next, Node: name, Token: newToken(f.TokenKey, name, h.Boot)}
	if w.Do == wire.Install {
		if _, _, err := f.script(ctx, name); err != nil { // better told here than after the disk is planned
			w.Do, w.Why = wire.Wait, err.Error()
		}
	}
	return w, nil
}

// greet lists a machine that nobody knows.
func (f *Fleet) greet(h wire.Hello, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.newcomers.add(h, now) {
		f.Log.Info("new machine", "mac", h.Inventory.NICs[0].MAC, "uuid", h.Inventory.UUID)
	}
}

// show makes a machine's state visible without saving it.
func (f *Fleet) show(name string, m machine) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machines[name] = m
	close(f.news)
	f.news = make(chan struct{})
}

// script renders a node's script for the installation that was asked for. It
// says which version it installs.
func (f *Fleet) script(ctx context.Context, name string) (s wire.Script, image Image, err error) {
	n, status := f.records.nodes[name], f.machines[name].status
	full := n
	full.Settings = f.records.settings(n)
	if image, err = f.image(ctx, full.Image, status); err != nil {
		return s, image, fmt.Errorf("node %s: %w", name, err)
	}
	layout, _, err := f.records.layoutOf(n, image)
	if err != nil {
		return s, image, fmt.Errorf("node %s: %w", name, err)
	}
	s = render(full, layout, status, image.Image)
	s.Multicast = listen(full.Settings, f.Multicast)
	if err := s.Check(); err != nil {
		return s, image, fmt.Errorf("node %s: script: %w", name, err)
	}
	return s, image, nil
}

// image is the version that a node's installation is of. A newer one must not
// get into an installation that began.
func (f *Fleet) image(ctx context.Context, name string, status Status) (Image, error) {
	if status.Next == wire.Install && status.Named == name && status.Image.Name != "" {
		return status.Image, nil
	}
	image, err := f.Images(ctx, name)
	if err != nil {
		return image, noImage(err)
	}
	return image, nil
}

// Script is the signed script for the bearer of token. The same installation
// has the same script, also after a restart of the server, as long as the
// node's records stay. Errors: ErrToken, ErrConflict when nothing is to be
// installed.
func (f *Fleet) Script(ctx context.Context, token string) ([]byte, error) {
	f.changing.Lock()
	defer f.changing.Unlock()
	name, boot, err := f.bearer(token)
	if err != nil {
		return nil, err
	}
	m := f.machines[name]
	if boot != m.status.Boot {
		return nil, fmt.Errorf("node %s started again since: %w", name, ErrToken)
	}
	if m.status.Next != wire.Install {
		return nil, conflict{fmt.Errorf("node %s: there is nothing to install", name)}
	}
	s, image, err := f.script(ctx, name)
	if err != nil {
		return nil, conflict{err}
	}
	sealed, err := wire.Seal(s, f.Key)
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", name, err)
	}
	f.Log.Info("script fetched", "node", name, "id", s.ID, "image", s.Image.Name)
	was := m.status
	m.status = was.fetched(f.records.settings(f.records.nodes[name]).Image, image)
	if m.status.Script != was.Script || m.status.Named != was.Named || m.status.Image != was.Image {
		err = f.save(ctx, m.change(name))
	}
	return sealed, err
}

// bearer is the node and the boot that a token speaks for.
func (f *Fleet) bearer(token string) (name, boot string, err error) {
	name, boot, ok := openToken(f.TokenKey, token)
	if !ok {
		return "", "", ErrToken
	}
	if _, known := f.records.nodes[name]; !known {
		return "", "", fmt.Errorf("node %s: there is none any more: %w", name, ErrToken)
	}
	return name, boot, nil
}

// Report takes the events of the bearer of token. All but progress is in the
// store when it returns.
func (f *Fleet) Report(ctx context.Context, token string, events []wire.Event) error {
	f.changing.Lock()
	defer f.changing.Unlock()
	name, boot, err := f.bearer(token)
	if err != nil {
		return err
	}
	m, now := f.machines[name], time.Now()
	keep, news, lastN := false, false, f.lastN
	for _, e := range events {
		if e.Boot != boot {
			return fmt.Errorf("node %s: event of boot %s with the token of %s: %w", name, e.Boot, boot, ErrToken)
		}
		status, taken := m.status.event(e, now)
		if !taken {
			continue
		}
		f.logEvent(name, m.status, status, e)
		m.status, news = status, true
		lastN = max(lastN+1, now.UnixMicro())
		ne := NodeEvent{N: lastN, Node: name, Event: e}
		if e.State == wire.Progress {
			m.live = &ne
			continue
		}
		keep, m.live = true, nil
		m.history = remember(m.history, ne)
	}
	if !news {
		return nil
	}
	f.mu.Lock()
	f.lastN = lastN
	f.mu.Unlock()
	if keep {
		return f.save(ctx, m.change(name))
	}
	f.show(name, m)
	return nil
}

func (f *Fleet) logEvent(name string, was, is Status, e wire.Event) {
	switch {
	case e.State == wire.Failed:
		f.Log.Error("step failed", "node", name, "step", string(e.Phase), "err", e.Text)
	case e.State == wire.Finished:
		f.Log.Info("step finished", "node", name, "step", string(e.Phase), "seconds", e.Took)
	}
	if was.Next != is.Next {
		f.Log.Info("installed", "node", name, "id", is.ID)
	}
}

// maxEvents is how many events Events returns at the most.
const maxEvents = 1000

// Events returns the oldest events after number after, of one node or, for "",
// of all, oldest first: what is kept of the past, and the latest progress. At
// its end the caller goes on with the last number once more is closed.
func (f *Fleet) Events(node string, after int64) (events []NodeEvent, more <-chan struct{}) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var found []*NodeEvent
	look := func(m machine) {
		for i := len(m.history) - 1; i >= 0 && m.history[i].N > after; i-- {
			found = append(found, &m.history[i])
		}
		if m.live != nil && m.live.N > after {
			found = append(found, m.live)
		}
	}
	if node != "" {
		look(f.machines[node])
	} else {
		for _, m := range f.machines {
			look(m)
		}
	}
	slices.SortFunc(found, func(a, b *NodeEvent) int { return int(min(1, max(-1, a.N-b.N))) })
	for _, e := range found[:min(len(found), maxEvents)] {
		events = append(events, *e)
	}
	return events, f.news
}

// Host is what is known of a machine by one MAC address and, when that is
// nobody's, its UUID; false when it is nobody's machine.
func (f *Fleet) Host(mac, uuid string) (Host, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	mac = normalMAC(mac)
	name, _ := f.ids.match(wire.Inventory{UUID: uuid, NICs: []wire.NIC{{MAC: mac}}})
	if name == "" {
		return Host{}, false
	}
	n := f.records.nodes[name]
	n.Settings = f.records.settings(n)
	return host(n, f.machines[name].status.Next, mac), true
}

// A Plan is what an installation of a node would do to its disk, and where the
// layout that it carries out comes from.
type Plan struct {
	disklayout.Plan
	From string `json:"from"`
}

// Plan is the plan that a node's agent will make. ErrConflict when the machine
// never said hello.
func (f *Fleet) Plan(ctx context.Context, name string) (Plan, error) {
	n, status, records, err := f.node(name)
	if err != nil {
		return Plan{}, err
	}
	if status.Inventory == nil {
		return Plan{}, conflict{fmt.Errorf("node %s: its disks are not known: it never said hello; start it from the network", name)}
	}
	layout, from, err := f.layout(ctx, n, status, records)
	if err != nil {
		return Plan{}, fmt.Errorf("node %s: %w", name, err)
	}
	plan, err := disklayout.Fit(layout, status.Inventory.Disks, status.Inventory.Firmware, status.ID)
	if err != nil {
		return Plan{}, fmt.Errorf("node %s: %s: %w", name, from, err)
	}
	return Plan{plan, from}, nil
}

// node is a node as it is now, with the records that it is among.
func (f *Fleet) node(name string) (Node, Status, records, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	n, ok := f.records.nodes[name]
	if !ok {
		return n, Status{}, f.records, fmt.Errorf("node %s: %w", name, ErrNotFound)
	}
	return n, f.machines[name].status, f.records, nil
}

// layout is a node's, and where it comes from. The image is only looked for
// when no record says.
func (f *Fleet) layout(ctx context.Context, n Node, status Status, r records) (l disklayout.Layout, from string, err error) {
	var image Image
	if s := r.settings(n); s.Layout == "" && s.Image != "" {
		if image, err = f.image(ctx, s.Image, status); err != nil {
			return l, "", err
		}
	}
	return r.layoutOf(n, image)
}

// A Need is a version that has to stay, and why.
type Need struct {
	Name     string      `json:"name"`
	Manifest wire.Digest `json:"manifest"`
	Why      string      `json:"why"`             // "node n1", "n1 is being installed"
	Rsync    bool        `json:"rsync,omitempty"` // rsync is among that node's transports
}

// Needed are the versions that nodes are to be installed with, by their records
// now, and those that are being installed. Images that nobody finds are left out.
func (f *Fleet) Needed(ctx context.Context) ([]Need, error) {
	f.mu.RLock()
	records, running := f.records, map[string]Image{}
	for name, m := range f.machines {
		if m.status.Next == wire.Install && m.status.Image.Name != "" {
			running[name] = m.status.Image
		}
	}
	f.mu.RUnlock()

	needed, images := []Need{}, f.Images.once()
	for _, name := range slices.Sorted(maps.Keys(records.nodes)) {
		settings := records.settings(records.nodes[name])
		rsync := slices.Contains(settings.Transports, "rsync")
		if i, ok := running[name]; ok {
			needed = append(needed, Need{i.Name, i.Manifest, name + " is being installed", rsync})
		}
		named := settings.Image
		if named == "" {
			continue
		}
		switch i, err := images(ctx, named); {
		case err == nil:
			needed = append(needed, Need{i.Name, i.Manifest, "node " + name, rsync})
		case !errors.Is(err, ErrNotFound):
			return nil, fmt.Errorf("node %s: %w", name, err)
		}
	}
	return needed, nil
}
