package dhcpd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"rookery/boot/netboot"
)

var (
	noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	self = netip.MustParseAddr("10.0.0.1")
	site = netboot.Site{Server: self, HTTP: "http://10.0.0.1:80", API: "https://10.0.0.1:443"}
)

const (
	node    = "52:54:00:00:00:01" // 10.0.0.11 is fixed for it
	machine = "52:54:00:00:00:02"
	another = "52:54:00:00:00:03"
)

type hostList []Host

func (hs hostList) ByMAC(mac string) (Host, bool) {
	for _, h := range hs {
		if h.MAC == mac {
			return h, true
		}
	}
	return Host{}, false
}

func (hs hostList) ByAddr(addr netip.Addr) (Host, bool) {
	for _, h := range hs {
		if h.Addr == addr {
			return h, true
		}
	}
	return Host{}, false
}

// subnets are the server's link, with a pool of two, and one behind a relay.
func subnets() []Subnet {
	return []Subnet{{
		Prefix: netip.MustParsePrefix("10.0.0.0/24"),
		First:  netip.MustParseAddr("10.0.0.100"), Last: netip.MustParseAddr("10.0.0.101"),
		Router: netip.MustParseAddr("10.0.0.254"),
		DNS:    []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")},
		Domain: "lan.example",
		Lease:  8 * time.Hour,
	}, {
		Prefix: netip.MustParsePrefix("10.1.0.0/24"),
		First:  netip.MustParseAddr("10.1.0.100"), Last: netip.MustParseAddr("10.1.0.109"),
	}}
}

func testTable(t testing.TB, leases ...Lease) *table {
	t.Helper()
	hosts := hostList{{MAC: node, Name: "n001", Addr: netip.MustParseAddr("10.0.0.11")}}
	table, err := newTable(subnets(), site, hosts, leases)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func lease(addr, mac string, left time.Duration) Lease {
	return Lease{Addr: netip.MustParseAddr(addr), MAC: mac, Expires: noon.Add(left)}
}

// ask makes a request as it looks after its way over the wire.
func ask(t testing.TB, kind dhcpv4.MessageType, mac string, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	hw, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	m := &dhcpv4.DHCPv4{OpCode: dhcpv4.OpcodeBootRequest, HWType: iana.HWTypeEthernet, ClientHWAddr: hw,
		TransactionID: dhcpv4.TransactionID{1, 2, 3, 4}, Options: dhcpv4.OptionsFromList(dhcpv4.OptMessageType(kind))}
	for _, mod := range mods {
		mod(m)
	}
	m, err = dhcpv4.FromBytes(m.ToBytes())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func ip(s string) net.IP { return net.ParseIP(s).To4() }

func wants(addr string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(ip(addr)))
}
func of(server string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(ip(server)))
}
func has(addr string) dhcpv4.Modifier   { return dhcpv4.WithClientIP(ip(addr)) }
func relay(addr string) dhcpv4.Modifier { return dhcpv4.WithGatewayIP(ip(addr)) }
func option(code dhcpv4.OptionCode, v ...byte) dhcpv4.Modifier {
	return dhcpv4.WithGeneric(code, v)
}

