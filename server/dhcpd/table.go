package dhcpd

import (
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"rookery/boot/netboot"
)

// A table is everything the server knows; it is owned by Run's loop.
type table struct {
	pools []*pool
	local *pool // of the server's own link
	site  netboot.Site
	hosts Hosts
}

func newTable(subnets []Subnet, site netboot.Site, hosts Hosts, leases []Lease) (*table, error) {
	if hosts == nil {
		hosts = nobody{}
	}
	t := &table{site: site, hosts: hosts}
	if !site.Server.Is4() {
		return nil, fmt.Errorf("server address %s: want IPv4", site.Server)
	}
	for _, s := range subnets {
		if other := t.pool(s.Prefix.Addr()); other != nil {
			return nil, fmt.Errorf("subnet %s: overlaps %s", s.Prefix, other.Prefix)
		}
		p, err := newPool(s)
		if err != nil {
			return nil, err
		}
		p.reserve(site.Server)
		t.pools = append(t.pools, p)
	}
	if t.local = t.pool(site.Server); t.local == nil {
		return nil, fmt.Errorf("server address %s: in none of the subnets", site.Server)
	}
	// The oldest first: should a machine have had two addresses, the newer wins.
	leases = slices.SortedFunc(slices.Values(leases), func(a, b Lease) int { return a.Expires.Compare(b.Expires) })
	for _, l := range leases {
		p := t.pool(l.Addr)
		if p == nil {
			continue // of a subnet there used to be
		}
		if i, ok := p.index(l.Addr); ok {
			p.set(i, l.MAC, l.Expires, false)
		}
	}
	return t, nil
}

// pool is the subnet of addr, or nil.
func (t *table) pool(addr netip.Addr) *pool {
	for _, p := range t.pools {
		if p.Prefix.Contains(addr) {
			return p
		}
	}
	return nil
}

type nobody struct{}

func (nobody) ByMAC(string) (Host, bool)      { return Host{}, false }
func (nobody) ByAddr(netip.Addr) (Host, bool) { return Host{}, false }

// An outcome is what is to be done about one packet.
type outcome struct {
	reply *dhcpv4.DHCPv4 // nil: be silent
	to    *net.UDPAddr
	lease *Lease // to be kept before the reply is sent
	relay string // that an acknowledged machine is behind; "": none

	// For the log.
	level slog.Level
	mac   string
	did   string
	addr  netip.Addr
	boot  string
	why   string
}

// A client is one request with what follows from it alone.
type client struct {
	req    *dhcpv4.DHCPv4
	now    time.Time
	mac    string
	host   Host
	pool   *pool
	self   netip.Addr // our server identifier on this path
	want   netip.Addr // option 50
	server netip.Addr // option 54
	ciaddr netip.Addr
	giaddr netip.Addr
}

// answer decides what becomes of a packet, and keeps t in step.
//
// Machines are told apart by MAC alone, not by option 61 (RFC 2131, 4.2): ROM,
// iPXE, agent and the installed system each invent another client identifier,
// and the machine would use up one address per stage of its boot.
func (t *table) answer(req *dhcpv4.DHCPv4, now time.Time) outcome {
	c := client{
		req:    req,
		now:    now,
		self:   t.site.Server,
		want:   optionAddr(req.Options, dhcpv4.OptionRequestedIPAddress),
		server: optionAddr(req.Options, dhcpv4.OptionServerIdentifier),
		ciaddr: headerAddr(req.ClientIPAddr),
		giaddr: headerAddr(req.GatewayIPAddr),
	}
	var err error
	c.mac, err = netboot.ParseMAC(req.ClientHWAddr.String())
	if err != nil || req.OpCode != dhcpv4.OpcodeBootRequest || req.HWType != iana.HWTypeEthernet {
		return c.ignore("not a request of an Ethernet machine")
	}
	// RFC 3527 and 5107: a relay may say that its own address is not on the
	// client's link, and that the client is to talk to the relay.
	link := c.giaddr
	if relay := req.RelayAgentInfo(); relay != nil && c.giaddr.IsValid() {
		if a := optionAddr(relay.Options, dhcpv4.LinkSelectionSubOption); a.IsValid() {
			link = a
		}
		if a := optionAddr(relay.Options, dhcpv4.ServerIdentifierOverrideSubOption); a.IsValid() {
			c.self = a
		}
	}
	switch {
	case link.IsValid():
		c.pool = t.pool(link)
	case c.ciaddr.IsValid() && t.pool(c.ciaddr) != nil: // renewing, past the relay
		c.pool = t.pool(c.ciaddr)
	default:
		c.pool = t.local
	}
	if c.pool == nil {
		return c.ignore("no subnet for relay " + link.String())
	}
	c.host, _ = t.hosts.ByMAC(c.mac)

	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return t.discover(c)
	case dhcpv4.MessageTypeRequest:
		return t.request(c)
	case dhcpv4.MessageTypeDecline:
		return t.decline(c)
	case dhcpv4.MessageTypeRelease:
		return t.release(c)
	case dhcpv4.MessageTypeInform:
		if !c.pool.Prefix.Contains(c.ciaddr) {
			return c.ignore("inform from " + c.ciaddr.String() + ", which is on none of the subnets")
		}
		return t.reply(c, dhcpv4.MessageTypeAck, netip.Addr{})
	}
	return c.ignore("message type " + req.MessageType().String())
}

