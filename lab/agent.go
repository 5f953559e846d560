package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"rookery/disklayout"
	"rookery/wire"
)

// An Agent is a node without firmware and kernel of its own: the agent as a
// plain process on a Host, with a file for a disk. What it does not show is
// quick to show on it. It needs root, for its disk.
type Agent struct {
	Name     string
	MAC      string
	Address  netip.Addr
	Firmware disklayout.Firmware // to install for
	Disk     int64               // bytes of the disk, empty at first; 0 means 4 GiB
	Dir      string              // keeps disk.img, site.json and console.log
	Program  string              // rookery-agent

	power
	host *Host
}

// PlugAgent connects a new agent to the network, switched off, its disk empty.
// It asks the lab's server and trusts site, as if an initramfs had told it.
func (n *Network) PlugAgent(a *Agent, site wire.Site) error {
	a.Console = NewConsole()
	if a.Disk == 0 {
		a.Disk = 4 << 30
	}
	err := func() error {
		if err := os.MkdirAll(a.path("root"), 0o755); err != nil {
			return err
		}
		if err := sparse(a.path("disk.img"), a.Disk); err != nil {
			return err
		}
		trust, err := json.Marshal(site)
		if err != nil {
			return err
		}
		if err := os.WriteFile(a.path("site.json"), trust, 0o644); err != nil {
			return err
		}
		a.host, err = n.Host(a.Name, a.MAC, a.Address)
		return err
	}()
	if err != nil {
		return fmt.Errorf("%s: plug: %w", a.Name, err)
	}
	return nil
}

func (a *Agent) path(file string) string { return filepath.Join(a.Dir, file) }

// PowerOn starts the agent.
func (a *Agent) PowerOn() error {
	cmd := exec.Command(a.Program, "run",
		"--site", a.path("site.json"), "--mac", a.MAC, "--firmware", string(a.Firmware),
		"--api", "https://"+Address.Addr().String()+":443", "--http", "http://"+Address.Addr().String()+":80",
		"--disk", a.path("disk.img"), "--root", a.path("root"))
	// What it has mounted is gone when it is, as on a machine.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	if err := a.on(cmd, a.host.Start, a.path("console.log")); err != nil {
		return fmt.Errorf("%s: power on: %w", a.Name, err)
	}
	return nil
}

// PowerCycle takes the power away and gives it back.
func (a *Agent) PowerCycle() error {
	a.PowerOff()
	return a.PowerOn()
}

// sparse makes an empty file of that size.
func sparse(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}