func TestAnswer(t *testing.T) {
	const (
		discover = dhcpv4.MessageTypeDiscover
		request  = dhcpv4.MessageTypeRequest
		decline  = dhcpv4.MessageTypeDecline
		release  = dhcpv4.MessageTypeRelease
		inform   = dhcpv4.MessageTypeInform
	)
	type mods = []dhcpv4.Modifier
	held := []Lease{lease("10.0.0.100", machine, time.Hour)}
	expired := []Lease{lease("10.0.0.100", machine, -time.Hour)}
	both := []Lease{lease("10.0.0.100", machine, time.Hour), lease("10.0.0.101", another, time.Hour)}

	for _, tt := range []struct {
		name   string
		leases []Lease
		kind   dhcpv4.MessageType
		mac    string
		mods   mods
		want   string // "TYPE address -> to", or "" for silence
		keep   string // "address mac time left", or ""
	}{
		{name: "discover by a node", kind: discover, mac: node, want: "OFFER 10.0.0.11 -> 255.255.255.255:68"},
		{name: "discover by a stranger that wants an address", kind: discover, mac: machine, mods: mods{wants("10.0.0.101")}, want: "OFFER 10.0.0.101 -> 255.255.255.255:68"},
		{name: "discover wanting what another has", leases: held, kind: discover, mac: another, mods: mods{wants("10.0.0.100")}, want: "OFFER 10.0.0.101 -> 255.255.255.255:68"},
		{name: "discover wanting a fixed address", leases: held, kind: discover, mac: another, mods: mods{wants("10.0.0.11")}, want: "OFFER 10.0.0.101 -> 255.255.255.255:68"},
		{name: "discover by who has a lease", leases: held, kind: discover, mac: machine, want: "OFFER 10.0.0.100 -> 255.255.255.255:68"},
		{name: "discover by who had a lease", leases: expired, kind: discover, mac: machine, want: "OFFER 10.0.0.100 -> 255.255.255.255:68"},
		{name: "discover with nothing free", leases: both, kind: discover, mac: "52:54:00:00:00:09"},
		{name: "discover takes an expired lease", leases: []Lease{both[1], expired[0]}, kind: discover, mac: "52:54:00:00:00:09", want: "OFFER 10.0.0.100 -> 255.255.255.255:68"},
		{name: "discover by relay", kind: discover, mac: machine, mods: mods{relay("10.1.0.1"), wants("10.1.0.105")}, want: "OFFER 10.1.0.105 -> 10.1.0.1:67"},
		{name: "discover by relay, node of another subnet", kind: discover, mac: node, mods: mods{relay("10.1.0.1"), wants("10.1.0.105")}, want: "OFFER 10.1.0.105 -> 10.1.0.1:67"},
		{name: "discover by relay of no subnet", kind: discover, mac: machine, mods: mods{relay("192.168.0.1")}},
		{name: "discover by relay with link selection", kind: discover, mac: machine, mods: mods{relay("192.168.0.1"), wants("10.1.0.105"), option(dhcpv4.OptionRelayAgentInformation, 5, 4, 10, 1, 0, 0)}, want: "OFFER 10.1.0.105 -> 192.168.0.1:67"},

		{name: "selecting, a node", kind: request, mac: node, mods: mods{wants("10.0.0.11"), of("10.0.0.1")}, want: "ACK 10.0.0.11 -> 255.255.255.255:68"},
		{name: "selecting, a stranger", kind: request, mac: machine, mods: mods{wants("10.0.0.100"), of("10.0.0.1")}, want: "ACK 10.0.0.100 -> 255.255.255.255:68", keep: "10.0.0.100 " + machine + " 8h0m0s"},
		{name: "selecting what another has", leases: held, kind: request, mac: another, mods: mods{wants("10.0.0.100"), of("10.0.0.1")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "selecting a fixed address of another", kind: request, mac: machine, mods: mods{wants("10.0.0.11"), of("10.0.0.1")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "selecting the router", kind: request, mac: machine, mods: mods{wants("10.0.0.254"), of("10.0.0.1")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "selecting, no longer the fixed address", kind: request, mac: node, mods: mods{wants("10.0.0.100"), of("10.0.0.1")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "selecting another server", kind: request, mac: machine, mods: mods{wants("10.0.0.100"), of("10.0.0.77")}},
		{name: "selecting nothing", kind: request, mac: machine, mods: mods{of("10.0.0.1")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "selecting by relay, refused", kind: request, mac: machine, mods: mods{relay("10.1.0.1"), wants("10.0.0.100"), of("10.0.0.1")}, want: "NAK - -> 10.1.0.1:67"},
		{name: "selecting by a relay that stands in for us", kind: request, mac: machine, mods: mods{relay("10.1.0.1"), wants("10.1.0.100"), of("10.1.0.1"), option(dhcpv4.OptionRelayAgentInformation, 11, 4, 10, 1, 0, 1)}, want: "ACK 10.1.0.100 -> 10.1.0.1:67", keep: "10.1.0.100 " + machine + " 1h0m0s"},

		{name: "reboot, same address", leases: held, kind: request, mac: machine, mods: mods{wants("10.0.0.100")}, want: "ACK 10.0.0.100 -> 255.255.255.255:68", keep: "10.0.0.100 " + machine + " 8h0m0s"},
		{name: "reboot, other address", leases: held, kind: request, mac: machine, mods: mods{wants("10.0.0.101")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "reboot, other network", kind: request, mac: machine, mods: mods{wants("192.168.0.5")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "reboot, never heard of", kind: request, mac: machine, mods: mods{wants("10.0.0.100")}},
		{name: "reboot, a node with its address", kind: request, mac: node, mods: mods{wants("10.0.0.11")}, want: "ACK 10.0.0.11 -> 255.255.255.255:68"},
		{name: "reboot, accepted meanwhile", leases: []Lease{lease("10.0.0.100", node, time.Hour)}, kind: request, mac: node, mods: mods{wants("10.0.0.100")}, want: "NAK - -> 255.255.255.255:68"},

		{name: "renew", leases: held, kind: request, mac: machine, mods: mods{has("10.0.0.100")}, want: "ACK 10.0.0.100 -> 10.0.0.100:68", keep: "10.0.0.100 " + machine + " 8h0m0s"},
		{name: "renew, expired but free", leases: expired, kind: request, mac: machine, mods: mods{has("10.0.0.100")}, want: "ACK 10.0.0.100 -> 10.0.0.100:68", keep: "10.0.0.100 " + machine + " 8h0m0s"},
		{name: "renew, given away", leases: held, kind: request, mac: another, mods: mods{has("10.0.0.100")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "renew past the relay", leases: []Lease{lease("10.1.0.103", machine, time.Hour)}, kind: request, mac: machine, mods: mods{has("10.1.0.103")}, want: "ACK 10.1.0.103 -> 10.1.0.103:68", keep: "10.1.0.103 " + machine + " 1h0m0s"},
		{name: "renew of a network that is not ours", kind: request, mac: machine, mods: mods{has("192.168.0.5")}, want: "NAK - -> 255.255.255.255:68"},
		{name: "renew, accepted meanwhile: no change under its feet", leases: []Lease{lease("10.0.0.100", node, time.Hour)}, kind: request, mac: node, mods: mods{has("10.0.0.100")}, want: "ACK 10.0.0.100 -> 10.0.0.100:68", keep: "10.0.0.100 " + node + " 8h0m0s"},
		{name: "renew, a node", kind: request, mac: node, mods: mods{has("10.0.0.11")}, want: "ACK 10.0.0.11 -> 10.0.0.11:68"},

		{name: "decline", leases: held, kind: decline, mac: machine, mods: mods{wants("10.0.0.100"), of("10.0.0.1")}, keep: "10.0.0.100  10m0s"},
		{name: "decline what another has", leases: held, kind: decline, mac: another, mods: mods{wants("10.0.0.100"), of("10.0.0.1")}},
		{name: "decline to another server", leases: held, kind: decline, mac: machine, mods: mods{wants("10.0.0.100"), of("10.0.0.77")}},
		{name: "decline of a fixed address", kind: decline, mac: node, mods: mods{wants("10.0.0.11"), of("10.0.0.1")}},

		{name: "release", leases: held, kind: release, mac: machine, mods: mods{has("10.0.0.100"), of("10.0.0.1")}, keep: "10.0.0.100 " + machine + " 0s"},
		{name: "release what another has", leases: held, kind: release, mac: another, mods: mods{has("10.0.0.100"), of("10.0.0.1")}},

		{name: "inform", kind: inform, mac: machine, mods: mods{has("10.0.0.77")}, want: "ACK - -> 10.0.0.77:68"},
		{name: "inform from nowhere", kind: inform, mac: machine, mods: mods{has("192.168.0.5")}},

		{name: "an offer", kind: dhcpv4.MessageTypeOffer, mac: machine},
		{name: "no message type", kind: 0, mac: machine},
		{name: "MAC of a group", kind: discover, mac: "01:00:5e:00:00:01"},
		{name: "MAC of eight bytes", kind: discover, mac: "52:54:00:00:00:01:02:03"},
		{name: "a reply", kind: discover, mac: machine, mods: mods{func(d *dhcpv4.DHCPv4) { d.OpCode = dhcpv4.OpcodeBootReply }}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := testTable(t, tt.leases...).answer(ask(t, tt.kind, tt.mac, tt.mods...), noon)
			if got := describe(o); got != tt.want {
				t.Errorf("answer: %q (%s: %s), want %q", got, o.did, o.why, tt.want)
			}
			keep := ""
			if o.lease != nil {
				keep = fmt.Sprintf("%s %s %s", o.lease.Addr, o.lease.MAC, o.lease.Expires.Sub(noon))
			}
			if keep != tt.keep {
				t.Errorf("kept %q, want %q", keep, tt.keep)
			}
		})
	}
}

func describe(o outcome) string {
	if o.reply == nil {
		return ""
	}
	addr := "-"
	if y := o.reply.YourIPAddr; y != nil && !y.IsUnspecified() {
		addr = y.String()
	}
	return fmt.Sprintf("%s %s -> %s", o.reply.MessageType(), addr, o.to)
}

func TestReplyOptions(t *testing.T) {
	guid := append([]byte{0}, bytes.Repeat([]byte{7}, 16)...)
	id := []byte{1, 0x52, 0x54, 0, 0, 0, 1}
	agent := []byte{1, 4, 'e', 't', 'h', '7'}
	o := testTable(t).answer(ask(t, dhcpv4.MessageTypeDiscover, node,
		option(dhcpv4.OptionClassIdentifier, []byte("PXEClient:Arch:00007:UNDI:003001")...),
		option(dhcpv4.OptionClientSystemArchitectureType, 0, 7),
		option(dhcpv4.OptionClientMachineIdentifier, guid...),
		option(dhcpv4.OptionClientIdentifier, id...),
		option(dhcpv4.OptionRelayAgentInformation, agent...),
		dhcpv4.WithBroadcast(true)), noon)
	r, err := dhcpv4.FromBytes(o.reply.ToBytes())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name      string
		got, want any
	}{
		{"transaction", r.TransactionID.String(), "0x01020304"},
		{"broadcast", r.IsBroadcast(), true},
		{"client", r.ClientHWAddr.String(), node},
		{"next server", r.ServerIPAddr.String(), "10.0.0.1"},
		{"boot file", r.BootFileName, "snponly.efi"},
		{"boot file option, not asked for", r.BootFileNameOption(), ""},
		{"server", r.ServerIdentifier().String(), "10.0.0.1"},
		{"mask", r.SubnetMask().String(), "ffffff00"},
		{"broadcast address", r.BroadcastAddress().String(), "10.0.0.255"},
		{"router", fmt.Sprint(r.Router()), "[10.0.0.254]"},
		{"dns", fmt.Sprint(r.DNS()), "[10.0.0.2 10.0.0.3]"},
		{"domain", r.DomainName(), "lan.example"},
		{"host name", r.HostName(), "n001"},
		{"lease", r.IPAddressLeaseTime(0), 8 * time.Hour},
		{"T1", r.IPAddressRenewalTime(0), 4 * time.Hour},
		{"T2", r.IPAddressRebindingTime(0), 7 * time.Hour},
		{"class: never PXEClient", r.ClassIdentifier(), ""},
		{"machine", string(r.Options.Get(dhcpv4.OptionClientMachineIdentifier)), string(guid)},
		{"client identifier", string(r.Options.Get(dhcpv4.OptionClientIdentifier)), string(id)},
		{"relay's own words", string(r.Options.Get(dhcpv4.OptionRelayAgentInformation)), string(agent)},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, tt.got, tt.want)
		}
	}
	o = testTable(t).answer(ask(t, dhcpv4.MessageTypeDiscover, node,
		option(dhcpv4.OptionClassIdentifier, []byte("HTTPClient:Arch:00016:UNDI:003001")...),
		option(dhcpv4.OptionClientSystemArchitectureType, 0, 16),
		option(dhcpv4.OptionParameterRequestList, 67)), noon)
	const url = "http://10.0.0.1:80/boot/of/52:54:00:00:00:01/ipxe.efi"
	if r := o.reply; r.ClassIdentifier() != "HTTPClient" || r.BootFileNameOption() != url || r.BootFileName != url {
		t.Errorf("HTTP Boot: class %q, option 67 %q, file %q", r.ClassIdentifier(), r.BootFileNameOption(), r.BootFileName)
	}
}

func mac(n int) string {
	var b [6]byte
	binary.BigEndian.PutUint32(b[2:], uint32(n))
	return net.HardwareAddr(b[:]).String()
}

// A flood of invented machines takes every offer, again and again; one that
// means it still gets an address, and the state does not grow.
func TestFlood(t *testing.T) {
	table := testTable(t)
	now := noon
	offer := table.answer(ask(t, dhcpv4.MessageTypeDiscover, machine), now)
	got := offer.reply.YourIPAddr.String()
	for n := range 10000 {
		now = now.Add(time.Millisecond)
		if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, mac(n+1)), now); o.reply == nil {
			t.Fatalf("machine %d: %s", n, o.why)
		}
	}
	if n := len(table.local.byMAC); n > 2 {
		t.Errorf("%d machines remembered, the pool has 2 addresses", n)
	}
	o := table.answer(ask(t, dhcpv4.MessageTypeRequest, machine, wants(got), of("10.0.0.1")), now)
	if want := "ACK " + got + " -> 255.255.255.255:68"; describe(o) != want {
		t.Errorf("after the flood: %q (%s), want %q", describe(o), o.why, want)
	}
	// What is taken stays taken.
	for n := range 100 {
		if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, mac(n+1)), now); o.reply != nil && o.addr.String() == got {
			t.Fatalf("%s was offered again", got)
		}
	}
}

