package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"rookery/agent/host"
	"rookery/agent/install"
	"rookery/agent/netup"
	"rookery/agent/pid1"
	"rookery/agent/report"
	"rookery/disklayout"
	"rookery/wire"
)

// Where things are in the initramfs.
const (
	modulesFile  = "/etc/rookery/modules"
	runDir       = "/run/rookery"
	targetDir    = "/run/rookery/root"
	shellPath    = "/bin/sh"
	childCommand = "boot" // what the first process starts itself with
	searchPath   = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// first is the life of process 1. The work is done by a child, so that this
// process can wait for everybody's orphans, and is still there when the child
// has crashed or was killed for its memory.
func first() {
	// A signal without a handler that Go knows would end us, and with us the kernel.
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	_ = os.Setenv("PATH", searchPath)
	_ = os.Setenv("HOME", "/")
	_ = os.Setenv("TERM", "linux")
	say := func(line string) { fmt.Fprintf(os.Stderr, "rookery: %s\r\n", line) }
	if err := pid1.MountAll(pid1.Early...); err != nil {
		say("boot: " + err.Error())
	}
	if err := pid1.Entropy(); err != nil {
		say("boot: entropy: " + err.Error())
	}
	child := exec.Command("/proc/self/exe", childCommand)
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	code, err := pid1.Supervise(child)
	ending := wire.Shell
	switch {
	case err != nil:
		say("boot: agent: " + err.Error())
	case code == exitReboot:
		ending = wire.Reboot
	case code == exitPoweroff:
		ending = wire.Poweroff
	case code != exitShell:
		say(fmt.Sprintf("boot: the agent ended with code %d, which is a bug or a lack of memory", code))
	}
	if ending == wire.Shell {
		ending = wire.Reboot
		if err := shells(say); err != nil {
			say("shell: " + err.Error() + "; restarting in a minute")
			time.Sleep(time.Minute)
		}
	}
	for {
		say("end: " + string(ending))
		if err := pid1.End(ending, say); err != nil {
			say("end: " + err.Error())
		}
		time.Sleep(10 * time.Second)
	}
}

// shells runs a shell on each console until all of them have been left.
func shells(say func(string)) error {
	say("shell: log in " + runDir + "/log; to start again: exit, or reboot -f")
	var cmds []*exec.Cmd
	for _, name := range pid1.Consoles(os.DirFS("/sys")) {
		tty, err := os.OpenFile(filepath.Join("/dev", name), os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			continue
		}
		cmd := exec.Command(shellPath)
		pid1.Console(cmd, tty)
		cmds = append(cmds, cmd)
	}
	if len(cmds) == 0 {
		cmd := exec.Command(shellPath)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmds = append(cmds, cmd)
	}
	_, err := pid1.Supervise(cmds...)
	return err
}

// boot is the work on a machine that is all ours; the exit code is its ending.
func boot(ctx context.Context) int {
	ending, err := bootOnce(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "rookery: %v\r\n", err)
	}
	switch ending {
	case wire.Reboot:
		return exitReboot
	case wire.Poweroff:
		return exitPoweroff
	}
	return exitShell // exit makes no sense for a machine
}

