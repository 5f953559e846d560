package fleet_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rookery/disklayout"
	"rookery/server/fleet"
	"rookery/server/store"
	"rookery/wire"
)

const (
	mac1 = "52:54:00:00:00:01"
	mac2 = "52:54:00:00:00:02"
	uuid = "12345678-9abc-def0-1234-56789abcdef0"
)

var (
	siteKey = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	boots   = []string{strings.Repeat("a", 32), strings.Repeat("b", 32), strings.Repeat("c", 32)}
)

// A site is a fleet whose server can be restarted and whose images can change.
type site struct {
	*fleet.Fleet
	t       testing.TB
	store   store.Store
	newest  map[string]string // image to version
	layouts map[string]string // labels, by version
	broken  error             // what looking for an image ends with
}

func newSite(t testing.TB) *site {
	s := &site{t: t, store: store.Memory(), newest: map[string]string{"debian12": "1"}, layouts: map[string]string{}}
	s.restart()
	return s
}

func (s *site) restart() {
	s.t.Helper()
	f, err := fleet.New(s.t.Context(), fleet.Config{
		Server: netip.MustParseAddr("10.0.0.1"), Store: s.store, Images: s.resolve, Key: siteKey, TokenKey: []byte("tokens"), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		s.t.Fatalf("New: %v", err)
	}
	s.Fleet = f
}

func (s *site) resolve(_ context.Context, name string) (fleet.Image, error) {
	if s.broken != nil {
		return fleet.Image{}, s.broken
	}
	base, tag, _ := strings.Cut(name, ":")
	newest, ok := s.newest[base]
	if !ok {
		return fleet.Image{}, fmt.Errorf("%q: %w", name, fleet.ErrNotFound)
	}
	if tag == "" {
		tag = newest
	}
	name = base + ":" + tag
	return fleet.Image{Image: wire.Image{Name: name, Manifest: wire.DigestOf([]byte(name))}, Layout: s.layouts[name]}, nil
}

func (s *site) apply(yaml string) []string {
	s.t.Helper()
	done, err := s.Apply(s.t.Context(), fleet.File{Name: "site.yaml", Data: yaml})
	if err != nil {
		s.t.Fatalf("Apply: %v", err)
	}
	return done
}

func (s *site) hello(boot string, macs ...string) wire.Welcome {
	s.t.Helper()
	w, err := s.Hello(s.t.Context(), hello(boot, macs...))
	if err != nil {
		s.t.Fatalf("Hello: %v", err)
	}
	return w
}

func hello(boot string, macs ...string) wire.Hello {
	h := wire.Hello{Boot: boot, Inventory: wire.Inventory{
		Firmware: disklayout.UEFI, Arch: "amd64",
		Disks: []disklayout.Disk{{Name: "vda", Path: "/dev/vda", Size: 8 << 30}},
	}}
	if len(macs) > 0 && macs[0] == mac1 {
		h.Inventory.UUID = uuid
	}
	for i, m := range macs {
		h.Inventory.NICs = append(h.Inventory.NICs, wire.NIC{Name: fmt.Sprintf("eth%d", i), MAC: m, Carrier: true})
	}
	return h
}

func (s *site) script(token string) ([]byte, wire.Script) {
	s.t.Helper()
	sealed, err := s.Script(s.t.Context(), token)
	if err != nil {
		s.t.Fatalf("Script: %v", err)
	}
	script, err := wire.Open(sealed, siteKey.Public().(ed25519.PublicKey))
	if err != nil {
		s.t.Fatalf("Open: %v", err)
	}
	return sealed, script
}

func (s *site) report(token string, events ...wire.Event) {
	s.t.Helper()
	if err := s.Report(s.t.Context(), token, events); err != nil {
		s.t.Fatalf("Report: %v", err)
	}
}

func (s *site) node(name string) fleet.View {
	s.t.Helper()
	v, err := s.Node(s.t.Context(), name)
	if err != nil {
		s.t.Fatalf("Node: %v", err)
	}
	return v
}

func event(boot string, seq int, phase wire.Phase, state wire.State) wire.Event {
	return wire.Event{Boot: boot, Seq: seq, Phase: phase, State: state}
}

const oneNode = `
kind: Node
name: n1
macs: [52:54:00:00:00:01]
address: 10.0.0.7/24
gateway: 10.0.0.1
image: debian12
`

func TestAnUnknownMachineBecomesANode(t *testing.T) {
	s := newSite(t)
	w := s.hello(boots[0], mac1)
	if w.Do != wire.Wait || !strings.Contains(w.Why, mac1) || w.Token != "" {
		t.Errorf("an unknown machine is told %+v, want to wait and its MAC address", w)
	}
	if h, known := s.Host(mac1, uuid); known {
		t.Errorf("Host knows an unknown machine: %+v", h)
	}
	all := s.Nodes()
	if len(all) != 1 || !all[0].New || all[0].MAC != mac1 || all[0].Firmware != disklayout.UEFI {
		t.Fatalf("Nodes: %+v, want one new machine", all)
	}

	accept := func(mac, name string) error {
		return s.Accept(t.Context(), mac, fleet.Node{Name: name, Settings: fleet.Settings{Image: "debian12"}})
	}
	if err := accept(mac2, "n1"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("Accept of a machine that was never seen: %v, want %v", err, fleet.ErrNotFound)
	}
	if err := accept("52-54-00-00-00-01", "n1"); err != nil {
		t.Fatalf("Accept: %v", err)
	}
	v := s.node("n1")
	if len(s.Nodes()) != 1 || v.New || v.MAC != mac1 || v.Record.UUID != uuid || v.Inventory == nil {
		t.Errorf("accepted: %+v, want a node with MAC address, UUID and inventory", v)
	}
	if _, err := s.Plan(t.Context(), "n1"); err != nil { // the disks are known already
		t.Errorf("Plan: %v", err)
	}
	if w := s.hello(boots[0], mac1); w.Do != wire.Install || w.Node != "n1" {
		t.Errorf("after Accept: %+v, want to install n1", w)
	}
	s.hello(boots[1], mac2)
	if err := accept(mac2, "n1"); !errors.Is(err, fleet.ErrConflict) {
		t.Errorf("Accept under a name that is taken: %v, want %v", err, fleet.ErrConflict)
	}
}

func TestAnInstallationSurvivesRestartsOfServerAndNode(t *testing.T) {
	s := newSite(t)
	s.apply(oneNode)
	w := s.hello(boots[0], mac1)
	first, script := s.script(w.Token)
	want := []wire.Network{{MAC: mac1, Address: "10.0.0.7/24", Gateway: "10.0.0.1"}}
	if id := script.Identity; script.Node != "n1" || id.Hostname != "n1" || !reflect.DeepEqual(id.Network, want) {
		t.Errorf("script is %+v", script)
	}
	s.report(w.Token, event(boots[0], 1, wire.PhaseScript, wire.Finished), event(boots[0], 2, wire.PhaseFetch, wire.Started))

	s.newest["debian12"] = "2" // must not get into an installation that began
	s.restart()
	if again, _ := s.script(w.Token); !bytes.Equal(first, again) {
		t.Errorf("after a restart of the server the script is\n%s\nwant\n%s", again, first)
	}
	s.report(w.Token, event(boots[0], 2, wire.PhaseFetch, wire.Started), event(boots[0], 3, wire.PhaseFetch, wire.Progress))
	if v := s.node("n1"); v.Phase != wire.PhaseFetch || len(v.Phases) != 2 {
		t.Errorf("after a restart of the server the node is at %+v", v)
	}

	late := w.Token // power gone; the agent starts again
	w = s.hello(boots[1], mac1)
	if again, _ := s.script(w.Token); !bytes.Equal(first, again) {
		t.Errorf("after a power-cycle the script is\n%s\nwant\n%s", again, first)
	}
	if _, err := s.Script(t.Context(), late); !errors.Is(err, fleet.ErrToken) {
		t.Errorf("Script for an earlier start of the agent: %v, want %v", err, fleet.ErrToken)
	}
	s.report(late, event(boots[0], 9, wire.PhaseEnd, wire.Finished)) // heard, and without effect

	if h, known := s.Host(mac1, ""); !known || h.Next != wire.Install {
		t.Errorf("Host during the installation: %+v, %v", h, known)
	}
	s.report(w.Token, event(boots[1], 1, wire.PhaseEnd, wire.Finished))
	s.restart()
	if h, known := s.Host(mac1, ""); !known || h.Next != wire.Local || h.Address.String() != "10.0.0.7/24" || h.Gateway.String() != "10.0.0.1" {
		t.Errorf("Host after the installation: %+v, %v", h, known)
	}
	if mac, h, known := s.HostAt(netip.MustParseAddr("10.0.0.7")); !known || mac != mac1 || h.Name != "n1" {
		t.Errorf("HostAt: %s, %+v, %v, want n1", mac, h, known)
	}
	if _, h, known := s.HostAt(netip.MustParseAddr("10.0.0.8")); known {
		t.Errorf("HostAt of nobody's address: %+v", h)
	}
	if w := s.hello(boots[2], mac1); w.Do != wire.Local {
		t.Errorf("hello after the installation: %+v, want local", w)
	}
	if _, err := s.Script(t.Context(), s.hello(boots[2], mac1).Token); !errors.Is(err, fleet.ErrConflict) {
		t.Errorf("Script of an installed node: %v, want %v", err, fleet.ErrConflict)
	}

	if err := s.Install(t.Context(), "n1"); err != nil {
		t.Fatalf("Install: %v", err)
	}
	s.restart()
	_, second := s.script(s.hello(boots[2], mac1).Token)
	if second.ID == script.ID || second.Identity.MachineID == script.Identity.MachineID || second.Image.Name != "debian12:2" {
		t.Errorf("the second installation has the script %+v, the first had %+v", second, script)
	}
}

func TestInstalledStaysInstalledWhenApplied(t *testing.T) {
	s := newSite(t)
	s.apply(oneNode)
	w := s.hello(boots[0], mac1)
	s.script(w.Token)
	s.report(w.Token, event(boots[0], 1, wire.PhaseEnd, wire.Finished))
	for _, tt := range []struct {
		name, yaml string
		done       string
		want       wire.Do
	}{
		{"the same again", oneNode, "[]", wire.Local},
		{"another setting", oneNode + "domain: example.org\n", "[node n1 changed]", wire.Local},
		{"install, now said", oneNode + "boot: install\n", "[node n1 changed]", wire.Install},
		{"never", oneNode + "boot: local\n", "[node n1 changed]", wire.Local},
		{"nothing said", oneNode, "[node n1 changed]", wire.Local},
	} {
		if done := fmt.Sprint(s.apply(tt.yaml)); done != tt.done {
			t.Errorf("%s: %s, want %s", tt.name, done, tt.done)
		}
		if v := s.node("n1"); v.Next != tt.want {
			t.Errorf("%s: next is %s, want %s", tt.name, v.Next, tt.want)
		}
	}
}

func TestDefaultsAndLayoutsReachTheScript(t *testing.T) {
	s := newSite(t)
	done := s.apply(`
kind: Defaults
image: debian12:1
layout: small
nameservers: [10.0.0.1, "fd00::1"]
domain: example.org
console: ttyS0,115200
seedFor: 0
mirrors: ["http://10.0.0.2:5000/v2/site/blobs/"]
uploadLimit: 10MB
downloadLimit: 1MiB
---
kind: Layout
name: small
partitions:
- {name: root, size: "*", type: linux, fs: ext4, mount: /}
- {name: esp, size: 64MiB, type: esp, fs: vfat, mount: /boot/efi}
---
kind: Node
name: n1
macs: [52-54-00-00-00-01, 52:54:00:00:00:02]
address: 10.0.0.7/24
domain: lab.example.org
ending: poweroff
downloadLimit: none
---
---
`)
	if want := "[defaults changed layout small created node n1 created]"; fmt.Sprint(done) != want {
		t.Errorf("Apply did %s, want %s", done, want)
	}
	_, script := s.script(s.hello(boots[0], mac1).Token)
	id := script.Identity
	if id.Domain != "lab.example.org" || len(id.Nameservers) != 2 || id.Serial != "ttyS0,115200" ||
		len(script.Layout.Partitions) != 2 || script.SeedFor != 0 || script.Ending != wire.Poweroff ||
		script.Upload != 10e6 || script.Download != 0 || strings.Join(script.Mirrors, " ") != "http://10.0.0.2:5000/v2/site/blobs/" ||
		script.OnFailure != wire.Shell || strings.Join(script.Transports, " ") != "bittorrent http" {
		t.Errorf("script is %+v", script)
	}
	plan, err := s.Plan(t.Context(), "n1")
	want, _ := disklayout.Fit(script.Layout, hello("").Inventory.Disks, disklayout.UEFI, script.ID)
	if err != nil || !reflect.DeepEqual(plan.Plan, want) || plan.From != "layout small of the Defaults" {
		t.Errorf("Plan: %+v, %v, want the agent's plan: %+v", plan, err, want)
	}
	// Two interfaces of one machine must not get one address.
	if h, known := s.Host(mac2, ""); !known || h.Name != "n1" || h.Address.IsValid() || h.Domain != "lab.example.org" {
		t.Errorf("Host by the second MAC address: %+v, %v", h, known)
	}
	if h, known := s.Host("52:54:00:00:00:99", ""); known {
		t.Errorf("Host: %+v, want none", h)
	}
}

// What a node leaves out comes from its groups by priority, then by the order in
// which it names them, then from the Defaults, then from the program.
func TestGroups(t *testing.T) {
	s := newSite(t)
	done := s.apply(`
kind: Defaults
transports: [http]
domain: example.org
console: ttyS0,115200
---
kind: Group
name: compute
image: debian12
transports: [bittorrent]
mirrors: ["http://10.0.0.2/layers/"]
uploadLimit: 10MB
domain: compute.example.org
---
kind: Group
name: slow
priority: 5
transports: [http, bittorrent]
downloadLimit: 1MB
---
kind: Group
name: gpu
uploadLimit: 20MB
downloadLimit: 20MB
mirrors: ["http://10.0.0.3/layers/"]
---
kind: Group
name: empty
priority: -1
---
kind: Node
name: n1
macs: [52:54:00:00:00:01]
groups: [gpu, empty, compute, slow]
domain: n1.example.org
---
kind: Node
name: n2
macs: [52:54:00:00:00:02]
groups: [compute]
transports: []
---
kind: Node
name: n3
macs: [52:54:00:00:00:03]
image: debian12
`)
	if len(done) != 8 || done[1] != "group compute created" {
		t.Errorf("Apply did %q", done)
	}
	for range 2 {
		for name, want := range map[string]string{
			"n1": "image=debian12 (group compute) domain=n1.example.org (the node's record) console=ttyS0,115200 (the Defaults) transports=[http bittorrent] (group slow) mirrors=[http://10.0.0.3/layers/] (group gpu) uploadLimit=20MB (group gpu) downloadLimit=1MB (group slow)",
			"n2": "image=debian12 (group compute) domain=compute.example.org (group compute) console=ttyS0,115200 (the Defaults) transports=[bittorrent] (group compute) mirrors=[http://10.0.0.2/layers/] (group compute) uploadLimit=10MB (group compute)",
			"n3": "image=debian12 (the node's record) domain=example.org (the Defaults) console=ttyS0,115200 (the Defaults) transports=[http] (the Defaults)",
		} {
			var got []string
			v := s.node(name)
			for _, set := range v.Settings {
				if set.From != "the program" {
					got = append(got, fmt.Sprintf("%s=%v (%s)", set.Key, set.Value, set.From))
				}
			}
			if strings.Join(got, " ") != want || v.Wants != "debian12" {
				t.Errorf("%s has %s\nwant   %s", name, strings.Join(got, " "), want)
			}
		}
		if got := fmt.Sprint(s.node("n1").Groups); got != "[slow gpu compute empty]" {
			t.Errorf("groups of n1: %s", got)
		}
		s.restart()
	}
	_, script := s.script(s.hello(boots[0], mac1).Token)
	if strings.Join(script.Transports, " ") != "http bittorrent" || script.Upload != 20e6 || script.Download != 1e6 || script.Identity.Domain != "n1.example.org" || script.SeedFor != 60 {
		t.Errorf("script is %+v", script)
	}

	// A group that changes is another for all who are in it.
	s.apply("kind: Group\nname: compute\nimage: debian12\ntransports: [http]\n")
	if _, script := s.script(s.hello(boots[1], mac2).Token); strings.Join(script.Transports, " ") != "http" || script.Upload != 0 {
		t.Errorf("script is %+v", script)
	}
	if v := s.node("n2"); v.Next != wire.Install || v.Settings[2].From != "the Defaults" {
		t.Errorf("n2 is %+v", v)
	}
}

// Who has multicast among its transports is told where to listen, and at the rate of
// its group.
func TestMulticastReachesTheScript(t *testing.T) {
	s := newSite(t)
	sent := wire.Multicast{Group: "239.192.0.0/16", Port: 6882, Server: "10.0.0.1"}
	s.Multicast = &sent
	s.apply(`
kind: Defaults
image: debian12
transports: [multicast, http]
---
kind: Group
name: slow
multicastRate: 5MB
---
kind: Node
name: n1
macs: [52:54:00:00:00:01]
groups: [slow]
---
kind: Node
name: n2
macs: [52:54:00:00:00:02]
transports: [http]
`)
	if _, script := s.script(s.hello(boots[0], mac1).Token); script.Multicast == nil || *script.Multicast != (wire.Multicast{Group: sent.Group, Port: sent.Port, Server: sent.Server, Rate: 5_000_000}) {
		t.Errorf("n1 listens to %+v", script.Multicast)
	}
	if _, script := s.script(s.hello(boots[1], mac2).Token); script.Multicast != nil {
		t.Errorf("n2 listens to %+v", script.Multicast)
	}
}

// What is read is what was written.
func TestRecordsAndBack(t *testing.T) {
	const yaml = `
kind: Layout
name: small
partitions:
- {name: root, size: "*", type: linux, fs: ext4, mount: /}
- {name: esp, size: 64MiB, type: esp, fs: vfat, mount: /boot/efi}
---
kind: Defaults
image: debian12
seedFor: 0
---
kind: Group
name: a
priority: -3
transports: [http]
layout: small
---
kind: Node
name: n1
uuid: 12345678-9abc-def0-1234-56789abcdef0
groups: [a]
---
kind: Node
name: n2
macs: [52:54:00:00:00:02]
transports: [bittorrent]
`
	s := newSite(t)
	s.apply(yaml)
	s.restart()
	all, err := s.Records("", "")
	if err != nil || len(all) != 5 {
		t.Fatalf("Records: %+v, %v", all, err)
	}
	var documents strings.Builder
	for _, record := range all {
		b, err := json.Marshal(record) // which is YAML, too
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&documents, "---\n%s\n", b)
	}
	for what, site := range map[string]*site{"here": s, "elsewhere": newSite(t)} {
		done := site.apply(documents.String())
		site.restart()
		if got, _ := site.Records("", ""); !reflect.DeepEqual(got, all) || what == "here" && len(done) > 0 {
			t.Errorf("%s: %q were changed by\n%s", what, done, documents.String())
		}
	}
	if one, err := s.Records("node", "n2"); err != nil || len(one) != 1 || !reflect.DeepEqual(one[0], all[4]) {
		t.Errorf("Records: %+v, %v", one, err)
	}
	if defaults, err := newSite(t).Records("Defaults", ""); err != nil || len(defaults) > 0 {
		t.Errorf("Records: %+v, %v", defaults, err)
	}

	diff := func(yaml string, want ...string) {
		t.Helper()
		got, err := s.Diff(t.Context(), fleet.File{Name: "f.yaml", Data: yaml})
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("Diff: %q, %v, want %q", got, err, want)
		}
	}
	diff(yaml)
	diff("kind: Group\nname: b\n---\nkind: Node\nname: n2\nmacs: [52-54-00-00-00-02]\ngroups: [b]\ntransports: [http]\n",
		"group b: new", `node n2: groups: ["b"], was nothing`, `node n2: transports: ["http"], was ["bittorrent"]`)
	diff("kind: Group\nname: a\n", `group a: layout: nothing, was "small"`, "group a: priority: nothing, was -3", `group a: transports: nothing, was ["http"]`)
	if _, err := s.Diff(t.Context(), fleet.File{Name: "f.yaml", Data: "kind: Group\nname: a\nlayout: big\n"}); fmt.Sprint(err) != `f.yaml:3: group a: layout: no layout "big"` {
		t.Errorf("Diff: %v", err)
	}
	if got, _ := s.Records("", ""); !reflect.DeepEqual(got, all) {
		t.Errorf("Diff changed the records to %+v", got)
	}
}

