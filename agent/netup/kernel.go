package netup

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"
)

// Kernel is the real network of this machine (or of this network namespace).
type Kernel struct {
	ResolvConf string // file to write name servers to; "" for none
}

// NICs lists the Ethernet interfaces but the virtual ones that carry no wire.
func (Kernel) NICs() ([]NIC, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var nics []NIC
	for _, link := range links {
		attrs := link.Attrs()
		switch link.Type() {
		case "device", "veth", "macvlan", "tuntap":
		default:
			continue
		}
		if attrs.EncapType != "ether" || attrs.Flags&net.FlagLoopback != 0 {
			continue
		}
		nics = append(nics, NIC{
			Name:    attrs.Name,
			MAC:     attrs.HardwareAddr.String(),
			Up:      attrs.Flags&net.FlagUp != 0,
			Carrier: attrs.Flags&net.FlagUp != 0 && attrs.RawFlags&lowerUp != 0,
		})
	}
	return nics, nil
}

// lowerUp is IFF_LOWER_UP of linux/if.h: the wire has a signal.
const lowerUp = 1 << 16

// SetUp is ip link set NIC up.
func (Kernel) SetUp(nic string) error {
	link, err := netlink.LinkByName(nic)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// Discover runs the four messages of DHCP.
func (Kernel) Discover(ctx context.Context, nic string, patience time.Duration) (Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	// One retransmission within patience; the caller repeats the whole.
	client, err := nclient4.New(nic, nclient4.WithTimeout(patience/3), nclient4.WithRetry(2))
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp: %w", err)
	}
	defer client.Close()

	discover, err := dhcpv4.NewDiscovery(client.InterfaceAddr(),
		dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(nclient4.MaxMessageSize)),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionDomainName, dhcpv4.OptionDomainNameServer, dhcpv4.OptionRouter, dhcpv4.OptionSubnetMask))
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp: %w", err)
	}
	offer, err := client.SendAndRead(ctx, client.RemoteAddr(), discover, isLease)
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp: discover: %w", quiet(err))
	}
	lease, err := client.RequestFromOffer(ctx, offer)
	if err != nil {
		return Lease{}, fmt.Errorf("dhcp: request %s: %w", offer.YourIPAddr, quiet(err))
	}
	return leaseOf(nic, lease.ACK)
}

// isLease leaves out the offers of proxy DHCP servers, which have no address.
func isLease(p *dhcpv4.DHCPv4) bool {
	return p != nil && p.MessageType() == dhcpv4.MessageTypeOffer && !p.YourIPAddr.IsUnspecified()
}

func quiet(err error) error {
	if errors.Is(err, nclient4.ErrNoResponse) || errors.Is(err, context.DeadlineExceeded) {
		return errors.New("no answer")
	}
	return err
}

// leaseOf reads an acknowledgement.
func leaseOf(nic string, ack *dhcpv4.DHCPv4) (Lease, error) {
	address, ok := netip.AddrFromSlice(ack.YourIPAddr.To4())
	if !ok || !address.IsValid() || address.IsUnspecified() || address.IsMulticast() || address.IsLoopback() {
		return Lease{}, fmt.Errorf("dhcp: answer of %s has the address %s", ack.ServerIdentifier(), ack.YourIPAddr)
	}
	mask := ack.SubnetMask()
	if mask == nil {
		mask = ack.YourIPAddr.DefaultMask()
	}
	ones, bits := mask.Size()
	if bits != 32 || ones == 0 {
		return Lease{}, fmt.Errorf("dhcp: answer of %s has the netmask %s", ack.ServerIdentifier(), mask)
	}
	lease := Lease{
		NIC:     nic,
		Address: netip.PrefixFrom(address, ones),
		Domain:  ack.DomainName(),
		Valid:   ack.IPAddressLeaseTime(time.Hour),
	}
	for _, ip := range ack.Router() {
		if gateway, ok := netip.AddrFromSlice(ip.To4()); ok && !gateway.IsUnspecified() {
			lease.Gateway = gateway
			break
		}
	}
	for _, ip := range ack.DNS() {
		if server, ok := netip.AddrFromSlice(ip.To4()); ok {
			lease.Nameservers = append(lease.Nameservers, server)
		}
	}
	for _, ip := range []net.IP{ack.ServerIPAddr, ack.ServerIdentifier()} {
		if next, ok := netip.AddrFromSlice(ip.To4()); ok && !next.IsUnspecified() {
			lease.NextServer = next
			break
		}
	}
	return lease, nil
}

// Configure gives the interface its address and the machine its default route.
func (k Kernel) Configure(lease Lease) error {
	link, err := netlink.LinkByName(lease.NIC)
	if err != nil {
		return err
	}
	network := &net.IPNet{IP: lease.Address.Addr().AsSlice(), Mask: net.CIDRMask(lease.Address.Bits(), 32)}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: network}); err != nil {
		return fmt.Errorf("address: %w", err)
	}
	if lease.Gateway.IsValid() {
		// On link: a gateway outside of the subnet (a /32 address) is reached all the same.
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: lease.Gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("route by %s: %w", lease.Gateway, err)
		}
	}
	if k.ResolvConf == "" || len(lease.Nameservers) == 0 {
		return nil
	}
	if err := os.WriteFile(k.ResolvConf, []byte(resolvConf(lease)), 0o644); err != nil {
		return fmt.Errorf("name servers: %w", err)
	}
	return nil
}

func resolvConf(lease Lease) string {
	var b strings.Builder
	// A domain is written only if it is one: it comes from the network.
	if lease.Domain != "" && strings.Trim(strings.ToLower(lease.Domain), "abcdefghijklmnopqrstuvwxyz0123456789-.") == "" {
		fmt.Fprintf(&b, "search %s\n", lease.Domain)
	}
	for _, server := range lease.Nameservers {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	return b.String()
}