func (t *table) discover(c client) outcome {
	if addr, ok := t.fixed(c); ok {
		return t.reply(c, dhcpv4.MessageTypeOffer, addr)
	}
	i, ok := c.pool.choose(c.mac, c.want, c.now, t.barred(c))
	if !ok {
		o := c.ignore("no address free in " + c.pool.Prefix.String())
		o.level = slog.LevelWarn
		return o
	}
	if s := c.pool.slots[i]; s.mac != c.mac || !s.held(c.now) {
		c.pool.set(i, c.mac, c.now.Add(offerTime), true)
	}
	return t.reply(c, dhcpv4.MessageTypeOffer, c.pool.addr(i))
}

// request sorts out the four kinds of DHCPREQUEST, by RFC 2131, 4.3.2.
func (t *table) request(c client) outcome {
	mine, had := c.pool.byMAC[c.mac]
	switch {
	case c.server.IsValid(): // SELECTING
		if c.server != c.self {
			if had && c.pool.slots[mine].offered {
				c.pool.slots[mine] = slot{}
				delete(c.pool.byMAC, c.mac)
			}
			return c.ignore("took the offer of " + c.server.String())
		}
		return t.grant(c, c.want, false)

	case !c.ciaddr.IsValid(): // INIT-REBOOT
		if !c.pool.Prefix.Contains(c.want) {
			return t.nak(c, "on another network")
		}
		_, fixed := t.fixed(c)
		if !fixed && !had {
			return c.ignore("never heard of this client") // as the RFC wants it
		}
		if !fixed && c.pool.addr(mine) != c.want {
			return t.nak(c, "has "+c.pool.addr(mine).String())
		}
		return t.grant(c, c.want, false)
	}
	return t.grant(c, c.ciaddr, true) // RENEWING, REBINDING
}

// grant gives addr to c, or says why not. An offer to somebody else does not
// stand in the way: the first to ask for the address gets it, so that machines
// that never take what they are offered cannot keep out those that do.
func (t *table) grant(c client, addr netip.Addr, renew bool) outcome {
	fixed, ok := t.fixed(c)
	if ok && addr == fixed {
		return t.reply(c, dhcpv4.MessageTypeAck, addr)
	}
	i, pooled := c.pool.index(addr)
	switch {
	case !pooled:
		return t.nak(c, "not an address of the pool")
	case t.barred(c)(addr):
		return t.nak(c, "is the fixed address of another machine")
	}
	s := c.pool.slots[i]
	switch {
	case s.held(c.now) && s.mac != c.mac:
		return t.nak(c, "is in use by another machine")
	case ok && !(renew && s.mac == c.mac && s.held(c.now)):
		// A machine that got its fixed address while it runs on one of the pool
		// moves when it next starts: an installation is not to lose its network.
		return t.nak(c, "has the fixed address "+fixed.String())
	}
	expires := c.now.Add(c.pool.Lease)
	c.pool.set(i, c.mac, expires, false)
	o := t.reply(c, dhcpv4.MessageTypeAck, addr)
	o.lease = &Lease{Addr: addr, MAC: c.mac, Expires: expires}
	return o
}