func TestAGroupInUseStays(t *testing.T) {
	s := newSite(t)
	s.apply("kind: Group\nname: a\n---\nkind: Group\nname: b\n---\n" + oneNode + "groups: [a, b]\n")
	all := s.Groups()
	if len(all) != 2 || all[0].Name != "a" || fmt.Sprint(all[1].Nodes) != "[n1]" {
		t.Errorf("Groups: %+v", all)
	}
	if err := s.DeleteGroup(t.Context(), "a"); !errors.Is(err, fleet.ErrConflict) || err.Error() != "group a: node n1 is in it" {
		t.Errorf("DeleteGroup: %v", err)
	}
	if err := s.Edit(t.Context(), "n1", func(n *fleet.Node) error { n.Groups = []string{"b", "c"}; return nil }); fmt.Sprint(err) != `node n1: groups: no group "c"` {
		t.Errorf("Edit: %v", err)
	}
	if err := s.Edit(t.Context(), "n1", func(n *fleet.Node) error { n.Groups[0] = "b"; n.Groups = n.Groups[:1]; return nil }); err != nil {
		t.Errorf("Edit: %v", err)
	}
	if err := s.DeleteGroup(t.Context(), "a"); err != nil {
		t.Errorf("DeleteGroup: %v", err)
	}
	s.restart()
	if all := s.Groups(); len(all) != 1 || all[0].Name != "b" {
		t.Errorf("Groups: %+v", all)
	}
	if err := s.DeleteGroup(t.Context(), "a"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("DeleteGroup: %v, want %v", err, fleet.ErrNotFound)
	}
}

