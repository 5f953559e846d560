package fleet

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"

	"rookery/disklayout"
	"rookery/wire"
)

// render is the install script of a node whose settings are complete and right.
func render(n Node, l disklayout.Layout, s Status, image wire.Image) wire.Script {
	upload, _ := wire.ParseRate(n.UploadLimit)
	download, _ := wire.ParseRate(n.DownloadLimit)
	return wire.Script{
		Version:    1,
		ID:         s.ID,
		Node:       n.Name,
		Image:      image,
		Transports: n.Transports,
		Mirrors:    n.Mirrors,
		Upload:     upload,
		Download:   download,
		Layout:     l,
		Identity: wire.Identity{
			Hostname:       n.Name,
			Domain:         n.Domain,
			MachineID:      machineID(s.ID),
			Network:        network(n, s.Inventory),
			Nameservers:    n.Nameservers,
			AuthorizedKeys: n.AuthorizedKeys,
			KernelArgs:     n.KernelArgs,
			Serial:         n.Console,
		},
		SeedFor:   *n.SeedFor,
		Ending:    n.Ending,
		OnFailure: n.OnFailure,
	}
}

// listen is where a node with these settings listens to what is sent, if it does.
func listen(s Settings, sent *wire.Multicast) *wire.Multicast {
	if sent == nil || !slices.Contains(s.Transports, "multicast") {
		return nil
	}
	m := *sent
	m.Rate, _ = wire.ParseRate(s.MulticastRate)
	return &m
}

// machineID makes an installation's /etc/machine-id from its ID. As systemd
// does, it has the bits of a random UUID (machine-id(5)).
func machineID(id string) string {
	sum := sha256.Sum256([]byte("machine-id " + id))
	sum[6] = sum[6]&0x0f | 0x40
	sum[8] = sum[8]&0x3f | 0x80
	return hex.EncodeToString(sum[:16])
}

// network configures one interface: the first of the record's that the machine
// has. One that was known by its UUID may have none of them; it uses the first
// with a link.
func network(n Node, inv *wire.Inventory) []wire.Network {
	if inv == nil {
		inv = &wire.Inventory{}
	}
	present := func(mac string) bool {
		return slices.ContainsFunc(inv.NICs, func(nic wire.NIC) bool { return nic.MAC == mac })
	}
	mac := ""
	if i := slices.IndexFunc(n.MACs, present); i >= 0 {
		mac = n.MACs[i]
	} else if i := slices.IndexFunc(inv.NICs, func(nic wire.NIC) bool { return nic.Carrier }); i >= 0 {
		mac = inv.NICs[i].MAC
	} else if len(n.MACs) > 0 {
		mac = n.MACs[0]
	}
	if mac == "" {
		return nil
	}
	if n.Address == "" {
		return []wire.Network{{MAC: mac}} // by DHCP, gateway too
	}
	return []wire.Network{{MAC: mac, Address: n.Address, Gateway: n.Gateway}}
}

// A Host is what the services around the fleet need to know of a machine that
// shows only its MAC address and its UUID.
type Host struct {
	Name        string
	Next        wire.Do      // Local, or Install: start the agent
	Address     netip.Prefix // fixed, of this interface; zero for none
	Gateway     netip.Addr   // zero for none
	Nameservers []netip.Addr
	Domain      string
}

func host(n Node, next wire.Do, mac string) Host {
	h := Host{Name: n.Name, Next: next, Domain: n.Domain}
	for _, ns := range n.Nameservers {
		h.Nameservers = append(h.Nameservers, netip.MustParseAddr(ns))
	}
	if n.Gateway != "" {
		h.Gateway = netip.MustParseAddr(n.Gateway)
	}
	// Two interfaces of one machine must not get one address.
	if len(n.MACs) > 0 && n.MACs[0] == mac && n.Address != "" {
		h.Address = netip.MustParsePrefix(n.Address)
	}
	return h
}