func (t *table) decline(c client) outcome {
	o := c.ignore("found it in use")
	o.did, o.addr, o.level = "declined", c.want, slog.LevelWarn
	i, ok := c.pool.index(c.want)
	if c.server != c.self || !ok || c.pool.slots[i].mac != c.mac {
		// A fixed address is the operator's word: it is told, and stays.
		return o
	}
	expires := c.now.Add(declineTime)
	c.pool.set(i, "", expires, false)
	o.lease = &Lease{Addr: c.want, Expires: expires}
	return o
}

func (t *table) release(c client) outcome {
	i, ok := c.pool.index(c.ciaddr)
	if c.server != c.self || !ok || c.pool.slots[i].mac != c.mac {
		return c.ignore("release of " + c.ciaddr.String() + ", which it has not")
	}
	o := c.ignore("")
	o.did, o.addr, o.level = "released", c.ciaddr, slog.LevelInfo
	c.pool.set(i, c.mac, c.now, false) // and gets it again, if it is still free
	o.lease = &Lease{Addr: c.ciaddr, MAC: c.mac, Expires: c.now}
	return o
}

// fixed is c's fixed address, if it has one on its link that no other machine
// still holds as a lease.
func (t *table) fixed(c client) (netip.Addr, bool) {
	a := c.host.Addr
	if !a.IsValid() || !c.pool.Prefix.Contains(a) || a == t.site.Server {
		return a, false // our own address is nobody else's, whatever a record says
	}
	if i, ok := c.pool.index(a); ok {
		if s := c.pool.slots[i]; s.mac != "" && s.mac != c.mac && s.held(c.now) {
			return a, false
		}
	}
	return a, true
}

// barred says which addresses are another machine's fixed ones.
func (t *table) barred(c client) func(netip.Addr) bool {
	return func(a netip.Addr) bool {
		h, ok := t.hosts.ByAddr(a)
		return ok && h.MAC != c.mac
	}
}

func (c client) ignore(why string) outcome {
	return outcome{level: slog.LevelDebug, mac: c.mac, did: "ignored", why: why}
}

// reply is an OFFER or ACK of addr; a zero addr is the ACK of an INFORM.
func (t *table) reply(c client, kind dhcpv4.MessageType, addr netip.Addr) outcome {
	p := c.pool
	boot := netboot.Decide(bootRequest(c), t.site)
	r := c.header(kind)
	r.ServerIPAddr = t.site.Server.AsSlice() // the next server; also how an agent without arguments finds us
	r.Options.Update(dhcpv4.OptSubnetMask(net.CIDRMask(p.Prefix.Bits(), 32)))
	r.Options.Update(dhcpv4.OptBroadcastAddress(p.broadcast().AsSlice()))
	if p.Router.IsValid() {
		r.Options.Update(dhcpv4.OptRouter(p.Router.AsSlice()))
	}
	if len(p.DNS) > 0 {
		var dns []net.IP
		for _, a := range p.DNS {
			dns = append(dns, a.AsSlice())
		}
		r.Options.Update(dhcpv4.OptDNS(dns...))
	}
	if p.Domain != "" {
		r.Options.Update(dhcpv4.OptDomainName(p.Domain))
	}
	if c.host.Name != "" {
		r.Options.Update(dhcpv4.OptHostName(c.host.Name))
	}
	if addr.IsValid() {
		r.YourIPAddr = addr.AsSlice()
		r.Options.Update(dhcpv4.OptIPAddressLeaseTime(p.Lease))
		r.Options.Update(dhcpv4.OptRenewTimeValue(p.Lease / 2))
		r.Options.Update(dhcpv4.OptRebindingTimeValue(p.Lease / 8 * 7))
	}
	if boot.File != "" {
		// Old ROMs read the header only, some UEFI only the option; those that
		// ask for the option understand it.
		if len(boot.File) < 128 {
			r.BootFileName = boot.File
		}
		if len(boot.File) >= 128 || c.req.ParameterRequestList().Has(dhcpv4.OptionBootfileName) {
			r.Options.Update(dhcpv4.OptBootFileName(boot.File))
		}
		// RFC 4578, 2.3: some ROMs take no offer that does not name them.
		if id := c.req.Options.Get(dhcpv4.OptionClientMachineIdentifier); len(id) == 17 {
			r.Options.Update(dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, id))
		}
	}
	// Never PXEClient: that would promise a boot server that is not there.
	if boot.VendorClass != "" {
		r.Options.Update(dhcpv4.OptClassIdentifier(boot.VendorClass))
	}

	o := outcome{reply: r, level: slog.LevelInfo, mac: c.mac, addr: addr, boot: boot.File, why: boot.Why}
	o.did, o.relay = "acknowledged", relayOf(c.req.RelayAgentInfo(), c.giaddr)
	if kind == dhcpv4.MessageTypeOffer {
		o.did, o.relay, o.level = "offered", "", slog.LevelDebug
	}
	if boot.Why != "" {
		o.level = slog.LevelWarn
	}
	switch {
	case c.giaddr.IsValid():
		o.to = &net.UDPAddr{IP: c.giaddr.AsSlice(), Port: dhcpv4.ServerPort}
	case c.ciaddr.IsValid():
		o.to = &net.UDPAddr{IP: c.ciaddr.AsSlice(), Port: dhcpv4.ClientPort}
	default:
		// Also to who did not ask for it: such a client has no address yet that
		// a UDP socket could reach (RFC 2131, 4.1 allows it).
		o.to = &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort}
	}
	return o
}