// A node that no record gives a layout has that of its image.
func TestTheLayoutOfTheImage(t *testing.T) {
	const (
		label = `{"partitions":[{"name":"esp","size":"64MiB","type":"esp","fs":"vfat","mount":"/boot/efi"},{"name":"golden","size":"*","type":"linux","fs":"ext4","mount":"/"}]}`
		small = "kind: Layout\nname: small\npartitions:\n- {name: root, size: '*', type: linux, fs: ext4, mount: /}\n- {name: esp, size: 64MiB, type: esp, fs: vfat, mount: /boot/efi}\n---\n"
		node  = "kind: Node\nname: n1\nmacs: [52:54:00:00:00:01]\nimage: debian12\n"
	)
	for _, tt := range []struct {
		name, label, yaml, from string
		root                    string // name of the partition for /
	}{
		{"of the node", label, small + node + "layout: small\n", "layout small of the node's record", "root"},
		{"of a group", label, small + "kind: Group\nname: a\nlayout: small\n---\n" + node + "groups: [a]\n", "layout small of group a", "root"},
		{"of the Defaults", label, small + "kind: Defaults\nlayout: small\n---\n" + node, "layout small of the Defaults", "root"},
		{"of the image", label, small + node, "layout of image debian12:1", "golden"},
		{"of the program", "", small + node, "the program's own layout", "root"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t)
			s.layouts["debian12:1"] = tt.label
			s.apply(tt.yaml)
			token := s.hello(boots[0], mac1).Token
			_, script := s.script(token)
			i := slices.IndexFunc(script.Layout.Partitions, func(p disklayout.Partition) bool { return p.Mount == "/" })
			if i < 0 || script.Layout.Partitions[i].Name != tt.root {
				t.Errorf("script has the layout %+v", script.Layout)
			}
			if plan, err := s.Plan(t.Context(), "n1"); err != nil || plan.From != tt.from || plan.At("/").Name != tt.root {
				t.Errorf("Plan: %+v, %v, want %s", plan, err, tt.from)
			}
			if v := s.node("n1"); v.Layout != tt.from {
				t.Errorf("node has the layout %q, want %q", v.Layout, tt.from)
			}

			// What is published meanwhile changes no installation that began.
			s.newest["debian12"] = "2"
			delete(s.layouts, "debian12:1")
			s.restart()
			if _, again := s.script(s.hello(boots[0], mac1).Token); !reflect.DeepEqual(again, script) {
				t.Errorf("the script became %+v, was %+v", again, script)
			}
		})
	}
	for label, why := range map[string]string{
		"{":                          "unexpected EOF",
		`{"partitions":[],"raid":5}`: `unknown field "raid"`,
		`{"partitions":[]}`:          "layout: partitions: there are none",
	} {
		s := newSite(t)
		s.layouts["debian12:1"] = label
		s.apply(node)
		want := "node n1: image debian12:1: label rookery.layout: " + why
		if w := s.hello(boots[0], mac1); w.Do != wire.Wait || w.Why != want {
			t.Errorf("label %s: the node is told %q, want %q", label, w.Why, want)
		}
		if _, err := s.Plan(t.Context(), "n1"); fmt.Sprint(err) != want {
			t.Errorf("label %s: Plan: %v, want %s", label, err, want)
		}
		if v := s.node("n1"); "node n1: "+v.Layout != want {
			t.Errorf("label %s: node show says %q", label, v.Layout)
		}
	}
}

