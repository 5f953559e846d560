package lab

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Host is a machine that is only a network namespace: programs started in
// it see one network card, with the MAC and address of the host, on the lab's
// wire. It is what a node is when its firmware and kernel do not matter.
type Host struct {
	Name string
	todo chan func()
	done chan struct{}
}

// Host makes a new host. Without a MAC it gets one of its own.
func (n *Network) Host(name, mac string, addr netip.Addr) (*Host, error) {
	h := &Host{Name: name, todo: make(chan func()), done: make(chan struct{})}
	ready := make(chan error)
	go func() {
		defer close(h.done)
		// Never unlocked: a thread with other namespaces ends with its goroutine.
		runtime.LockOSThread()
		ready <- n.enter(mac, addr)
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
func (n *Network) enter(mac string, addr netip.Addr) error {
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
	outer, inner := n.port("veth"), "eth0"
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
			return ip("link set " + outer + " master " + n.Bridge + " up")
		}()
	}()
	if err := <-errc; err != nil {
		return err
	}
	return ip(
		"link set lo up",
		"link set "+outer+"p name "+inner,
		"address add "+netip.PrefixFrom(addr, Address.Bits()).String()+" dev "+inner,
		"link set "+inner+" up",
	)
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

func (h *Host) close() {
	close(h.todo)
	<-h.done
}
