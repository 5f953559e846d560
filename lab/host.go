package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Host is a machine that is only a network namespace: programs started in
// it see one network card, with the MAC and address of the host, on the lab's
// wire. It is what a node is when its firmware and kernel do not matter.
type Host struct {
	Name    string
	Address netip.Addr
	MAC     string

	port string // the bridge's end of its cable
	todo chan func()
	done chan struct{}
}

// Host makes a new host. Without a MAC it gets one of its own.
func (n *Network) Host(name, mac string, addr netip.Addr) (*Host, error) {
	return n.host(n.Bridge, name, mac, addr)
}

func (n *Network) host(bridge, name, mac string, addr netip.Addr) (*Host, error) {
	h := &Host{Name: name, Address: addr, port: n.port("veth"), todo: make(chan func()), done: make(chan struct{})}
	ready := make(chan error)
	go func() {
		defer close(h.done)
		// Never unlocked: a thread with other namespaces ends with its goroutine.
		runtime.LockOSThread()
		ready <- h.enter(bridge, mac)
		for do := range h.todo {
			do()
		}
	}()
	if err := <-ready; err != nil {
		h.close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts = append(n.hosts, h)
	return h, nil
}

// enter gives the calling thread a network with one card, and its /sys.
func (h *Host) enter(bridge, mac string) error {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new namespaces: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer here.Close()
	outer := h.port
	hw := ""
	if mac != "" {
		hw = " address " + mac
	}
	// The cable is laid by the other side, which hands one end in here.
	errc := make(chan error)
	go func() {
		cable := exec.Command("ip", "link", "set", outer+"p", "netns", "/proc/self/fd/3")
		cable.ExtraFiles = []*os.File{here}
		errc <- func() error {
			if err := ip("link add " + outer + " type veth peer name " + outer + "p" + hw); err != nil {
				return err
			}
			if out, err := cable.CombinedOutput(); err != nil {
				return fmt.Errorf("ip link set netns: %w: %s", err, out)
			}
			return ip("link set " + outer + " master " + bridge + " up")
		}()
	}()
	if err := <-errc; err != nil {
		return err
	}
	err = ip(
		"link set lo up",
		"link set "+outer+"p name "+card,
		"address add "+netip.PrefixFrom(h.Address, Address.Bits()).String()+" broadcast + dev "+card,
		"link set "+card+" up",
	)
	if err != nil {
		return err
	}
	eth0, err := net.InterfaceByName(card)
	if err != nil {
		return err
	}
	h.MAC = eth0.HardwareAddr.String()
	return nil
}

// card is the host's own end of its cable.
const card = "eth0"

// Link makes the host's cable one of mbit megabits a second in both directions,
// with packets of up to mtu bytes. A queue holds what is sent in 400 ms: with
// less, fifty senders that begin at once lose packets that a switch would keep.
func (h *Host) Link(mbit, mtu int) error {
	err := shape(h.port, mbit, mtu)
	h.Do(func() { err = errors.Join(err, shape(card, mbit, mtu)) })
	if err != nil {
		return fmt.Errorf("%s: link: %w", h.Name, err)
	}
	return nil
}

// Lose makes the host lose so many percent of the packets that come to it, by chance.
func (h *Host) Lose(percent float64) (err error) {
	h.Do(func() {
		err = run("iptables", fmt.Sprintf("--append INPUT --match statistic --mode random --probability %.4f --jump DROP", percent/100))
	})
	if err != nil {
		return fmt.Errorf("%s: loss: %w", h.Name, err)
	}
	return nil
}

func shape(dev string, mbit, mtu int) error {
	return errors.Join(
		ip(fmt.Sprintf("link set %s mtu %d", dev, mtu)),
		run("tc", fmt.Sprintf("qdisc replace dev %s root tbf rate %dmbit burst 32kb latency 400ms", dev, mbit)))
}

// Congestion makes the host's connections use a congestion control that the
// kernel has, instead of the one that is this machine's default. It hangs on the
// route: the default of a namespace can be set to some of them only.
func (h *Host) Congestion(name string) (err error) {
	h.Do(func() {
		err = ip(fmt.Sprintf("route replace %s dev %s src %s congctl %s", Address.Masked(), card, h.Address, name))
	})
	if err != nil {
		return fmt.Errorf("%s: congestion control: %w", h.Name, err)
	}
	return nil
}

// Knows tells the host where the others are, for good. The kernel has one table
// of neighbours for all namespaces, and strands hosts when it has more than
// 1024 that were asked for (gc_thresh3); what was told is not counted.
func (h *Host) Knows(others []*Host) error {
	var lines strings.Builder
	for _, o := range others {
		if o != h {
			fmt.Fprintf(&lines, "neighbour replace %s lladdr %s dev %s nud permanent\n", o.Address, o.MAC, card)
		}
	}
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(lines.String())
	var out []byte
	var err error
	h.Do(func() { out, err = cmd.CombinedOutput() })
	if err != nil {
		return fmt.Errorf("%s: neighbours: %w: %s", h.Name, err, out)
	}
	return nil
}

// Split takes hosts off the wire and gives them one of their own, until heal.
func (n *Network) Split(hosts []*Host) (heal func() error, err error) {
	other := n.port("split")
	if err := ip("link add " + other + " type bridge stp_state 0 forward_delay 0 mcast_snooping 0"); err != nil {
		return nil, err
	}
	move := func(bridge string) (err error) {
		for _, h := range hosts {
			err = errors.Join(err, ip("link set "+h.port+" master "+bridge+" up"))
		}
		return err
	}
	err = errors.Join(ip("link set "+other+" up"), move(other))
	return func() error { return errors.Join(move(n.Bridge), ip("link delete "+other)) }, err
}

// Traffic is how many bytes the host has received and sent, with their headers.
func (h *Host) Traffic() (received, sent int64, err error) {
	received, err = counter(h.port, "tx_bytes") // seen from the bridge
	if err == nil {
		sent, err = counter(h.port, "rx_bytes")
	}
	if err != nil {
		err = fmt.Errorf("%s: traffic: %w", h.Name, err)
	}
	return received, sent, err
}

// Loopback is how many bytes the host has sent itself.
func (h *Host) Loopback() (n int64, err error) {
	h.Do(func() { n, err = counter("lo", "rx_bytes") })
	if err != nil {
		err = fmt.Errorf("%s: loopback: %w", h.Name, err)
	}
	return n, err
}

func counter(dev, name string) (int64, error) {
	b, err := os.ReadFile("/sys/class/net/" + dev + "/statistics/" + name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// Start starts cmd on the host; the caller waits for it.
func (h *Host) Start(cmd *exec.Cmd) error {
	errc := make(chan error, 1)
	h.todo <- func() { errc <- cmd.Start() }
	return <-errc
}

// Do calls f on a thread that is on the host; what f dials or listens on is
// the host's. Goroutines that f starts are elsewhere.
func (h *Host) Do(f func()) {
	back := make(chan struct{})
	h.todo <- func() { f(); close(back) }
	<-back
}

// close takes the host off the wire first: the kernel keeps its network for as
// long as a socket of it has something to say, and the next host may have its
// address.
func (h *Host) close() {
	_ = ip("link delete " + h.port) // where it was not made, that is fine
	close(h.todo)
	<-h.done
}