func TestNeeded(t *testing.T) {
	s := newSite(t)
	s.newest["debian11"] = "4"
	s.apply("kind: Defaults\nimage: debian11:3\n---\nkind: Node\nname: n1\nmacs: [52:54:00:00:00:01]\nimage: debian12\n---\nkind: Node\nname: n2\nmacs: [52:54:00:00:00:02]\ntransports: [http, rsync]\n")
	needed := func(want ...string) {
		t.Helper()
		all, err := s.Needed(t.Context())
		var got []string
		for _, n := range all {
			if n.Rsync {
				n.Why += " by rsync"
			}
			got = append(got, n.Name+": "+n.Why)
			if n.Manifest != wire.DigestOf([]byte(n.Name)) {
				t.Errorf("%s has the manifest %s", n.Name, n.Manifest)
			}
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("needed are %q, %v, want %q", got, err, want)
		}
	}
	needed("debian12:1: node n1", "debian11:3: node n2 by rsync")
	token := s.hello(boots[0], mac1).Token
	s.script(token)
	s.newest["debian12"] = "2"
	needed("debian12:1: n1 is being installed", "debian12:2: node n1", "debian11:3: node n2 by rsync")
	s.report(token, wire.Event{Boot: boots[0], Seq: 1, Phase: wire.PhaseEnd, State: wire.Finished})
	needed("debian12:2: node n1", "debian11:3: node n2 by rsync")
	delete(s.newest, "debian12")
	needed("debian11:3: node n2 by rsync")

	s.broken = errors.New("registry: connection refused")
	if _, err := s.Needed(t.Context()); !errors.Is(err, s.broken) {
		t.Errorf("Needed: %v, want %v: nothing may be taken for unneeded now", err, s.broken)
	}
}

