package lab

import (
	"errors"
	"fmt"
	"net/netip"
)

// A Rack is a switch with hosts of its own, on the lab's wire by one cable: its
// uplink.
type Rack struct {
	network *Network
	bridge  string
	up      string // the wire's end of the cable
}

// Rack makes a new rack, whose uplink carries mbit megabits a second in each
// direction, in packets of up to mtu bytes.
func (n *Network) Rack(mbit, mtu int) (*Rack, error) {
	r := &Rack{network: n, bridge: n.port("rack"), up: n.port("up")}
	down := r.up + "d"
	n.mu.Lock()
	n.racks = append(n.racks, r)
	n.mu.Unlock()
	err := ip(
		"link add "+r.bridge+" type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
		"link add "+r.up+" type veth peer name "+down,
		"link set "+r.up+" master "+n.Bridge+" up",
		"link set "+down+" master "+r.bridge+" up",
		"link set "+r.bridge+" up",
	)
	if err = errors.Join(err, shape(r.up, mbit, mtu), shape(down, mbit, mtu)); err != nil {
		return nil, fmt.Errorf("rack: %w", err)
	}
	return r, nil
}

// Host makes a new host in the rack, as Network.Host does.
func (r *Rack) Host(name, mac string, addr netip.Addr) (*Host, error) {
	return r.network.host(r.bridge, name, mac, addr)
}

// Traffic is how many bytes came into the rack and went out by its uplink, with
// their headers.
func (r *Rack) Traffic() (in, out int64, err error) {
	in, err = counter(r.up, "tx_bytes")
	if err == nil {
		out, err = counter(r.up, "rx_bytes")
	}
	if err != nil {
		err = fmt.Errorf("%s: traffic: %w", r.bridge, err)
	}
	return in, out, err
}

// close takes away what was made; where it was not, that is fine.
func (r *Rack) close() {
	_ = ip("link delete " + r.up)
	_ = ip("link delete " + r.bridge)
}
