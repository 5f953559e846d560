package swarmtests

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"rookery/wire"
)

// groups are what the server of a story sends to, at nearly the rate of its link.
var groups = wire.Multicast{Group: "239.192.0.0/16", Port: 6882, Server: serverAddress}

const sendRate = "2400kB" // of 2,500,000 bytes a second

func byMulticast(transports ...string) way {
	return way{transports: transports, groups: &groups, serve: []string{"--multicast-rate", sendRate}}
}

func TestMulticastAlone(t *testing.T) {
	s := beginBy(t, 2*time.Minute, byMulticast("multicast"))
	s.serve()
	s.install(s.nodes)
	s.done(s.nodes)
	s.within(ideal * 13 / 10)
	s.copies(1.1)
}

// To one, too, if that is asked for, and its torrent file before it.
func TestMulticastToOne(t *testing.T) {
	by := byMulticast("multicast")
	by.serve = append(by.serve, "--multicast-min-clients", "1")
	s := beginBy(t, 2*time.Minute, by)
	one := s.nodes[:1]
	s.serve()
	s.install(one)
	s.expect(s.server, `multicast begins.* layer=`+wire.DigestOf(s.data.Torrent).Hex()[:12])
	s.expect(s.server, `multicast begins.* layer=`+s.data.Digest.Hex()[:12])
	s.done(one)
	s.never(one, `the torrent file comes in another way`)
	s.within(ideal * 13 / 10)
}

// Where nothing of what is sent arrives, as behind switches that snoop and nobody asks
// who is in a group, the swarm brings it all as soon as the nodes have said so.
func TestMulticastReachesNobody(t *testing.T) {
	by := byMulticast("multicast", "bittorrent", "http")
	by.groups = &wire.Multicast{Group: groups.Group, Port: groups.Port, Server: "10.8.0.1"}
	by.serve = append(by.serve, "--multicast-interface", "nowhere", "--multicast-min-clients", "1")
	s := beginBy(t, 2*time.Minute, by)
	s.on(s.server, "ip", "link", "add", "nowhere", "type", "veth", "peer", "name", "end")
	s.on(s.server, "ip", "address", "add", "10.8.0.1/24", "dev", "nowhere")
	s.on(s.server, "ip", "link", "set", "nowhere", "up")
	s.on(s.server, "ip", "link", "set", "end", "up")
	s.serve()
	s.install(s.nodes)
	s.done(s.nodes)
	for _, n := range s.nodes {
		if !said(n, `the torrent file comes in another way.* bytes in 2s`) {
			t.Errorf("%s has not waited for the torrent file", n.Name)
		}
	}
	s.within(ideal*14/10 + 10*time.Second)
	s.copies(1.6)
}

// copies checks that the server has sent no more than so many.
func (s *story) copies(most float64) {
	s.t.Helper()
	_, sent, err := s.server.host.Traffic()
	s.must(err)
	copies := float64(sent) / float64(s.data.Size)
	s.note("the server sent %.3f copies", copies)
	if copies > most {
		s.t.Errorf("the server sent %.2f copies, want at most %.2f", copies, most)
	}
}

// On switches that know who is in a group, those who are not get nothing; that needs
// somebody who asks, which here is the bridge itself.
func TestMulticastIPv6WithSnooping(t *testing.T) {
	by := byMulticast("multicast")
	six := wire.Multicast{Group: "ff15::1:0/112", Port: 6882, Server: "fd00:7::2"}
	by.groups = &six
	by.serve = append(by.serve, "--multicast-group", six.Group)
	s := beginBy(t, 2*time.Minute, by)
	s.bridge("mcast_snooping", "1", "mcast_querier", "1")
	t.Cleanup(func() { s.bridge("mcast_snooping", "0", "mcast_querier", "0") })
	for i, m := range append([]*member{s.server}, s.nodes...) {
		s.on(m, "ip", "address", "add", fmt.Sprintf("fd00:7::%d/64", 2+i), "dev", "eth0", "nodad")
	}
	other, err := network.Host("other", "", netip.MustParseAddr("10.7.0.99"))
	s.must(err)
	s.serve()
	s.install(s.nodes)
	s.done(s.nodes)
	s.within(ideal * 14 / 10)
	received, _, err := other.Traffic()
	s.must(err)
	s.note("who is not in the group received %d bytes", received)
	if received > s.data.Size/10 {
		t.Errorf("who is not in the group received %d bytes of %d", received, s.data.Size)
	}
}