func TestApplyRefuses(t *testing.T) {
	const before = `
kind: Layout
name: small
partitions:
- {name: root, size: "*", type: linux, fs: ext4, mount: /}
- {name: esp, size: 64MiB, type: esp, fs: vfat, mount: /boot/efi}
---
kind: Group
name: used
---
kind: Node
name: n0
groups: [used]
macs: [52:54:00:00:00:10]
uuid: 12345678-9abc-def0-1234-56789abcdef0
address: 10.0.0.10/24
image: debian12
layout: small
`
	node := func(lines ...string) string { return "kind: Node\nname: n1\n" + strings.Join(lines, "\n") }
	const mac, image = "macs: [52:54:00:00:00:01]", "image: debian12"
	for _, tt := range []struct{ name, yaml, want string }{
		{"unknown key", node(mac, "imge: debian12"), "f.yaml:4: node n1: imge: unknown key"},
		{"unknown key in a layout", "kind: Layout\nname: l\npartitions:\n- name: root\n  sise: 1MiB\n", "f.yaml:5: layout l: sise: unknown key"},
		{"all unknown keys", node("a: 1", "b: 2"), "f.yaml:3: node n1: a: unknown key\nf.yaml:4: node n1: b: unknown key"},
		{"in the second document", "---\n" + node(mac, image) + "\n---\nkind: Node\nname: n2\nfoo: bar\n", "f.yaml:9: node n2: foo: unknown key"},
		{"unknown kind", "kind: Nod\nname: n1\n", `f.yaml:1: kind: "Nod" is not one of Node, Group, Layout, Defaults`},
		{"no kind", "name: n1\n", `f.yaml:1: kind: "" is not one of Node, Group, Layout, Defaults`},
		{"not a mapping", "- a\n- b\n", "f.yaml:1: want keys and values"},
		{"no YAML", "kind: Node\nname: [\n", "f.yaml:2: did not find expected node content"},
		{"key twice", node(mac, image, image), `f.yaml:5: image: mapping key "image" already defined at line 4`},
		{"wrong type", node("macs: {a: b}"), "f.yaml:3: node n1: macs: is not a list"},
		{"wrong type of a number", node(mac, image, "seedFor: soon"), "f.yaml:5: node n1: seedFor: `soon` is not a whole number"},
		{"no name", "kind: Node\n" + mac, `f.yaml:1: node: name: "" has 0 characters, want 1 to 63`},
		{"bad host name", "kind: Node\nname: N_1\n" + mac, `f.yaml:2: node N_1: name: "N_1": want letters a-z, digits and hyphens`},
		{"nothing to know it by", node(image), "f.yaml:1: node n1: macs: missing, and there is no uuid or serial to know the machine by"},
		{"bad MAC", node("macs: [52:54]"), `f.yaml:3: node n1: macs: "52:54" is not a MAC address such as 52:54:00:12:34:56`},
		{"MAC of many", node("macs: [ff:ff:ff:ff:ff:ff]"), "f.yaml:3: node n1: macs: ff:ff:ff:ff:ff:ff is not the address of one interface"},
		{"UUID of many", node("uuid: 03000200-0400-0500-0006-000700080009"), `f.yaml:3: node n1: uuid: "03000200-0400-0500-0006-000700080009" is not a machine's own UUID such as 12345678-9abc-def0-1234-56789abcdef0`},
		{"bad CIDR", node(mac, image, "address: 10.0.0.7"), `f.yaml:5: node n1: address: "10.0.0.7" is not an address with a prefix length, such as 10.0.0.7/24`},
		{"address of the network", node(mac, image, "address: 10.0.0.0/24"), "f.yaml:5: node n1: address: 10.0.0.0/24 is not the address of one machine"},
		{"broadcast address", node(mac, image, "address: 10.0.0.255/24"), "f.yaml:5: node n1: address: 10.0.0.255/24 is not the address of one machine"},
		{"bad gateway", node(mac, image, "gateway: router"), `f.yaml:5: node n1: gateway: "router" is not an IP address`},
		{"gateway elsewhere", node(mac, image, "address: 10.0.0.7/24", "gateway: 10.0.1.1"), "f.yaml:6: node n1: gateway: 10.0.1.1 is not another machine of 10.0.0.0/24"},
		{"bad domain", node(mac, image, "domain: exa mple"), `f.yaml:5: node n1: domain: "exa mple": want letters a-z, digits and hyphens`},
		{"bad transport", node(mac, image, "transports: [pigeon]"), `f.yaml:5: node n1: transports: "pigeon" is not one of ` + strings.Join(wire.Transports, ", ")},
		{"transport twice", node(mac, image, "transports: [http, bittorrent, http]"), `f.yaml:5: node n1: transports: "http" stands twice`},
		{"transport twice for all", "kind: Defaults\ntransports: [http, http]\n", `f.yaml:2: defaults: transports: "http" stands twice`},
		{"group twice", node(mac, image, "groups: [a, a]"), `f.yaml:5: node n1: groups: "a" stands twice`},
		{"unknown group", node(mac, image, "groups: [used, b]"), `f.yaml:5: node n1: groups: no group "b"`},
		{"group without a name", "kind: Group\npriority: 1\n", `f.yaml:1: group: name: "" has 0 characters, want 1 to 63`},
		{"group with a bad name", "kind: Group\nname: a, b\n", `f.yaml:2: group a, b: name: "a, b": want letters a-z, digits and hyphens`},
		{"unknown key of a group", "kind: Group\nname: a\nmacs: []\n", `f.yaml:3: group a: macs: unknown key`},
		{"priority that is no number", "kind: Group\nname: a\npriority: high\n", "f.yaml:3: group a: priority: `high` is not a whole number"},
		{"bad transport of a group", "kind: Group\nname: a\ntransports: [pigeon]\n", `f.yaml:3: group a: transports: "pigeon" is not one of ` + strings.Join(wire.Transports, ", ")},
		{"bad limit of a group", "kind: Group\nname: a\nuploadLimit: 10%\n", `f.yaml:3: group a: uploadLimit: "10%" is not a rate: want bytes a second, such as 10MB or 512KiB, or none`},
		{"missing image of a group", "kind: Group\nname: a\nimage: debian13\n", `f.yaml:3: group a: image: "debian13": not found`},
		{"missing layout of a group", "kind: Group\nname: a\nlayout: big\n", `f.yaml:3: group a: layout: no layout "big"`},
		{"group that spoils a node", "kind: Group\nname: used\ngateway: 10.9.9.9\n", "f.yaml:3: group used: gateway: spoils node n0: 10.9.9.9 is not another machine of 10.0.0.0/24"},
		{"group twice in files", "kind: Group\nname: a\n---\nkind: Group\nname: a\n", "f.yaml:4: group a: stands in f.yaml:1 too"},
		{"bad mirror", node(mac, image, "mirrors: ['http://10.0.0.2/layers/', 'https://10.0.0.2/layers/']"), `f.yaml:5: node n1: mirrors: "https://10.0.0.2/layers/" is not the URL of layers without their digest, such as http://192.0.2.2:5000/v2/NAME/blobs/`},
		{"limit that is a share", node(mac, image, "uploadLimit: 10%"), `f.yaml:5: node n1: uploadLimit: "10%" is not a rate: want bytes a second, such as 10MB or 512KiB, or none`},
		{"limit that nothing passes", node(mac, image, "downloadLimit: 1kB"), `f.yaml:5: node n1: downloadLimit: 1000 bytes a second, want 0 or at least 16384`},
		{"bad ending", node(mac, image, "ending: kexec"), `f.yaml:5: node n1: ending: "kexec" is not one of reboot, poweroff, shell, exit`},
		{"bad boot", node(mac, image, "boot: usb"), `f.yaml:5: node n1: boot: "usb" is neither install nor local`},
		{"bad console", node(mac, image, "console: ttyS0 115200"), `f.yaml:5: node n1: console: "ttyS0 115200" is not a console such as ttyS0,115200`},
		{"missing image", node(mac, "image: debian13"), `f.yaml:4: node n1: image: "debian13": not found`},
		{"missing image of all", "kind: Defaults\nimage: debian13\n", `f.yaml:2: defaults: image: "debian13": not found`},
		{"missing layout of all", "kind: Defaults\nlayout: big\n", `f.yaml:2: defaults: layout: no layout "big"`},
		{"empty layout", "kind: Layout\nname: l\npartitions: []\n", "f.yaml:3: layout l: partitions: there are none"},
		{"address of the server", node(mac, image, "address: 10.0.0.1/24"), "f.yaml:5: node n1: address: 10.0.0.1 is the server's own"},
		{"no image", node(mac), "f.yaml:1: node n1: image: missing, and neither a group nor the Defaults name one"},
		{"missing layout", node(mac, image, "layout: big"), `f.yaml:5: node n1: layout: no layout "big"`},
		{"MAC of another node", node("macs: [52-54-00-00-00-10]", image), "f.yaml:3: node n1: macs: 52:54:00:00:00:10 is that of n0 too"},
		{"UUID of another node", node("uuid: 12345678-9ABC-def0-1234-56789abcdef0", image), "f.yaml:3: node n1: uuid: 12345678-9abc-def0-1234-56789abcdef0 is that of n0 too"},
		{"address of another node", node(mac, image, "address: 10.0.0.10/16"), "f.yaml:5: node n1: address: 10.0.0.10 is that of n0 too"},
		{"node twice", node(mac, image) + "\n---\n" + node(mac, image), "f.yaml:6: node n1: stands in f.yaml:1 too"},
		{"layout without a name", "kind: Layout\npartitions: []\n", "f.yaml:1: layout: name: missing"},
		{"Defaults with a name", "kind: Defaults\nname: x\n", "f.yaml:2: defaults: name: unknown key"},
		{"Defaults that spoil a node", "kind: Defaults\ngateway: 10.9.9.9\n", "f.yaml:2: defaults: gateway: spoils node n0: 10.9.9.9 is not another machine of 10.0.0.0/24"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t)
			s.apply(before)
			good := fleet.File{Name: "good.yaml", Data: "kind: Node\nname: n9\nmacs: [52:54:00:00:00:99]\nimage: debian12\n"}
			_, err := s.Apply(t.Context(), good, fleet.File{Name: "f.yaml", Data: tt.yaml})
			if fmt.Sprint(err) != tt.want {
				t.Errorf("Apply: %v\nwant   %s", err, tt.want)
			}
			if all := s.Nodes(); len(all) != 1 || all[0].Name != "n0" {
				t.Errorf("Apply refused and left %+v", all)
			}
		})
	}
}