// Every machine that asks while there is room has an address of its own, and
// keeps it however often it asks.
func TestAllocationIsFreeOfConflicts(t *testing.T) {
	s := Subnet{Prefix: netip.MustParsePrefix("10.0.0.0/16"), First: netip.MustParseAddr("10.0.0.0"), Last: netip.MustParseAddr("10.0.3.255"),
		Router: netip.MustParseAddr("10.0.0.254"), DNS: []netip.Addr{netip.MustParseAddr("10.0.2.2")}}
	fixed := hostList{{MAC: node, Addr: netip.MustParseAddr("10.0.1.77")}}
	table, err := newTable([]Subnet{s}, site, fixed, nil)
	if err != nil {
		t.Fatal(err)
	}
	owner := map[string]string{"10.0.0.0": "network", "10.0.0.1": "server", "10.0.0.254": "router", "10.0.2.2": "dns", "10.0.1.77": "node"}
	free := 1024 - len(owner)
	for n := range free {
		m := mac(n + 1)
		addr := table.answer(ask(t, dhcpv4.MessageTypeDiscover, m), noon).addr.String()
		o := table.answer(ask(t, dhcpv4.MessageTypeRequest, m, wants(addr), of("10.0.0.1")), noon)
		if !strings.HasPrefix(describe(o), "ACK "+addr) {
			t.Fatalf("machine %d of %d: offered %s, then %q: %s", n, free, addr, describe(o), o.why)
		}
		if who, taken := owner[addr]; taken {
			t.Fatalf("%s is %s's, and was given to %s", addr, who, m)
		}
		owner[addr] = m
	}
	for addr, m := range owner {
		if _, err := net.ParseMAC(m); err != nil {
			continue
		}
		if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, m), noon); o.addr.String() != addr {
			t.Fatalf("%s had %s, and was offered %s", m, addr, o.addr)
		}
	}
	if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, mac(5000)), noon); o.reply != nil {
		t.Fatalf("one more got %s", o.addr)
	}
}

