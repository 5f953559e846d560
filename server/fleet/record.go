package fleet

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"rookery/disklayout"
	"rookery/image/oci"
	"rookery/wire"
)

// A Node is the record of one machine: how it is known, and what it is to be.
type Node struct {
	Name string `json:"name" yaml:"name"` // also its host name

	// A machine is known by the MAC address of any of its interfaces, else by
	// its SMBIOS UUID, else by its serial number. The first MAC address is that
	// of the interface which gets Address.
	MACs   []string `json:"macs,omitempty" yaml:"macs,omitempty"`
	UUID   string   `json:"uuid,omitempty" yaml:"uuid,omitempty"`
	Serial string   `json:"serial,omitempty" yaml:"serial,omitempty"`

	Address string `json:"address,omitempty" yaml:"address,omitempty"` // "10.0.0.7/24"; "" means DHCP

	// Boot is what the machine's next start from the network does: install or
	// local; "" is install for a new record. It counts when it changes: a node
	// that is installed stays so, however often its record is applied.
	Boot wire.Do `json:"boot,omitempty" yaml:"boot,omitempty"`

	Groups []string `json:"groups,omitempty" yaml:"groups,omitempty"` // names of Group records

	Settings `yaml:",inline"`
}

// A Group is settings that some nodes share. Where a node's groups differ, that
// with the highest Priority counts; of equal ones that which the node names first.
type Group struct {
	Name     string `json:"name" yaml:"name"`
	Priority int    `json:"priority,omitempty" yaml:"priority,omitempty"`

	Settings `yaml:",inline"`
}

// Settings are what nodes can share; what a node leaves out comes from its
// groups, then from the Defaults record, and then from the program.
type Settings struct {
	Image          string      `json:"image,omitempty" yaml:"image,omitempty"`   // "debian12", "debian12:1"
	Layout         string      `json:"layout,omitempty" yaml:"layout,omitempty"` // name of a Layout record
	Gateway        string      `json:"gateway,omitempty" yaml:"gateway,omitempty"`
	Nameservers    []string    `json:"nameservers,omitempty" yaml:"nameservers,omitempty"`
	Domain         string      `json:"domain,omitempty" yaml:"domain,omitempty"`
	AuthorizedKeys []string    `json:"authorizedKeys,omitempty" yaml:"authorizedKeys,omitempty"` // root's
	KernelArgs     string      `json:"kernelArgs,omitempty" yaml:"kernelArgs,omitempty"`
	Console        string      `json:"console,omitempty" yaml:"console,omitempty"` // serial, "ttyS0,115200"
	Rack           string      `json:"rack,omitempty" yaml:"rack,omitempty"`       // "r07"
	Transports     []string    `json:"transports,omitempty" yaml:"transports,omitempty"`
	Mirrors        []string    `json:"mirrors,omitempty" yaml:"mirrors,omitempty"`         // "http://192.0.2.2:5000/v2/NAME/blobs/"
	UploadLimit    string      `json:"uploadLimit,omitempty" yaml:"uploadLimit,omitempty"` // "10MB" a second, "none"
	DownloadLimit  string      `json:"downloadLimit,omitempty" yaml:"downloadLimit,omitempty"`
	MulticastRate  string      `json:"multicastRate,omitempty" yaml:"multicastRate,omitempty"` // "10MB" a second: nodes that say the same have a sender of their own
	SeedFor        *int        `json:"seedFor,omitempty" yaml:"seedFor,omitempty"`             // seconds
	Ending         wire.Ending `json:"ending,omitempty" yaml:"ending,omitempty"`
	OnFailure      wire.Ending `json:"onFailure,omitempty" yaml:"onFailure,omitempty"`
}

