// Package lab is a whole site on one machine: a private network, the server,
// and the machines to be installed, as virtual machines with their consoles or
// as plain processes in namespaces of their own. Nothing of it is visible
// outside, and all of it is gone when the program that entered it ends.
package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// inside marks, in the environment, the program that runs within the lab.
const inside = "ROOKERY_LAB=inside"

// Enter runs the calling program a second time in a private network with
// processes and mounts of its own, and calls run there: the first instance
// returns what run returned in the second. Signals go to the second one. It
// works from a main and from a TestMain, and needs root or user namespaces.
func Enter(run func(*Network) int) (code int, err error) {
	name, value, _ := strings.Cut(inside, "=")
	if os.Getenv(name) != value {
		return reexec()
	}
	// Children are not to take themselves for the inner instance.
	if err := os.Unsetenv(name); err != nil {
		return 1, fmt.Errorf("lab: %w", err)
	}
	n, err := newNetwork()
	if err != nil {
		return 1, fmt.Errorf("lab: %w", err)
	}
	code = run(n)
	return code, n.Close()
}

func reexec() (int, error) {
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return 1, fmt.Errorf("lab: %w: virtual machines need it for their network (modprobe tun; in a container: --device /dev/net/tun)", err)
	}
	tun.Close()

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// The process namespace is what makes "all is gone" true: when its
		// first process dies, however it dies, the kernel kills the others.
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true, // a terminal's ^C comes once, from us
	}
	hint := "that needs root"
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
		hint = "run it as root, or allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
	}

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(signals)
	// Pdeathsig looks at the thread that started the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 1, fmt.Errorf("lab: new namespaces: %w: %s", err, hint)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			cmd.Process.Signal(s) // an error means that it has just ended
		case err := <-done:
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.ExitCode() < 0 {
				return 1, fmt.Errorf("lab: %s", exit)
			}
			return cmd.ProcessState.ExitCode(), nil
		}
	}
}

// Address is that of the lab's server, and its network.
var Address = netip.MustParsePrefix("10.7.0.1/24")

// A Network is one wire with the server at Address on Bridge.
type Network struct {
	Bridge string

	mu    sync.Mutex
	ports int
	hosts []*Host
	racks []*Rack
}

func newNetwork() (*Network, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	// /sys shows the network of whoever mounted it.
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return nil, fmt.Errorf("mount /sys: %w", err)
	}
	n := &Network{Bridge: "rookery0"}
	// A bridge without ports has no carrier, and no IPv6 address to answer
	// router solicitations from: this cable is always there. The bridge's own
	// MAC would follow its ports; fixed, nobody's ARP cache is ever wrong.
	err := ip(
		"link set lo up",
		"link add "+n.Bridge+" address 52:54:00:07:ff:ff type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
		"link add rookery-up type veth peer name rookery-end",
		"link set rookery-end up",
		"link set rookery-up master "+n.Bridge+" up",
		"address add "+Address.String()+" dev "+n.Bridge,
		"link set "+n.Bridge+" up",
	)
	if err != nil {
		return nil, err
	}
	return n, nil
}

// ServeFlags are those of rookery serve on this network.
func (n *Network) ServeFlags() []string {
	return []string{"--interface", n.Bridge, "--address", Address.Addr().String(), "--pool", "10.7.0.100-10.7.0.200"}
}

// Close ends what Host and Rack started. The rest ends with the process.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, h := range n.hosts {
		h.close()
	}
	for _, r := range n.racks {
		r.close()
	}
	n.hosts, n.racks = nil, nil
	return nil
}

// tap makes a new port for a virtual machine and names it.
func (n *Network) tap() (string, error) {
	name := n.port("tap")
	return name, ip(
		"tuntap add dev "+name+" mode tap",
		"link set "+name+" master "+n.Bridge+" up",
	)
}

// Uplink limits what the server sends to all nodes together to so many
// megabits a second, as a real one's wire does; 0 lifts the limit. What nodes
// send each other does not pass here.
func (n *Network) Uplink(mbit int) error {
	if mbit == 0 {
		return run("tc", "qdisc delete dev "+n.Bridge+" root")
	}
	return run("tc", fmt.Sprintf("qdisc replace dev %s root tbf rate %dmbit burst 256kb latency 200ms", n.Bridge, mbit))
}

func (n *Network) port(kind string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ports++
	return fmt.Sprintf("%s%d", kind, n.ports)
}

// ip carries out lines of ip(8) commands.
func ip(lines ...string) error {
	for _, line := range lines {
		if err := run("ip", line); err != nil {
			return err
		}
	}
	return nil
}

func run(program, line string) error {
	out, err := exec.Command(program, strings.Fields(line)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, line, err, strings.TrimSpace(string(out)))
	}
	return nil
}