func TestApplyRefusesABadLayout(t *testing.T) {
	s := newSite(t)
	_, err := s.Apply(t.Context(), fleet.File{Name: "f.yaml", Data: "kind: Layout\nname: l\n\npartitions:\n- {name: root, size: much, type: linux}\n"})
	if err == nil || !strings.HasPrefix(err.Error(), "f.yaml:4: layout l: partitions: ") {
		t.Errorf("Apply: %v, want line 4, the layout and the key", err)
	}
}

func TestTheListOfProblemsIsBounded(t *testing.T) {
	s := newSite(t)
	var yaml strings.Builder
	for n := range 50 {
		fmt.Fprintf(&yaml, "---\nkind: Node\nname: n%d\nfoo: bar\n", n)
	}
	_, err := s.Apply(t.Context(), fleet.File{Name: "f.yaml", Data: yaml.String()})
	if lines := strings.Split(fmt.Sprint(err), "\n"); len(lines) != 21 || lines[20] != "and 30 more" {
		t.Errorf("Apply: %v, want 20 problems and that there are 30 more", err)
	}
}

func TestPutEditDelete(t *testing.T) {
	s := newSite(t)
	s.apply(oneNode)
	domain := func(d string) func(*fleet.Node) error {
		return func(n *fleet.Node) error { n.Domain = d; return nil }
	}
	if err := s.Edit(t.Context(), "n1", domain("example.org")); err != nil || s.node("n1").Record.Domain != "example.org" {
		t.Errorf("Edit: %v, %+v", err, s.node("n1").Record)
	}
	err := s.Edit(t.Context(), "n1", domain("-"))
	if want := `node n1: domain: "-" begins or ends with a hyphen`; fmt.Sprint(err) != want {
		t.Errorf("Edit: %v, want %s", err, want)
	}
	if err := s.Edit(t.Context(), "n2", domain("")); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("Edit: %v, want %v", err, fleet.ErrNotFound)
	}
	if err := s.Edit(t.Context(), "n1", func(n *fleet.Node) error { n.Name = "n2"; return nil }); err == nil {
		t.Error("Edit gave a node another name")
	}
	if err := s.Put(t.Context(), fleet.Node{Name: "n2", MACs: []string{mac2}, Boot: wire.Local}); err != nil || s.node("n2").Next != wire.Local {
		t.Errorf("Put: %v, %+v", err, s.node("n2"))
	}
	if err := s.Install(t.Context(), "n2"); !errors.Is(err, fleet.ErrConflict) || !strings.Contains(err.Error(), "image: missing") {
		t.Errorf("Install without an image: %v", err)
	}
	token := s.hello(boots[0], mac1).Token
	if err := s.Delete(t.Context(), "n1"); err != nil {
		t.Fatalf("Delete: %v", err)
	}
	if err := s.Report(t.Context(), token, nil); !errors.Is(err, fleet.ErrToken) {
		t.Errorf("Report of a deleted node: %v, want %v", err, fleet.ErrToken)
	}
	s.restart()
	if _, err := s.Node(t.Context(), "n1"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("Node: %v, want %v", err, fleet.ErrNotFound)
	}
	s.apply(oneNode)
	if v := s.node("n1"); v.Inventory != nil || v.Boots != nil {
		t.Errorf("a node that was deleted comes back with its past: %+v", v)
	}
	for _, err := range []error{s.Delete(t.Context(), "n7"), s.Install(t.Context(), "n7")} {
		if !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("%v, want %v", err, fleet.ErrNotFound)
		}
	}
}

