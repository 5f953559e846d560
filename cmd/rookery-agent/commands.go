package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"rookery/agent/host"
	"rookery/agent/install"
	"rookery/agent/report"
	"rookery/disklayout"
	"rookery/wire"
)

// usageError is a command line that cannot be carried out.
type usageError struct{ error }

func isUsage(err error) bool { return errors.As(err, new(usageError)) }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// common are the flags of both commands.
type common struct {
	site, http, disk, root, end, listen, firmware string
	noLoader                                      bool
	seedFor                                       *time.Duration
}

func (c *common) flags(name string, stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&c.site, "site", wire.SiteFile, "`FILE` with the site's public key and CA (site.json), which all trust hangs on")
	fs.StringVar(&c.http, "http", "", "`URL` of the server's files, for example http://192.0.2.1:80")
	fs.StringVar(&c.disk, "disk", "", "image `FILE` or device to install onto; ERASES it. Needs root. Without it, --root is installed into")
	fs.StringVar(&c.root, "root", "", "`DIR` to install into, or with --disk to mount the new root at")
	fs.StringVar(&c.end, "end", "exit", "what to do afterwards, whatever the script says; a plain process can only `exit`")
	fs.StringVar(&c.listen, "listen", ":6881", "`ADDRESS` to exchange pieces with other nodes at; \"\" takes no part in swarms")
	fs.StringVar(&c.firmware, "firmware", "", "firmware to install for, `bios or uefi`; the default is this machine's")
	fs.Func("seed-for", "serve other nodes for `DURATION` at the most, such as 90s, whatever the script says", func(s string) error {
		d, err := time.ParseDuration(s)
		if err == nil && d < 0 {
			err = errors.New("want 0 or more")
		}
		c.seedFor = &d
		return err
	})
	fs.BoolVar(&c.noLoader, "no-loader", false, "with --disk: install no boot loader")
	return fs
}

func (c *common) parse(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return flag.ErrHelp
		}
		return usageError{err}
	}
	switch {
	case fs.NArg() > 0:
		return usagef("unexpected argument %q", fs.Arg(0))
	case c.end != string(wire.Exit):
		return usagef("--end %s: a plain process can only exit", c.end)
	case c.root == "":
		return usagef("--root is missing")
	case c.http == "":
		return usagef("--http is missing")
	case c.firmware != "" && c.firmware != string(disklayout.BIOS) && c.firmware != string(disklayout.UEFI):
		return usagef("--firmware %s: want bios or uefi", c.firmware)
	}
	return nil
}

// agent makes an agent that is a plain process.
func (c *common) agent(stderr io.Writer) (*agent, func(), error) {
	if c.disk != "" {
		if _, err := oneDisk(c.disk); err != nil {
			return nil, nil, err
		}
	}
	site, err := readSite(c.site)
	if err != nil {
		return nil, nil, err
	}
	boot := newBoot()
	console := report.NewConsole(report.Screen{W: stderr})
	rep := report.New(boot, console, nil)
	firmware := disklayout.Firmware(c.firmware)
	if firmware == "" {
		firmware = host.Firmware(os.DirFS("/sys"))
	}
	a := &agent{boot: boot, site: site, report: rep, log: rep.Logger(), console: console, http: c.http, listen: c.listen, end: wire.Ending(c.end), seedFor: c.seedFor}
	a.machine = func() install.Machine {
		if c.disk == "" {
			return install.Directory{Path: c.root, Log: a.log}
		}
		return &install.Computer{Disks: func() ([]disklayout.Disk, error) { return oneDisk(c.disk) }, Firmware: firmware, Root: c.root, NoLoader: c.noLoader, Log: a.log}
	}
	a.inventory = func() (wire.Inventory, error) {
		inv, err := host.Inventory(os.DirFS("/sys"), os.DirFS("/proc"))
		inv.Firmware, inv.Disks = firmware, nil
		if err == nil && c.disk != "" {
			inv.Disks, err = oneDisk(c.disk)
		}
		return inv, err
	}
	a.extract.Unprivileged = os.Geteuid() != 0
	return a, func() { console.Close(2 * time.Second) }, nil
}

// oneDisk is the disk at path and no other.
func oneDisk(path string) ([]disklayout.Disk, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if mode := st.Mode(); !mode.IsRegular() && mode.Type() != os.ModeDevice {
		return nil, fmt.Errorf("%s is neither an image file nor a disk", path)
	}
	size, err := f.Seek(0, io.SeekEnd) // of a device, too
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return []disklayout.Disk{{Name: filepath.Base(path), Path: path, Size: size, SectorSize: 512}}, nil
}

func installCommand(ctx context.Context, args []string, stderr io.Writer) error {
	var c common
	fs := c.flags("install", stderr)
	script := fs.String("script", "", "signed install script: `FILE` or http(s) URL")
	if err := c.parse(fs, args); err != nil {
		return err
	}
	if *script == "" {
		return usagef("--script is missing")
	}
	a, done, err := c.agent(stderr)
	if err != nil {
		return err
	}
	defer done()
	a.report.Start(wire.PhaseScript, *script)
	sealed, err := readScript(ctx, *script)
	var s wire.Script
	if err == nil {
		s, err = wire.Open(sealed, a.site.Key)
	}
	a.report.Finish(wire.PhaseScript, s.Image.Name, nil, err)
	if err != nil {
		return err
	}
	_, err = a.install(ctx, s, func(context.Context, []wire.Event) error { return nil })
	return err
}

// readScript reads the envelope from a file or from the web.
func readScript(ctx context.Context, name string) ([]byte, error) {
	if !strings.HasPrefix(name, "http://") && !strings.HasPrefix(name, "https://") {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return io.ReadAll(io.LimitReader(f, wire.MaxScript+1))
	}
	return (&install.Site{Base: name, Client: http.DefaultClient}).Get(ctx, "", wire.MaxScript)
}

func runCommand(ctx context.Context, args []string, stderr io.Writer) error {
	var c common
	fs := c.flags("run", stderr)
	api := fs.String("api", "", "`URL` of the server's API, for example https://192.0.2.1:443")
	mac := fs.String("mac", "", "`MAC` address to say hello with; the default is this machine's interfaces")
	if err := c.parse(fs, args); err != nil {
		return err
	}
	if *api == "" {
		return usagef("--api is missing")
	}
	if *mac != "" {
		parsed, err := net.ParseMAC(*mac)
		if err != nil {
			return usagef("--mac: %v", err)
		}
		*mac = parsed.String()
	}
	a, done, err := c.agent(stderr)
	if err != nil {
		return err
	}
	defer done()
	if a.api, err = report.NewAPI(*api, a.site.CA); err != nil {
		return err
	}
	if *mac != "" {
		whole := a.inventory
		a.inventory = func() (wire.Inventory, error) {
			inv, err := whole()
			inv.NICs = []wire.NIC{{Name: "eth0", MAC: *mac, Carrier: true}}
			inv.UUID, inv.Serial = "", "" // of the host, which has other agents, too
			return inv, err
		}
	}
	neighbors, deaf := hearNeighbors(ctx, a.log)
	defer deaf()
	a.neighbors = neighbors
	_, err = a.live(ctx)
	return err
}