// over fills what s leaves out from d.
func (s Settings) over(d Settings) Settings {
	word := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	list := func(s *[]string, d []string) {
		if len(*s) == 0 {
			*s = d
		}
	}
	word(&s.Image, d.Image)
	word(&s.Layout, d.Layout)
	word(&s.Gateway, d.Gateway)
	list(&s.Nameservers, d.Nameservers)
	word(&s.Domain, d.Domain)
	list(&s.AuthorizedKeys, d.AuthorizedKeys)
	word(&s.KernelArgs, d.KernelArgs)
	word(&s.Console, d.Console)
	word(&s.Rack, d.Rack)
	list(&s.Transports, d.Transports)
	list(&s.Mirrors, d.Mirrors)
	word(&s.UploadLimit, d.UploadLimit)
	word(&s.DownloadLimit, d.DownloadLimit)
	word(&s.MulticastRate, d.MulticastRate)
	if s.SeedFor == nil {
		s.SeedFor = d.SeedFor
	}
	word((*string)(&s.Ending), string(d.Ending))
	word((*string)(&s.OnFailure), string(d.OnFailure))
	return s
}

// program is what nobody needs to say.
var program = Settings{
	Transports: []string{"bittorrent", "http"},
	SeedFor:    new(60),
	Ending:     wire.Reboot,
	OnFailure:  wire.Shell,
}

// records are all that was declared. The maps are never changed once others
// can see them.
type records struct {
	nodes    map[string]Node
	groups   map[string]Group
	layouts  map[string]disklayout.Layout
	defaults Settings

	server netip.Addr // its own address; zero when it is not known
}

// A level is what one record says of a node, or the program.
type level struct {
	of string // "the node's record", "group compute", "the Defaults", "the program"
	Settings
}

// levels are all that have a say in n's settings. What an earlier one says counts.
func (r records) levels(n Node) []level {
	all := []level{{"the node's record", n.Settings}}
	for _, g := range r.groupsOf(n) {
		all = append(all, level{"group " + g.Name, g.Settings})
	}
	return append(all, level{"the Defaults", r.defaults}, level{"the program", program})
}

// groupsOf are n's groups by priority, the highest first.
func (r records) groupsOf(n Node) []Group {
	var all []Group
	for _, name := range n.Groups {
		if g, ok := r.groups[name]; ok {
			all = append(all, g)
		}
	}
	slices.SortStableFunc(all, func(a, b Group) int { return cmp.Compare(b.Priority, a.Priority) })
	return all
}

func (r records) settings(n Node) Settings {
	s := n.Settings
	for _, g := range r.groupsOf(n) {
		s = s.over(g.Settings)
	}
	return s.over(r.defaults).over(program)
}

// A Setting is the value of one key of a node's settings, and who says so.
type Setting struct {
	Key   string `json:"key"` // as in records
	Value any    `json:"value"`
	From  string `json:"from"` // "the node's record", "group compute", "the Defaults", "the program"
}

// settingsFrom are n's settings in the order in which records have them.
func (r records) settingsFrom(n Node) []Setting {
	var all []Setting
	levels, keys := r.levels(n), reflect.TypeFor[Settings]()
	for i := range keys.NumField() {
		for _, l := range levels {
			if v := reflect.ValueOf(l.Settings).Field(i); said(v) {
				key, _, _ := strings.Cut(keys.Field(i).Tag.Get("json"), ",")
				all = append(all, Setting{key, v.Interface(), l.of})
				break
			}
		}
	}
	return all
}

// said is whether a value of Settings says anything: an empty list does not.
func said(v reflect.Value) bool {
	return !v.IsZero() && (v.Kind() != reflect.Slice || v.Len() > 0)
}

// layoutOf is the layout for a node with an image, and where it comes from: a
// record, the image, or the program.
func (r records) layoutOf(n Node, image Image) (l disklayout.Layout, from string, err error) {
	for _, level := range r.levels(n) {
		if level.Layout != "" {
			l, err = r.layout(level.Layout)
			return l, fmt.Sprintf("layout %s of %s", level.Layout, level.of), err
		}
	}
	if image.Layout != "" {
		if err = wire.Strict([]byte(image.Layout), &l); err == nil {
			err = l.Check()
		}
		if err != nil {
			return l, "", fmt.Errorf("image %s: label %s: %w", image.Name, oci.LabelLayout, err)
		}
		return l, "layout of image " + image.Name, nil
	}
	return disklayout.Default(), "the program's own layout", nil
}

