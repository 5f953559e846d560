package fixup

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"rookery/wire"
)

// An iface is a wire.Network that was checked.
type iface struct {
	mac     net.HardwareAddr
	address netip.Prefix // invalid means DHCP
	gateway netip.Addr
}

// network configures the interfaces with what the image has for it. All of
// them find an interface by its MAC: names that the kernel gave in the
// installer are others after udev has been at work.
func (m machine) network() (string, error) {
	if len(m.id.Network) == 0 {
		return "", nil
	}
	var ifaces []iface
	dhcp := false
	for _, n := range m.id.Network {
		i, err := parse(n)
		if err != nil {
			return "", err
		}
		ifaces = append(ifaces, i)
		dhcp = dhcp || !i.address.IsValid()
	}
	_, networkd := m.unit("systemd-networkd.service")
	ifupdown := m.exists("usr/sbin/ifup") || m.exists("sbin/ifup")
	if ifupdown {
		if err := m.setAside(); err != nil {
			return "", err
		}
	}
	switch {
	case m.enabled("NetworkManager.service", "multi-user.target"):
		return "NetworkManager", m.networkManager(ifaces)
	case networkd && (m.enabled("systemd-networkd.service", "multi-user.target") || m.exists("usr/sbin/netplan")):
		return "systemd-networkd", m.networkd(ifaces)
	case ifupdown && (!dhcp || m.hasDHCPClient()):
		return "ifupdown", m.write("etc/network/interfaces.d/rookery", interfaces(ifaces, m.id), 0o644)
	case networkd:
		return "systemd-networkd, enabled", m.networkd(ifaces)
	case ifupdown:
		return "", errors.New("the image has ifupdown, and for DHCP none of dhclient, dhcpcd and udhcpc")
	}
	return "", errors.New("the image has none of NetworkManager (enabled), systemd-networkd and ifupdown")
}

func parse(n wire.Network) (i iface, err error) {
	if i.mac, err = net.ParseMAC(n.MAC); err != nil {
		return i, err
	}
	if n.Address != "" {
		if i.address, err = netip.ParsePrefix(n.Address); err != nil {
			return i, fmt.Errorf("%s: %w", n.MAC, err)
		}
	}
	if n.Gateway != "" {
		if i.gateway, err = netip.ParseAddr(n.Gateway); err != nil {
			return i, fmt.Errorf("%s: gateway: %w", n.MAC, err)
		}
	}
	return i, nil
}

func (m machine) hasDHCPClient() bool {
	for _, name := range []string{"dhclient", "dhcpcd", "udhcpc"} {
		if m.exists("usr/sbin/"+name) || m.exists("sbin/"+name) {
			return true
		}
	}
	return false
}

// setAside leaves ifupdown with the loopback alone: other interfaces that the
// image has are of the machine it was made on, its addresses included. What
// was there is kept beside, where ifupdown does not look.
func (m machine) setAside() error {
	const main, dir, aside = "etc/network/interfaces", "etc/network/interfaces.d", "etc/network/interfaces.image"
	names, err := m.list(dir)
	if err != nil {
		return err
	}
	files := []string{main}
	for _, n := range names {
		files = append(files, dir+"/"+n)
	}
	for _, file := range files {
		text, err := m.read(file)
		if err != nil {
			return err
		}
		if !configures(text) {
			continue
		}
		if err := m.root.MkdirAll(aside, 0o755); err != nil {
			return err
		}
		if err := m.root.Rename(file, aside+file[strings.LastIndexByte(file, '/'):]); err != nil {
			return err
		}
	}
	return m.write(main, "# Written by Rookery when this machine was installed.\nsource /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n", 0o644)
}

// configures says whether an interfaces file is about more than the loopback.
func configures(text string) bool {
	for _, line := range lines(text) {
		f := strings.Fields(line)
		if len(f) > 1 && (f[0] == "iface" || f[0] == "mapping") && f[1] != "lo" {
			return true
		}
	}
	return false
}

// interfaces is ifupdown's configuration: "auto mac/M=L" brings the interface
// whose address is M up as the logical interface L (interfaces(5), pattern
// matching interfaces).
func interfaces(ifaces []iface, id wire.Identity) string {
	var b strings.Builder
	b.WriteString("# Written by Rookery when this machine was installed.\n")
	for n, i := range ifaces {
		family, method := "inet", "dhcp"
		if i.address.IsValid() {
			method = "static"
			if i.address.Addr().Is6() {
				family = "inet6"
			}
		}
		fmt.Fprintf(&b, "\nauto mac/%s=rookery%d\niface rookery%d %s %s\n", i.mac, n, n, family, method)
		if method == "dhcp" {
			continue
		}
		fmt.Fprintf(&b, "\taddress %s\n", i.address)
		if i.gateway.IsValid() {
			fmt.Fprintf(&b, "\tgateway %s\n", i.gateway)
		}
		if len(id.Nameservers) > 0 { // for resolvconf, where there is one
			fmt.Fprintf(&b, "\tdns-nameservers %s\n", strings.Join(id.Nameservers, " "))
		}
	}
	return b.String()
}