func TestANodeWhoseImageIsGoneWaits(t *testing.T) {
	s := newSite(t)
	s.apply(oneNode)
	delete(s.newest, "debian12")
	w := s.hello(boots[0], mac1)
	if w.Do != wire.Wait || w.Why != `node n1: image: "debian12": not found` {
		t.Errorf("hello: %+v, want to wait for the image", w)
	}
	s.newest["debian12"] = "1"
	if w := s.hello(boots[0], mac1); w.Do != wire.Install {
		t.Errorf("hello: %+v, want to install", w)
	}
}

func TestPlanNeedsAHello(t *testing.T) {
	s := newSite(t)
	s.apply(oneNode)
	_, err := s.Plan(t.Context(), "n1")
	if !errors.Is(err, fleet.ErrConflict) || !strings.Contains(err.Error(), "never said hello") {
		t.Errorf("Plan: %v, want that the machine never said hello", err)
	}
}

func TestReportRefusesForeignEvents(t *testing.T) {
	s := newSite(t)
	s.apply(oneNode)
	token := s.hello(boots[0], mac1).Token
	for _, err := range []error{
		s.Report(t.Context(), token+"x", nil),
		s.Report(t.Context(), token, []wire.Event{event(boots[1], 1, wire.PhaseEnd, wire.Finished)}),
	} {
		if !errors.Is(err, fleet.ErrToken) {
			t.Errorf("Report: %v, want %v", err, fleet.ErrToken)
		}
	}
}

func TestEventsTellTheStoryAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.apply(oneNode + "---\nkind: Node\nname: n2\nmacs: [52:54:00:00:00:02]\nimage: debian12\n")
		one, two := s.hello(boots[0], mac1), s.hello(boots[1], mac2)
		story := func(node string, after int64) (lines []string, last int64, more <-chan struct{}) {
			events, more := s.Events(node, after)
			for _, e := range events {
				lines = append(lines, fmt.Sprintf("%s %s %s", e.Node, e.Phase, e.State))
				last = e.N
			}
			return lines, last, more
		}
		s.report(one.Token, event(boots[0], 1, wire.PhasePlan, wire.Started))
		s.report(two.Token, event(boots[1], 1, wire.PhasePlan, wire.Started))
		s.report(one.Token,
			event(boots[0], 2, wire.PhaseFetch, wire.Progress),
			event(boots[0], 3, wire.PhaseFetch, wire.Progress))
		want := []string{"n1 plan started", "n2 plan started", "n1 fetch progress"}
		got, last, more := story("", 0)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("Events: %q, want %q", got, want)
		}
		if got, _, _ := story("n2", 0); !reflect.DeepEqual(got, want[1:2]) {
			t.Errorf("Events of n2: %q, want %q", got, want[1:2])
		}
		select {
		case <-more:
			t.Error("there is more, and nothing happened")
		default:
		}

		s.restart()
		if got, _, _ := story("", 0); !reflect.DeepEqual(got, want[:2]) {
			t.Errorf("Events after a restart: %q, want %q", got, want[:2])
		}
		time.Sleep(time.Second) // the bubble's: restarts take time
		_, _, more = story("", last)
		s.report(one.Token, event(boots[0], 4, wire.PhaseFetch, wire.Finished))
		<-more
		if got, _, _ := story("", last); !reflect.DeepEqual(got, []string{"n1 fetch finished"}) {
			t.Errorf("Events after the last one heard before the restart: %q", got)
		}
	})
}

func TestWhatCannotBeSavedDidNotHappen(t *testing.T) {
	s := newSite(t)
	s.apply(oneNode + "---\nkind: Group\nname: idle\n")
	full := &fullStore{Store: s.store}
	s.store = full
	s.restart()
	token := s.hello(boots[0], mac1).Token
	s.script(token)
	full.full = true
	fails := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, errFull) {
			t.Errorf("%s: %v, want %v", what, err, errFull)
		}
	}
	e := event(boots[0], 1, wire.PhaseEnd, wire.Finished)
	fails("Report", s.Report(t.Context(), token, []wire.Event{e}))
	fails("Install", s.Install(t.Context(), "n1"))
	fails("Delete", s.Delete(t.Context(), "n1"))
	fails("DeleteGroup", s.DeleteGroup(t.Context(), "idle"))
	fails("Put", s.Put(t.Context(), fleet.Node{Name: "n2", MACs: []string{mac2}, Boot: wire.Local}))
	_, err := s.Hello(t.Context(), hello(boots[1], mac1))
	fails("Hello", err)
	if v := s.node("n1"); v.Next != wire.Install || v.Phases != nil || len(v.Boots) != 1 || len(s.Nodes()) != 1 {
		t.Errorf("what was not saved is shown: %+v", v)
	}
	full.full = false
	s.report(token, e) // the agent tries again
	if v := s.node("n1"); v.Next != wire.Local {
		t.Errorf("the event that was repeated had no effect: %+v", v)
	}
}