func bootOnce(ctx context.Context) (wire.Ending, error) {
	console := report.NewConsole(screens()...)
	defer console.Close(3 * time.Second)
	id := newBoot()
	rep := report.New(id, console, logFile())
	log := rep.Logger()
	rep.Start(wire.PhaseBoot, "")
	sys, proc := os.DirFS("/sys"), os.DirFS("/proc")
	site, err := readSite(wire.SiteFile)
	if err == nil {
		err = pid1.LoadModules(sys, modulesFile, log)
	}
	firmware := host.Firmware(sys)
	efivars := ""
	if firmware == disklayout.UEFI {
		if e := pid1.MountAll(pid1.EFIVars); e == nil {
			efivars = pid1.EFIVars.Target
		}
	}
	rep.Finish(wire.PhaseBoot, string(firmware), nil, err)
	if err != nil {
		return wire.Shell, fmt.Errorf("boot: %w", err)
	}

	rep.Start(wire.PhaseNetwork, "")
	network := netup.Kernel{ResolvConf: "/etc/resolv.conf"}
	if err := network.SetUp("lo"); err != nil { // rsync is spoken to by loopback
		log.Warn("network", "err", err)
	}
	neighbors, deaf := hearNeighbors(ctx, log)
	defer deaf()
	lease, err := netup.Up(ctx, network, log)
	rep.Finish(wire.PhaseNetwork, fmt.Sprintf("%s %s", lease.NIC, lease.Address), nil, err)
	if err != nil {
		return wire.Shell, fmt.Errorf("network: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	var keeper sync.WaitGroup
	defer keeper.Wait()
	defer stop()
	keeper.Go(func() { _ = netup.Keep(ctx, network, lease, log) }) // ends with nil alone

	cmdline, _ := os.ReadFile("/proc/cmdline")
	apiURL, httpURL := servers(string(cmdline), lease)
	api, err := report.NewAPI(apiURL, site.CA)
	if err != nil {
		return wire.Shell, err
	}
	a := &agent{
		boot: id, site: site, api: api, http: httpURL, listen: ":6881", report: rep, console: console, log: log, neighbors: neighbors,
		machine: func() install.Machine {
			return &install.Computer{
				Disks:    func() ([]disklayout.Disk, error) { return host.Disks(sys) },
				Firmware: firmware, Root: targetDir, EFIVars: efivars, Patience: 30 * time.Second, Log: log,
			}
		},
		inventory: func() (wire.Inventory, error) {
			inv, err := host.Inventory(sys, proc)
			for i, nic := range inv.NICs {
				if nic.Name == lease.NIC {
					inv.NICs[i].Address = lease.Address.String()
				}
			}
			return inv, err
		},
	}
	if inv, err := a.inventory(); err == nil {
		a.memory = min(max(32<<20, inv.Memory/8), 256<<20)
	}
	ending, err := a.live(ctx)
	if err == nil && ending == wire.Reboot {
		return ending, nil
	}
	if err != nil {
		err = fmt.Errorf("%w (%s)", err, ending)
		if ending == wire.Reboot {
			console.Print("rookery: starting again in 10 s")
			sleep(ctx, 10*time.Second) // time to read, and no storm of restarts
		}
	}
	return ending, err
}

// servers are the URLs of the API and of the files: from the kernel command
// line, else where DHCP says that this machine is booted from.
func servers(cmdline string, lease netup.Lease) (api, http string) {
	for _, word := range strings.Fields(cmdline) {
		key, value, _ := strings.Cut(word, "=")
		if u, err := url.Parse(value); err != nil || u.Host == "" {
			continue
		}
		switch key {
		case "rookery.api":
			api = value
		case "rookery.http":
			http = value
		}
	}
	if api == "" {
		api = fmt.Sprintf("https://%s:443", lease.NextServer)
	}
	if http == "" {
		http = fmt.Sprintf("http://%s:80", lease.NextServer)
	}
	return api, http
}

// screens are the consoles of the kernel. A serial one is often logged, so
// progress is not drawn over and over there.
func screens() []report.Screen {
	// Drivers' chatter would tear the progress line; a kernel panic still shows.
	_, _ = unix.Klogctl(consoleLevel, nil)
	var list []report.Screen
	for _, name := range pid1.Consoles(os.DirFS("/sys")) {
		if f, err := os.OpenFile(filepath.Join("/dev", name), os.O_WRONLY|unix.O_NOCTTY, 0); err == nil {
			list = append(list, report.Screen{W: f, Redraw: !strings.HasPrefix(name, "ttyS") && !strings.HasPrefix(name, "ttyAMA")})
		}
	}
	if len(list) == 0 {
		list = append(list, report.Screen{W: os.Stderr})
	}
	return list
}

const consoleLevel = 6 // SYSLOG_ACTION_CONSOLE_OFF of syslog(2)

// logFile is a writer of the log in memory, for whoever is at the shell.
func logFile() func([]byte) {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(runDir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil
	}
	return func(b []byte) { _, _ = f.Write(b) } // a full /run is no reason to stop
}