// A fixed address that a stranger still holds by a lease is not given twice.
func TestFixedAddressStillLeased(t *testing.T) {
	hosts := hostList{{MAC: node, Addr: netip.MustParseAddr("10.0.0.100")}}
	table, err := newTable(subnets(), site, hosts, []Lease{lease("10.0.0.100", machine, time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, node), noon); o.addr.String() != "10.0.0.101" {
		t.Errorf("while it is leased: offered %s, want 10.0.0.101", o.addr)
	}
	if o := table.answer(ask(t, dhcpv4.MessageTypeRequest, machine, has("10.0.0.100")), noon); o.reply.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("renewed: %s, want a refusal", describe(o))
	}
	if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, node), noon.Add(2*time.Hour)); o.addr.String() != "10.0.0.100" {
		t.Errorf("after the lease: offered %s, want 10.0.0.100", o.addr)
	}
}

func TestTheServersAddressIsNoMachines(t *testing.T) {
	hosts := hostList{{MAC: node, Addr: self}}
	table, err := newTable(subnets(), site, hosts, nil)
	if err != nil {
		t.Fatal(err)
	}
	if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, node), noon); !o.addr.IsValid() || o.addr == self {
		t.Errorf("offered %s, want an address of the pool", o.addr)
	}
	if o := table.answer(ask(t, dhcpv4.MessageTypeRequest, node, wants(self.String()), of(self.String())), noon); o.reply.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("asked for %s: %s, want a refusal", self, describe(o))
	}
}