var errFull = errors.New("no space left on device")

type fullStore struct {
	store.Store
	full bool
}

func (s *fullStore) Put(ctx context.Context, records ...store.Record) (uint64, error) {
	if s.full {
		return 0, errFull
	}
	return s.Store.Put(ctx, records...)
}

func FuzzApply(f *testing.F) {
	for _, seed := range []string{
		oneNode, "kind: Layout\nname: a\npartitions: [&a {name: x}, *a]\n", "kind: Defaults\n<<: {domain: x}\n",
		"kind: Group\nname: g\npriority: 3\ntransports: [http]\n---\n" + oneNode + "groups: [g]\n",
		"a: &a [*a]\n", "---\n---\n...\n", "kind: Node\nkind: Node\n", "\xff", "kind: Node\nname: n1\nmacs: &m [*m]\n", "? [a]\n: b\n",
		"kind: Node\nname: n1\nserial: s\nboot: local\naddress: ::ffff:1.2.3.4/96\ngateway: 1.2.3.4\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, yaml string) {
		s := newSite(t)
		_, err := s.Apply(t.Context(), fleet.File{Name: "f.yaml", Data: yaml})
		var problems fleet.Problems
		if err != nil && !errors.As(err, &problems) {
			t.Fatalf("Apply: %v, want Problems", err)
		}
		if err != nil && len(s.Nodes()) > 0 {
			t.Fatalf("Apply: %v, and there are nodes", err)
		}
		s.restart() // what was saved can be read
		for _, v := range s.Nodes() {
			for _, mac := range append(v.Record.MACs, mac1) {
				s.Host(mac, v.Record.UUID)
			}
		}
	})
}

// FuzzHello sends any hello to a fleet with a node that can be installed.
func FuzzHello(f *testing.F) {
	f.Add([]byte(`{"boot":"` + boots[0] + `","inventory":{"firmware":"bios","arch":"amd64","nics":[{"name":"a","mac":"` + mac1 + `"}],"disks":[]}}`))
	f.Add([]byte(`{"boot":"` + boots[0] + `","inventory":{"firmware":"uefi","uuid":"` + uuid + `","nics":[{"mac":"` + mac2 + `"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := wire.DecodeHello(b)
		if err != nil {
			return
		}
		s := newSite(t)
		s.apply(oneNode)
		w, err := s.Hello(t.Context(), h)
		if err != nil {
			t.Fatalf("Hello: %v", err)
		}
		if w.Do == wire.Install {
			s.script(w.Token)
		}
		s.Plan(t.Context(), "n1")
		if len(s.Nodes()) > 2 {
			t.Fatalf("one hello made %d nodes", len(s.Nodes()))
		}
	})
}

func TestAliasesDoNotMultiply(t *testing.T) {
	var yaml strings.Builder
	yaml.WriteString("kind: Layout\nname: a\nx: &p {")
	for n := range 2000 {
		fmt.Fprintf(&yaml, "k%d: 1, ", n)
	}
	yaml.WriteString("}\npartitions: [" + strings.Repeat("*p, ", 2000) + "]\n")
	s := newSite(t)
	_, err := s.Apply(t.Context(), fleet.File{Name: "f.yaml", Data: yaml.String()})
	if err == nil || !strings.Contains(err.Error(), "excessive aliasing") {
		t.Errorf("Apply: %.300v, want a word about aliases", err)
	}
}

// What the race detector has to see: everybody at once.
func TestEverybodyAtOnce(t *testing.T) {
	s := newSite(t)
	const nodes = 8
	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := map[string]bool{}
	watcher := make(chan struct{})
	go func() {
		defer close(watcher)
		for after := int64(0); len(ended) < nodes; {
			events, more := s.Events("", after)
			for _, e := range events {
				if after = e.N; e.Phase == wire.PhaseEnd {
					ended[e.Node] = true
				}
			}
			if len(events) > 0 {
				continue
			}
			select {
			case <-more:
			case <-ctx.Done():
				return
			}
		}
	}()
	for i := range nodes {
		wg.Go(func() {
			name, mac, boot := fmt.Sprintf("n%d", i), fmt.Sprintf("52:54:00:00:01:%02x", i), fmt.Sprintf("%032x", i)
			s.hello(boot, mac)
			if err := s.Accept(t.Context(), mac, fleet.Node{Name: name, Settings: fleet.Settings{Image: "debian12"}}); err != nil {
				t.Errorf("Accept: %v", err)
				return
			}
			token := s.hello(boot, mac).Token
			s.script(token)
			for seq := 1; seq < 20; seq++ {
				s.report(token, event(boot, seq, wire.PhaseFetch, wire.Progress))
				s.Nodes()
				s.Host(mac, "")
			}
			s.Plan(t.Context(), name)
			s.Edit(t.Context(), name, func(n *fleet.Node) error { n.Domain = "example.org"; return nil })
			s.report(token, event(boot, 20, wire.PhaseEnd, wire.Finished))
		})
	}
	wg.Wait()
	<-watcher // which heard of every end
	for _, v := range s.Nodes() {
		if v.Next != wire.Local || v.Record.Domain != "example.org" {
			t.Errorf("%s: %+v", v.Name, v)
		}
	}
}

func TestANewMachineIsShownByItsMAC(t *testing.T) {
	s := newSite(t)
	s.hello(boots[0], mac1, mac2)
	for _, mac := range []string{mac1, "52-54-00-00-00-02"} {
		if v, err := s.Node(t.Context(), mac); err != nil || !v.New || v.MAC != mac1 {
			t.Errorf("Node(%s): %+v, %v", mac, v, err)
		}
	}
	if err := s.Accept(t.Context(), mac1, fleet.Node{Name: "n1", Settings: fleet.Settings{Image: "debian12"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Node(t.Context(), mac1); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("Node of a machine that was accepted: %v", err)
	}
	err := s.Accept(t.Context(), mac1, fleet.Node{Name: "n2", Settings: fleet.Settings{Image: "debian12"}})
	if want := "accept: " + mac1 + " is node n1 already"; !errors.Is(err, fleet.ErrConflict) || err.Error() != want {
		t.Errorf("Accept for the second time: %v, want %s", err, want)
	}
}
