package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"rookery/boot/netboot"
	"rookery/server/dhcpd"
	"rookery/server/fleet"
	"rookery/server/httpd"
	"rookery/server/radvd"
	"rookery/server/rsyncd"
	"rookery/server/seed"
	"rookery/server/serve"
	"rookery/server/site"
	"rookery/server/store"
	"rookery/server/tftpd"
	"rookery/transport"
	"rookery/transport/swarm"
	"rookery/transport/tracker"
	"rookery/wire"
)

// A serveConfig is the flags of rookery serve.
type serveConfig struct {
	iface   string
	address string
	dhcp    dhcpConfig
	off     []string

	httpPort, httpsPort, swarmPort, tftpPort, rsyncPort, rsyncTLSPort, rsyncSSHPort uint16

	egress string // limit

	multicast multicastConfig

	ipxe  string
	args  string
	debug bool
}

// serveName is the command whose flags can also be set by file and environment.
const serveName = "serve"

// services are what can be switched off.
var services = []string{"dhcp", "tftp", "radvd", "seeder", "multicast", "rsync"}

func serveCommand(dir func() stateDir) *cobra.Command {
	var c serveConfig
	cmd := &cobra.Command{
		Use:   serveName,
		Short: "Run the server: DHCP, TFTP, HTTP, agents' API, tracker, seeder, rsync",
		Long: `Run the server: DHCP, TFTP, HTTP, agents' API, tracker, seeder, rsync.

It answers on one interface. Machines that nobody has accepted boot the agent too,
and wait: see 'rookery node list' and 'rookery node accept'. A restart loses nothing
and stops no installation.`,
		Example: "  rookery serve --interface lan0 --pool 10.7.0.100-10.7.0.200",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if c.debug {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			return runServer(cmd.Context(), dir(), c, log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.iface, "interface", "", "network interface that machines are on (required)")
	f.StringVar(&c.address, "address", "", "own address there (default the interface's first IPv4 address)")
	f.StringSliceVar(&c.dhcp.pools, "pool", nil, "addresses for machines without a fixed one, FIRST-LAST; with /BITS for a network behind a relay agent; repeatable")
	f.StringSliceVar(&c.dhcp.routers, "router", nil, "router told to machines, one for each network; repeatable")
	f.StringSliceVar(&c.dhcp.dns, "dns", nil, "name servers told to machines")
	f.StringVar(&c.dhcp.domain, "domain", "", "domain told to machines")
	f.DurationVar(&c.dhcp.lease, "lease-time", time.Hour, "how long an address of the pool is given for")
	f.StringSliceVar(&c.off, "without", nil, "services not to run: "+strings.Join(services, ", "))
	f.Uint16Var(&c.httpPort, "http-port", 80, "boot files, image files and tracker")
	f.Uint16Var(&c.httpsPort, "https-port", 443, "agents' API")
	f.Uint16Var(&c.swarmPort, "swarm-port", 6881, "seeder")
	f.Uint16Var(&c.tftpPort, "tftp-port", 69, "boot programs for PXE")
	f.Uint16Var(&c.rsyncPort, "rsync-port", 873, "images as files, by rsync, not encrypted; 0 for none")
	f.Uint16Var(&c.rsyncTLSPort, "rsync-tls-port", 874, "the same over TLS; 0 for none")
	f.Uint16Var(&c.rsyncSSHPort, "rsync-ssh-port", 0, "the same by ssh, such as 2222; 0 for none")
	f.StringVar(&c.egress, "egress-limit", "none", "what layers may take of the uplink in bytes a second, such as 100MB, by HTTP, swarm and rsync together")
	c.multicast.flags(f)
	f.StringVar(&c.ipxe, "ipxe", "/usr/lib/ipxe", "directory of iPXE's boot programs")
	f.StringVar(&c.args, "kernel-args", netboot.DefaultArgs, "kernel arguments of the agent")
	f.BoolVar(&c.debug, "debug", false, "log every request")
	return cmd
}

// shortestLease is what a machine can renew in time.
const shortestLease = time.Minute

func (c serveConfig) check() error {
	if c.iface == "" {
		return errors.New("serve: --interface is missing: the network interface that machines are on")
	}
	for _, name := range c.off {
		if !slices.Contains(services, name) {
			return fmt.Errorf("serve: without: %q is not one of %s", name, strings.Join(services, ", "))
		}
	}
	if min(c.httpPort, c.httpsPort, c.swarmPort, c.tftpPort) == 0 {
		return errors.New("serve: a port is 0, want 1 to 65535")
	}
	if max(c.rsyncPort, c.rsyncTLSPort, c.rsyncSSHPort) == 0 && !slices.Contains(c.off, "rsync") {
		return errors.New("serve: rsync-port, rsync-tls-port and rsync-ssh-port are all 0: to serve no images by rsync, say --without rsync")
	}
	if c.dhcp.lease < shortestLease {
		return fmt.Errorf("serve: lease-time: %s, want at least %s", c.dhcp.lease, shortestLease)
	}
	if c.dhcp.domain != "" {
		for label := range strings.SplitSeq(c.dhcp.domain, ".") {
			if err := wire.CheckHostname(label); err != nil {
				return fmt.Errorf("serve: domain: %w", err)
			}
		}
	}
	if err := netboot.CheckArgs(c.args); err != nil {
		return fmt.Errorf("serve: kernel-args: %w", err)
	}
	return nil
}

// boots says whether machines are sent here to boot.
func (c serveConfig) boots() bool {
	return !slices.Contains(c.off, "dhcp") || !slices.Contains(c.off, "tftp")
}

// noRsync says why nobody gets files by rsync, nil when they do.
func (c serveConfig) noRsync() error {
	if slices.Contains(c.off, "rsync") {
		return errors.New("rsync: the server runs without it (--without rsync)")
	}
	if err := rsyncd.Available(); err != nil {
		return fmt.Errorf("rsync: the server cannot run it: %w", err)
	}
	return nil
}

// byRsync are the versions that nodes are to get by rsync, if it comes to that.
func byRsync(machines *fleet.Fleet) func(context.Context) (map[wire.Digest]bool, error) {
	return func(ctx context.Context) (map[wire.Digest]bool, error) {
		needed, err := machines.Needed(ctx)
		found := map[wire.Digest]bool{}
		for _, n := range needed {
			if n.Rsync {
				found[n.Manifest] = true
			}
		}
		return found, err
	}
}

// bootable says what machines would miss when they boot.
func bootable(dir stateDir, ipxe string) error {
	for _, name := range []string{netboot.FileBIOS, netboot.FileUEFI} {
		if _, err := os.Stat(filepath.Join(ipxe, name)); err != nil {
			return fmt.Errorf("serve: boot program: %w: install Debian's package ipxe, or name its directory with --ipxe", err)
		}
	}
	for _, file := range []string{dir.kernel(), dir.initramfs()} {
		if _, err := os.Stat(file); err != nil {
			return fmt.Errorf("serve: %w: make it with 'rookery initramfs build'", err)
		}
	}
	return nil
}

// runServer checks everything that can be checked, takes all ports, and then
// runs the services until ctx ends or one of them fails.
func runServer(ctx context.Context, dir stateDir, c serveConfig, log *slog.Logger) error {
	if err := c.check(); err != nil {
		return err
	}
	rate, err := wire.ParseRate(c.egress)
	if err != nil {
		return fmt.Errorf("serve: egress-limit: %w", err)
	}
	egress := transport.NewLimiter(rate)
	own, err := ownAddress(c.iface, c.address)
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	subnets, err := c.dhcp.subnets(own)
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	outlet, groups, multicastRate, err := c.multicast.check(c.iface, own.Addr())
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	if c.boots() {
		if err := bootable(dir, c.ipxe); err != nil {
			return err
		}
	}
	files := bootFiles{os.DirFS(dir.boot()), os.DirFS(c.ipxe)}

	addr := own.Addr()
	at := func(port uint16) string { return netip.AddrPortFrom(addr, port).String() }
	where := netboot.Site{Server: addr, HTTP: "http://" + at(c.httpPort), API: "https://" + at(c.httpsPort), Args: c.args}

	keys, err := site.Open(dir.site())
	if err != nil {
		return err
	}
	tlsConfig, err := keys.TLS()
	if err != nil {
		return err
	}
	hostKey, err := keys.HostKey()
	if err != nil {
		return err
	}
	var ln listeners
	defer ln.close()
	public, agents, seeds := ln.tcp(at(c.httpPort)), ln.tcp(at(c.httpsPort)), ln.tcp(at(c.swarmPort))
	noRsync := c.noRsync()
	var plain, sealed, tunnel net.Listener
	if noRsync == nil && c.rsyncPort != 0 {
		plain = ln.tcp(at(c.rsyncPort))
	}
	if noRsync == nil && c.rsyncTLSPort != 0 {
		if tcp := ln.tcp(at(c.rsyncTLSPort)); ln.err == nil {
			sealed = tls.NewListener(tcp, tlsConfig)
		}
	}
	if noRsync == nil && c.rsyncSSHPort != 0 {
		tunnel = ln.tcp(at(c.rsyncSSHPort))
	}
	if ln.err != nil {
		return fmt.Errorf("serve: %w", ln.err)
	}

	images, err := openImages(dir)
	if err != nil {
		return err
	}
	peer := swarm.NewPeer(seeds, log)
	peer.Limit(egress, nil)
	seeder := &seed.Seeder{Store: images, Peer: peer, Tracker: where.HTTP + wire.PathAnnounce, Log: log}
	if err := seeder.All(ctx); err != nil { // of an image; the nodes of the others need us
		log.Error("not every image can be installed", "err", err)
	}
	records, err := store.Open(dir.records())
	if err != nil {
		return err
	}
	defer records.Close()
	sender, err := c.multicast.carousel(ctx, outlet, multicastRate, images, seeder, log)
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	settings := fleet.Config{
		Store: records, Images: seeder.Image, Key: keys.Key, TokenKey: keys.TokenKey(), Log: log, Server: addr,
	}
	if !slices.Contains(c.off, "multicast") {
		settings.Multicast = &groups
	}
	machines, err := fleet.New(ctx, settings)
	if err != nil {
		return err
	}
	copies := &rsyncd.Server{
		Dir: dir.rsync(), Store: images, Needed: byRsync(machines), Log: log,
		Address: addr, Plain: plain, TLS: sealed, SSH: tunnel, HostKey: hostKey, Egress: egress,
	}
	trees := copies.Tree
	if noRsync != nil {
		log.Warn("no images by rsync", "err", noRsync)
		trees = func(context.Context, wire.Digest) (wire.Tree, error) { return wire.Tree{}, noRsync }
	}
	announces := tracker.New(seeder.Known)
	announces.Rack = machines.RackAt
	web := &httpd.Server{
		Fleet: machines, Blobs: images.Blob, Egress: egress, Giver: seeder.Giver, Trees: trees, Boot: files,
		Tracker: announces, Site: where, Log: log,
	}
	if settings.Multicast != nil {
		web.Want = sender.Hear
	}
	publicRoutes, agentRoutes, adminRoutes := web.Routes()
	// The records are ours alone by now, so a socket that is there has no owner.
	admin := ln.unix(dir.admin())
	if ln.err != nil {
		return fmt.Errorf("serve: %w", ln.err)
	}

	parts := []serve.Part{
		{Name: "http", Run: func(ctx context.Context) error { return httpd.Serve(ctx, public, publicRoutes, log) }},
		{Name: "api", Run: func(ctx context.Context) error {
			return httpd.Serve(ctx, tls.NewListener(agents, tlsConfig), agentRoutes, log)
		}},
		{Name: "admin", Run: func(ctx context.Context) error { return httpd.Serve(ctx, admin, adminRoutes, log) }},
		{Name: "images", Run: seeder.Run},
	}
	for _, p := range []serve.Part{
		{Name: "seeder", Run: peer.Run},
		{Name: "multicast", Run: sender.Run},
		{Name: "dhcp", Run: (&dhcpd.Server{
			Interface: c.iface, Subnets: subnets, Site: where, Hosts: hosts{machines},
			Leases: leases{context.WithoutCancel(ctx), records}, Relayed: machines.Relayed, Log: log,
		}).Run},
		{Name: "tftp", Run: (&tftpd.Server{Addr: at(c.tftpPort), Files: files, Log: log}).Run},
		{Name: "radvd", Run: (&radvd.Server{Interface: c.iface, Log: log}).Run},
		{Name: "rsync", Run: copies.Run},
	} {
		if !slices.Contains(c.off, p.Name) && (p.Name != "rsync" || noRsync == nil) {
			parts = append(parts, p)
		}
	}
	log.Info("serving", "interface", c.iface, "address", own, "http", where.HTTP, "api", where.API, "state", dir.path)
	return serve.All(ctx, log, parts...)
}

// listeners takes ports until one cannot be had.
type listeners struct {
	all []net.Listener
	err error
}

func (l *listeners) tcp(addr string) net.Listener { return l.listen("tcp", addr) }

// unix takes a socket that only its owner can open, in place of what a killed
// server left behind.
func (l *listeners) unix(path string) net.Listener {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && l.err == nil {
		l.err = err
	}
	ln := l.listen("unix", path)
	if l.err == nil {
		l.err = os.Chmod(path, 0o600)
	}
	return ln
}

func (l *listeners) listen(network, addr string) net.Listener {
	if l.err != nil {
		return nil
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		l.err = err
		return nil
	}
	l.all = append(l.all, ln)
	return ln
}

func (l *listeners) close() {
	for _, ln := range l.all {
		ln.Close()
	}
}

// bootFiles are the files machines boot, of several directories: the first that
// has a name answers for it. Debian's package has a link in its directory to
// /boot/ipxe.efi, so links are followed.
type bootFiles []fs.FS

// Open makes bootFiles a fs.FS.
func (b bootFiles) Open(name string) (f fs.File, err error) {
	for _, dir := range b {
		if f, err = dir.Open(name); !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	return f, err
}