// layout is the Layout record of that name.
func (r records) layout(name string) (disklayout.Layout, error) {
	l, ok := r.layouts[name]
	if !ok {
		return l, bad("layout", "no layout %q", name)
	}
	return l, nil
}

// checkLayout says that there is no such layout; "" is for none.
func (r records) checkLayout(name string) error {
	if name == "" {
		return nil
	}
	_, err := r.layout(name)
	return err
}

// A keyError is a reason with the key of the record that it is about.
type keyError struct {
	key string
	err error
}

func (e *keyError) Error() string { return e.key + ": " + e.err.Error() }
func (e *keyError) Unwrap() error { return e.err }

func bad(key, format string, args ...any) error { return &keyError{key, fmt.Errorf(format, args...)} }

// normal writes the addresses of n in their one form, where they have one.
func (n Node) normal() Node {
	macs := make([]string, len(n.MACs))
	for i, m := range n.MACs {
		macs[i] = normalMAC(m)
	}
	n.MACs = macs
	n.UUID = strings.ToLower(n.UUID)
	return n
}

// clone is n with lists of its own.
func (n Node) clone() Node {
	n.MACs = slices.Clone(n.MACs)
	n.Groups = slices.Clone(n.Groups)
	n.Nameservers = slices.Clone(n.Nameservers)
	n.AuthorizedKeys = slices.Clone(n.AuthorizedKeys)
	n.Transports = slices.Clone(n.Transports)
	n.Mirrors = slices.Clone(n.Mirrors)
	if n.SeedFor != nil {
		n.SeedFor = new(*n.SeedFor)
	}
	return n
}

func normalMAC(s string) string {
	if mac, err := net.ParseMAC(s); err == nil {
		return mac.String()
	}
	return s
}

// check says what is wrong with n by itself.
func (n Node) check() error {
	if err := wire.CheckHostname(n.Name); err != nil {
		return &keyError{"name", err}
	}
	if len(n.MACs) == 0 && n.UUID == "" && n.Serial == "" {
		return bad("macs", "missing, and there is no uuid or serial to know the machine by")
	}
	for _, m := range n.MACs {
		mac, err := net.ParseMAC(m)
		if err != nil || len(mac) != 6 {
			return bad("macs", "%.80q is not a MAC address such as 52:54:00:12:34:56", m)
		}
		if mac[0]&1 != 0 || bytes.Equal(mac, make([]byte, 6)) {
			return bad("macs", "%s is not the address of one interface", m)
		}
	}
	if n.UUID != "" && !usableUUID(n.UUID) {
		return bad("uuid", "%.80q is not a machine's own UUID such as 12345678-9abc-def0-1234-56789abcdef0", n.UUID)
	}
	switch n.Boot {
	case "", wire.Install, wire.Local:
	default:
		return bad("boot", "%.80q is neither install nor local", string(n.Boot))
	}
	if n.Address != "" {
		p, err := netip.ParsePrefix(n.Address)
		if err != nil {
			return bad("address", "%.80q is not an address with a prefix length, such as 10.0.0.7/24", n.Address)
		}
		if !hostIn(p) {
			return bad("address", "%s is not the address of one machine", n.Address)
		}
	}
	for i, name := range n.Groups {
		if slices.Contains(n.Groups[:i], name) {
			return bad("groups", "%.80q stands twice", name)
		}
	}
	return n.Settings.check()
}

// check says what is wrong with g by itself.
func (g Group) check() error {
	if err := wire.CheckHostname(g.Name); err != nil { // as the nodes' names are
		return &keyError{"name", err}
	}
	return g.Settings.check()
}

// usableUUID says whether s has the form of a UUID and is not one of those
// that boards without one of their own show.
func usableUUID(s string) bool {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	return err == nil && len(b) == 16 && len(s) == 36 &&
		!bytes.Equal(b, bytes.Repeat([]byte{0}, 16)) &&
		!bytes.Equal(b, bytes.Repeat([]byte{0xff}, 16)) &&
		s != "03000200-0400-0500-0006-000700080009" // AMI's sample, on many boards of many makers
}