func (s *story) bridge(settings ...string) {
	s.t.Helper()
	args := append([]string{"link", "set", network.Bridge, "type", "bridge"}, settings...)
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		s.t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// Nothing that nodes say arrives once they know what to listen for.
func TestMulticastWithoutAWayBack(t *testing.T) {
	by := byMulticast("multicast")
	by.serve = append(by.serve, "--multicast-always", "random:1")
	s := beginBy(t, 3*time.Minute, by)
	s.serve()
	s.lose(s.nodes, 1)
	s.install(s.nodes)
	for _, n := range s.nodes {
		s.expect(n, `rookery: plan: finished`)
	}
	s.on(s.server, "iptables", "--append", "INPUT", "--jump", "DROP")
	s.note("nobody hears the nodes any more")
	s.done(s.nodes)
	s.within(ideal * 3)
}

// lose makes nodes lose packets by chance.
func (s *story) lose(which []*member, percent float64) {
	s.t.Helper()
	for _, n := range which {
		s.must(n.host.Lose(percent))
	}
}

func TestMulticastLosesMuch(t *testing.T) {
	s := beginBy(t, 3*time.Minute, byMulticast("multicast"))
	s.serve()
	s.lose(s.nodes, 30)
	s.install(s.nodes)
	s.done(s.nodes)
	s.within(ideal * 3)
}

// Some come late and some come back: they have what they had, what is sent then,
// and a part of the next pass.
func TestMulticastLateAndAgain(t *testing.T) {
	s := beginBy(t, 3*time.Minute, byMulticast("multicast"))
	s.serve()
	late, again := s.nodes[7], s.nodes[6]
	s.install(s.nodes[:7])
	s.have(s.nodes[:7], 0.3)
	again.PowerOff()
	s.note("%s is gone", again.Name)
	s.have(s.nodes[:6], 0.6)
	s.install([]*member{late, again})
	s.note("%s is back, %s comes", again.Name, late.Name)
	s.done(s.nodes[:6])
	s.within(ideal * 14 / 10)
	s.done([]*member{late, again})
	s.within(ideal * 22 / 10)
	s.copies(1.8)
}

func TestMulticastServerKilledAndBack(t *testing.T) {
	s := beginBy(t, 3*time.Minute, byMulticast("multicast"))
	s.begun(0.3)
	back := s.outage()
	s.done(s.nodes)
	s.within(back + ideal*14/10)
}

// The sender is gone for good, the server's files are not.
func TestMulticastSenderGone(t *testing.T) {
	s := beginBy(t, 3*time.Minute, byMulticast("multicast", "bittorrent", "http"))
	s.begun(0.3)
	s.on(s.server, "iptables", "--append", "OUTPUT", "--protocol", "udp", "--jump", "DROP")
	s.note("the sender is gone")
	s.done(s.nodes)
	s.within(ideal * 17 / 10)
}

// Nodes that lose packets get from each other what they lack.
func TestMulticastBesideTheSwarm(t *testing.T) {
	s := beginBy(t, 2*time.Minute, byMulticast("multicast", "bittorrent"))
	s.serve()
	s.lose(s.nodes, 5)
	s.install(s.nodes)
	for i, g := range s.done(s.nodes) {
		if part := float64(g.peers) / float64(s.data.Size); part > 0.2 {
			t.Errorf("%s got %.2f of the image from others", nodeName(i), part)
		}
	}
	s.within(ideal * 15 / 10)
	s.copies(1.35)
}