func TestDeclinedAddressRests(t *testing.T) {
	table := testTable(t, lease("10.0.0.100", machine, time.Hour), lease("10.0.0.101", another, time.Hour))
	table.answer(ask(t, dhcpv4.MessageTypeDecline, machine, wants("10.0.0.100"), of("10.0.0.1")), noon)
	if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, machine), noon.Add(9*time.Minute)); o.reply != nil {
		t.Errorf("after 9 minutes: offered %s, want nothing", o.addr)
	}
	if o := table.answer(ask(t, dhcpv4.MessageTypeDiscover, machine), noon.Add(11*time.Minute)); o.addr.String() != "10.0.0.100" {
		t.Errorf("after 11 minutes: offered %s, want 10.0.0.100", o.addr)
	}
}

func TestNewTableRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(s []Subnet, site *netboot.Site) []Subnet
		want   string
	}{
		{"no subnet", func(s []Subnet, _ *netboot.Site) []Subnet { return nil }, "server address 10.0.0.1: in none of the subnets"},
		{"no server", func(s []Subnet, site *netboot.Site) []Subnet { site.Server = netip.Addr{}; return s }, "want IPv4"},
		{"host bits", func(s []Subnet, _ *netboot.Site) []Subnet {
			s[0].Prefix = netip.MustParsePrefix("10.0.0.1/24")
			return s
		}, "want an IPv4 network"},
		{"twice", func(s []Subnet, _ *netboot.Site) []Subnet { return append(s, s[0]) }, "overlaps 10.0.0.0/24"},
		{"wider", func(s []Subnet, _ *netboot.Site) []Subnet {
			return append(s, Subnet{Prefix: netip.MustParsePrefix("10.0.0.0/8")})
		}, "overlaps 10.0.0.0/24"},
		{"pool outside", func(s []Subnet, _ *netboot.Site) []Subnet {
			s[0].Last = netip.MustParseAddr("10.0.1.1")
			return s
		}, "is not a range of it"},
		{"half a pool", func(s []Subnet, _ *netboot.Site) []Subnet { s[0].Last = netip.Addr{}; return s }, "is not a range of it"},
		{"pool too large", func(s []Subnet, _ *netboot.Site) []Subnet {
			return []Subnet{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), First: netip.MustParseAddr("10.0.0.0"), Last: netip.MustParseAddr("10.255.255.255")}}
		}, "pool has 16777216 addresses, at most 65536"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := site
			_, err := newTable(tt.change(subnets(), &s), s, nil, nil)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("newTable: %v, want %q", err, tt.want)
			}
		})
	}
}