// hostIn says whether p is an address that one machine can have.
func hostIn(p netip.Prefix) bool {
	a := p.Addr()
	if !a.IsGlobalUnicast() {
		return false
	}
	if !a.Is4() || p.Bits() > 30 { // RFC 3021: a /31 has no network and no broadcast address
		return true
	}
	next := a.Next()
	return a != p.Masked().Addr() && next.IsValid() && p.Contains(next) // the broadcast address is the last one
}

// check says what is wrong with s by itself: what the agent would refuse.
func (s Settings) check() error {
	if s.Gateway != "" {
		if _, err := netip.ParseAddr(s.Gateway); err != nil {
			return bad("gateway", "%.80q is not an IP address", s.Gateway)
		}
	}
	if err := checkRack(s.Rack); err != nil {
		return err
	}
	for _, limit := range []struct{ key, rate string }{{"uploadLimit", s.UploadLimit}, {"downloadLimit", s.DownloadLimit}, {"multicastRate", s.MulticastRate}} {
		if _, err := wire.ParseRate(limit.rate); err != nil {
			return &keyError{limit.key, err}
		}
	}
	probe := render(Node{Name: "x", Settings: s.over(program)}, disklayout.Default(),
		Status{ID: strings.Repeat("0", 32)}, wire.Image{Name: "x", Manifest: wire.DigestOf(nil)})
	return recordKey(probe.Check())
}

// recordKey turns an error of a script into one of the record it comes from.
func recordKey(err error) error {
	if err == nil {
		return nil
	}
	key, reason, ok := strings.Cut(strings.TrimPrefix(err.Error(), "identity."), ": ")
	if !ok {
		return err
	}
	if record, ok := map[string]string{
		"serial": "console", "hostname": "name", "network": "address", "image.manifest": "image", "image.name": "image",
	}[key]; ok {
		key = record
	}
	return &keyError{key, errors.New(reason)}
}

// checkShared says what the settings of many nodes name that is not there.
func (r records) checkShared(ctx context.Context, s Settings, images Images) error {
	if err := r.checkLayout(s.Layout); err != nil {
		return err
	}
	return images.check(ctx, s.Image)
}

// check says of a record's image that it is not there.
func (images Images) check(ctx context.Context, name string) error {
	if name == "" {
		return nil
	}
	if _, err := images(ctx, name); err != nil {
		return noImage(err)
	}
	return nil
}

// noImage is err, which begins with the word image in the store's mouth.
func noImage(err error) error {
	return bad("image", "%s", strings.TrimPrefix(err.Error(), "image "))
}

// checkNode says what is wrong with a node among all records. What is wrong
// between two nodes is said of both.
func (r records) checkNode(ctx context.Context, n Node, ids index, images Images) error {
	for _, id := range n.ids() {
		for _, other := range ids[id] {
			if other != n.Name {
				return bad(id.key, "%s is that of %s too", id.value, other)
			}
		}
	}
	for _, name := range n.Groups {
		if _, ok := r.groups[name]; !ok {
			return bad("groups", "no group %.80q", name)
		}
	}
	s := r.settings(n)
	if err := r.checkLayout(s.Layout); err != nil {
		return err
	}
	if s.Image == "" && n.Boot != wire.Local {
		return bad("image", "missing, and neither a group nor the Defaults name one")
	}
	if err := images.check(ctx, s.Image); err != nil {
		return err
	}
	if p, err := netip.ParsePrefix(n.Address); err == nil && p.Addr() == r.server {
		return bad("address", "%s is the server's own", p.Addr())
	}
	if n.Address != "" && s.Gateway != "" {
		p, gw := netip.MustParsePrefix(n.Address), netip.MustParseAddr(s.Gateway)
		if !p.Contains(gw) || gw == p.Addr() {
			return bad("gateway", "%s is not another machine of %s", gw, p.Masked())
		}
	}
	return nil
}