func (m machine) networkd(ifaces []iface) error {
	for n, i := range ifaces {
		// 00: before those of the image, and of netplan (10-netplan-*).
		name := fmt.Sprintf("etc/systemd/network/00-rookery%d.network", n)
		if err := m.write(name, networkFile(i, m.id), 0o644); err != nil {
			return err
		}
	}
	for _, u := range []struct{ unit, target string }{
		{"systemd-networkd.service", "multi-user.target"},
		{"systemd-networkd.socket", "sockets.target"},
	} {
		if file, ok := m.unit(u.unit); ok {
			if err := m.enable(u.unit, u.target, file); err != nil {
				return err
			}
		}
	}
	return nil
}

// networkFile is systemd-networkd's configuration of one interface.
func networkFile(i iface, id wire.Identity) string {
	var b strings.Builder
	// Type: a bridge or VLAN on top of the interface may have its address.
	fmt.Fprintf(&b, "# Written by Rookery when this machine was installed.\n[Match]\nMACAddress=%s\nType=ether\n\n[Network]\n", i.mac)
	if i.address.IsValid() {
		fmt.Fprintf(&b, "Address=%s\n", i.address)
	} else {
		b.WriteString("DHCP=yes\n")
	}
	if i.gateway.IsValid() {
		fmt.Fprintf(&b, "Gateway=%s\n", i.gateway)
	}
	for _, ns := range id.Nameservers {
		fmt.Fprintf(&b, "DNS=%s\n", ns)
	}
	if id.Domain != "" {
		fmt.Fprintf(&b, "Domains=%s\n", id.Domain)
	}
	if !i.address.IsValid() {
		b.WriteString("\n[DHCPv4]\nClientIdentifier=mac\n") // as the firmware and the installer asked
	}
	return b.String()
}

func (m machine) networkManager(ifaces []iface) error {
	for n, i := range ifaces {
		name := fmt.Sprintf("rookery%d", n)
		// 0600: NetworkManager does not read what others can.
		if err := m.write("etc/NetworkManager/system-connections/"+name+".nmconnection", keyfile(name, i, m.id), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// keyfile is NetworkManager's configuration of one interface. Its priority is
// above that of connections which the image may have.
func keyfile(name string, i iface, id wire.Identity) string {
	sections := map[string]string{"ipv4": "method=auto\n", "ipv6": "method=auto\n"}
	if i.address.IsValid() {
		family := "ipv4"
		if i.address.Addr().Is6() {
			family = "ipv6"
		}
		sections["ipv4"] = "method=disabled\n"
		s := "method=manual\naddress1=" + i.address.String()
		if i.gateway.IsValid() {
			s += "," + i.gateway.String()
		}
		sections[family] = s + "\n"
	}
	for _, ns := range id.Nameservers {
		family := "ipv4"
		if strings.Contains(ns, ":") {
			family = "ipv6"
		}
		if before, list, ok := strings.Cut(sections[family], "dns="); ok {
			sections[family] = before + "dns=" + strings.TrimSuffix(list, "\n") + ns + ";\n"
		} else {
			sections[family] += "dns=" + ns + ";\n"
		}
	}
	return "[connection]\nid=" + name + "\ntype=ethernet\nautoconnect-priority=100\n\n[ethernet]\nmac-address=" + i.mac.String() +
		"\n\n[ipv4]\n" + sections["ipv4"] + "\n[ipv6]\n" + sections["ipv6"]
}

// resolver tells whoever looks names up in this image where to ask.
func (m machine) resolver() (string, error) {
	if len(m.id.Nameservers) == 0 {
		return "", nil
	}
	for _, ns := range m.id.Nameservers {
		if _, err := netip.ParseAddr(ns); err != nil {
			return "", fmt.Errorf("nameserver: %w", err)
		}
	}
	const file = "etc/resolv.conf"
	resolved := m.enabled("systemd-resolved.service", "multi-user.target") || m.enabled("systemd-resolved.service", "sysinit.target")
	if target, err := m.root.Readlink(file); err == nil && resolved && strings.Contains(target, "systemd/resolve") {
		text := "[Resolve]\nDNS=" + strings.Join(m.id.Nameservers, " ") + "\n"
		if m.id.Domain != "" {
			text += "Domains=" + m.id.Domain + "\n"
		}
		return "systemd-resolved", m.write("etc/systemd/resolved.conf.d/rookery.conf", text, 0o644)
	}
	var b strings.Builder
	if m.id.Domain != "" {
		fmt.Fprintf(&b, "search %s\n", m.id.Domain)
	}
	for _, ns := range m.id.Nameservers {
		fmt.Fprintf(&b, "nameserver %s\n", ns)
	}
	return "resolv.conf", m.write(file, b.String(), 0o644)
}