// Whatever comes in, what goes out is a reply that can be read, to an address
// that belongs to the client's subnet, and the pool stays in order.
func FuzzAnswer(f *testing.F) {
	for _, kind := range []dhcpv4.MessageType{1, 3, 4, 7, 8} {
		f.Add(ask(f, kind, machine, wants("10.0.0.100"), of("10.0.0.1")).ToBytes())
		f.Add(ask(f, kind, node, has("10.0.0.11"), relay("10.1.0.1"), option(dhcpv4.OptionRelayAgentInformation, 5, 4, 10, 1, 0, 0)).ToBytes())
	}
	f.Add(ask(f, 1, machine, option(dhcpv4.OptionClassIdentifier, []byte("PXEClient:Arch:00000:")...),
		option(dhcpv4.OptionUserClassInformation, []byte("iPXE")...), option(dhcpv4.OptionClientSystemArchitectureType, 0)).ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		table := testTable(t, lease("10.0.0.100", machine, time.Hour))
		for range 2 {
			o := table.answer(req, noon)
			if o.reply == nil {
				continue
			}
			r, err := dhcpv4.FromBytes(o.reply.ToBytes())
			if err != nil {
				t.Fatalf("reply: %v", err)
			}
			if r.OpCode != dhcpv4.OpcodeBootReply || r.TransactionID != req.TransactionID || o.to == nil {
				t.Fatalf("reply to %v: %v", o.to, r)
			}
			if y := headerAddr(r.YourIPAddr); y.IsValid() && table.pool(y) == nil {
				t.Fatalf("gave %s", y)
			}
			for _, p := range table.pools {
				for m, i := range p.byMAC {
					if p.slots[i].mac != m || m == "" {
						t.Fatalf("%q has slot %d, which is %q's", m, i, p.slots[i].mac)
					}
				}
			}
		}
	})
}