func (t *table) nak(c client, why string) outcome {
	r := c.header(dhcpv4.MessageTypeNak)
	o := outcome{reply: r, level: slog.LevelInfo, mac: c.mac, did: "refused", addr: c.want, why: why}
	if !c.want.IsValid() {
		o.addr = c.ciaddr
	}
	// RFC 2131, 4.3.2: the client's address is not to be relied on.
	r.ClientIPAddr = net.IPv4zero
	o.to = &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort}
	if c.giaddr.IsValid() {
		r.SetBroadcast()
		o.to = &net.UDPAddr{IP: c.giaddr.AsSlice(), Port: dhcpv4.ServerPort}
	}
	return o
}

// header is what every reply has.
func (c client) header(kind dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	r := &dhcpv4.DHCPv4{
		OpCode:        dhcpv4.OpcodeBootReply,
		HWType:        c.req.HWType,
		TransactionID: c.req.TransactionID,
		Flags:         c.req.Flags,
		ClientIPAddr:  c.req.ClientIPAddr,
		GatewayIPAddr: c.req.GatewayIPAddr,
		ClientHWAddr:  c.req.ClientHWAddr,
		Options:       dhcpv4.OptionsFromList(dhcpv4.OptMessageType(kind), dhcpv4.OptServerIdentifier(c.self.AsSlice())),
	}
	if kind == dhcpv4.MessageTypeOffer {
		r.ClientIPAddr = net.IPv4zero // RFC 2131, table 3
	}
	// RFC 3046, 2.2: a relay wants its words back; RFC 6842: so does a client.
	for _, code := range []dhcpv4.OptionCode{dhcpv4.OptionRelayAgentInformation, dhcpv4.OptionClientIdentifier} {
		if v := c.req.Options.Get(code); v != nil {
			r.Options.Update(dhcpv4.OptGeneric(code, v))
		}
	}
	return r
}

func bootRequest(c client) netboot.Request {
	r := netboot.Request{
		MAC:         c.mac,
		VendorClass: c.req.ClassIdentifier(),
		UserClass:   c.req.Options.Get(dhcpv4.OptionUserClassInformation),
	}
	for _, a := range c.req.ClientArch() {
		r.Archs = append(r.Archs, uint16(a))
	}
	return r
}

// relayOf names what stands between a machine and us: the switch that added option 82,
// by its remote ID (RFC 3046, 3.2), or the relay agent, by its address on the
// machine's link. The circuit ID is of no use here: with most switches it is the port.
func relayOf(info *dhcpv4.RelayOptions, giaddr netip.Addr) string {
	if info != nil {
		id := info.Get(dhcpv4.AgentRemoteIDSubOption)
		name := string(id)
		if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
			name = hex.EncodeToString(id)
		}
		if name != "" && len(name) <= maxRelay {
			return name
		}
	}
	if giaddr.IsValid() {
		return giaddr.String()
	}
	return ""
}

const maxRelay = 64 // characters of its name

// optionAddr is the address in an option, or the zero Addr.
func optionAddr(o dhcpv4.Options, code dhcpv4.OptionCode) netip.Addr {
	return headerAddr(o.Get(code))
}

// headerAddr is the address in b; four zero bytes, or not four, are none.
func headerAddr(b []byte) netip.Addr {
	a, ok := netip.AddrFromSlice(b)
	if !ok || !a.Is4() || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}