// What stands between a machine and the server is told when it gets an address.
func TestRelay(t *testing.T) {
	remote := func(id ...byte) dhcpv4.Modifier {
		return option(dhcpv4.OptionRelayAgentInformation, slices.Concat([]byte{1, 2, 'p', '7', 2, byte(len(id))}, id)...)
	}
	for _, tt := range []struct {
		name string
		mods []dhcpv4.Modifier
		want string
	}{
		{"none", []dhcpv4.Modifier{wants("10.0.0.100"), of("10.0.0.1")}, ""},
		{"a relay agent", []dhcpv4.Modifier{wants("10.1.0.100"), of("10.0.0.1"), relay("10.1.0.1")}, "10.1.0.1"},
		{"a relay agent that names the switch", []dhcpv4.Modifier{wants("10.1.0.100"), of("10.0.0.1"), relay("10.1.0.1"), remote([]byte("tor-7")...)}, "tor-7"},
		{"a switch that only adds its MAC address", []dhcpv4.Modifier{wants("10.0.0.100"), of("10.0.0.1"), remote(0, 6, 2, 0, 0, 0, 0, 7)}, "0006020000000007"},
		{"a name that is too long", []dhcpv4.Modifier{wants("10.1.0.100"), of("10.0.0.1"), relay("10.1.0.1"), remote(bytes.Repeat([]byte{'x'}, 65)...)}, "10.1.0.1"},
		{"an empty name", []dhcpv4.Modifier{wants("10.0.0.100"), of("10.0.0.1"), remote()}, ""},
	} {
		table := testTable(t)
		table.answer(ask(t, dhcpv4.MessageTypeDiscover, machine, tt.mods...), noon)
		o := table.answer(ask(t, dhcpv4.MessageTypeRequest, machine, tt.mods...), noon)
		if o.did != "acknowledged" || o.relay != tt.want {
			t.Errorf("%s: %s, relay %q, want %q", tt.name, o.did, o.relay, tt.want)
		}
		if o = table.answer(ask(t, dhcpv4.MessageTypeDiscover, machine, tt.mods...), noon); o.relay != "" {
			t.Errorf("%s: the offer has relay %q", tt.name, o.relay)
		}
	}
}
