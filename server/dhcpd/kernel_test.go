package dhcpd_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"rookery/boot/netboot"
	"rookery/netnstest"
	"rookery/server/dhcpd"
	"rookery/server/dhcpd/dhcpdtest"
)

// TestRealClients has Debian's DHCP clients take addresses over a veth pair, in
// network namespaces that need no privileges.
func TestRealClients(t *testing.T) {
	for _, tool := range []string{"udhcpc", "dhclient", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%v: install udhcpc, isc-dhcp-client and util-linux", err)
		}
	}
	if !netnstest.Inside(t) {
		return
	}

	lan := newLAN(t)
	leases := &dhcpdtest.Leases{}
	fixed := dhcpdtest.Hosts{{MAC: "52:54:00:00:00:11", Name: "n011", Addr: netip.MustParseAddr("10.7.0.11")}}
	stop := serveLAN(t, leases, fixed)

	lan.setMAC(t, "52:54:00:00:00:11")
	lan.want(t, lan.udhcpc(t), "ip=10.7.0.11", "mask=24", "hostname=n011", "router=10.7.0.254", "dns=10.7.0.2", "siaddr=10.7.0.1")
	lan.want(t, lan.dhclient(t), "new_ip_address=10.7.0.11", "new_host_name=n011", "new_dhcp_lease_time=3600")

	lan.setMAC(t, "52:54:00:00:00:22")
	got := lan.udhcpc(t)
	mine := value(got, "ip=")
	if a, err := netip.ParseAddr(mine); err != nil || a.Less(netip.MustParseAddr("10.7.0.100")) || netip.MustParseAddr("10.7.0.199").Less(a) {
		t.Fatalf("udhcpc: %q, want an address of the pool\n%s", mine, got)
	}

	// As a boot ROM of the two kinds asks.
	lan.want(t, lan.udhcpc(t, "-V", "PXEClient:Arch:00007:UNDI:003001", "-x", "0x5d:0007"), "boot_file=snponly.efi", "ip="+mine)
	lan.want(t, lan.udhcpc(t, "-V", "PXEClient:Arch:00000:UNDI:002001", "-x", "0x5d:0000", "-x", "0x4d:69505845"),
		"boot_file=http://10.7.0.1:80/boot/script.ipxe?mac=52:54:00:00:00:22&uuid=${uuid}")

	stop()
	stop = serveLAN(t, leases, fixed)
	lan.want(t, lan.dhclient(t), "new_ip_address="+mine)

	lan.flood(t)
	lan.setMAC(t, "52:54:00:00:00:33")
	if other := value(lan.udhcpc(t), "ip="); other == "" || other == mine {
		t.Errorf("after the flood: %q, want an address other than %s", other, mine)
	}
	stop()
}

func serveLAN(t *testing.T, leases dhcpd.Leases, hosts dhcpd.Hosts) (stop func()) {
	s := &dhcpd.Server{
		Interface: "lan",
		Subnets: []dhcpd.Subnet{{
			Prefix: netip.MustParsePrefix("10.7.0.0/24"),
			First:  netip.MustParseAddr("10.7.0.100"), Last: netip.MustParseAddr("10.7.0.199"),
			Router: netip.MustParseAddr("10.7.0.254"),
			DNS:    []netip.Addr{netip.MustParseAddr("10.7.0.2")},
		}},
		Site:   netboot.Site{Server: netip.MustParseAddr("10.7.0.1"), HTTP: "http://10.7.0.1:80"},
		Hosts:  hosts,
		Leases: leases,
		Log:    slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

// A lan is a wire from this namespace, where it is called "lan", to another,
// where the clients have it as "eth0".
type lan struct{ pid int }

func newLAN(t *testing.T) *lan {
	// cat holds the other namespace until its input ends, with this process.
	holder := exec.Command("cat")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	in, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); holder.Wait() })

	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lan"}, PeerName: "eth0"}); err != nil {
		t.Fatalf("veth: %v", err)
	}
	near, err := netlink.LinkByName("lan")
	if err != nil {
		t.Fatal(err)
	}
	far, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := netlink.ParseAddr("10.7.0.1/24")
	if err := netlink.AddrAdd(near, addr); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(near); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetNsPid(far, holder.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return &lan{holder.Process.Pid}
}

// in runs a program in the clients' namespace.
func (l *lan) in(t *testing.T, arg ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", strconv.Itoa(l.pid), "-n"}, arg...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", arg, err, out)
	}
	return string(out)
}

func (l *lan) setMAC(t *testing.T, mac string) {
	t.Helper()
	l.in(t, "ip", "link", "set", "eth0", "down")
	l.in(t, "ip", "link", "set", "eth0", "address", mac, "up")
}

// script makes a program that a client runs to configure the interface, and
// that only writes down what it was told, and then does something.
func script(t *testing.T, when, then string) (program, told string) {
	dir := t.TempDir()
	program, told = filepath.Join(dir, "script"), filepath.Join(dir, "told")
	text := fmt.Sprintf("#!/bin/sh\n%s && env > %s && %s\nexit 0\n", when, told, then)
	if err := os.WriteFile(program, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return program, told
}

func (l *lan) udhcpc(t *testing.T, arg ...string) string {
	t.Helper()
	program, told := script(t, `[ "$1" = bound ]`, ":")
	l.in(t, append([]string{"udhcpc", "-i", "eth0", "-f", "-n", "-q", "-s", program}, arg...)...)
	return read(t, told)
}

func (l *lan) dhclient(t *testing.T) string {
	t.Helper()
	program, told := script(t, `[ "$reason" = BOUND ]`, "kill -9 $PPID")
	dir := filepath.Dir(program)
	conf := filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, []byte("request subnet-mask, routers, host-name, dhcp-lease-time;\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// It would stay to renew, so its script ends it.
	l.in(t, "sh", "-c", `told=$1; shift; "$@"; test -s "$told"`, "sh", told,
		"dhclient", "-d", "-1", "-cf", conf, "-sf", program, "-lf", filepath.Join(dir, "leases"), "--no-pid", "eth0")
	return read(t, told)
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// value is the rest of the line that begins with key.
func value(text, key string) string {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, key); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func (l *lan) want(t *testing.T, got string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !bytes.Contains([]byte("\n"+got), []byte("\n"+line+"\n")) {
			t.Errorf("no line %q in\n%s", line, got)
		}
	}
}

// flood sends thousands of packets that are noise, or begin as requests do.
func (l *lan) flood(t *testing.T) {
	conn, err := net.Dial("udp4", "10.7.0.1:67")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	src := rand.New(rand.NewPCG(1, 2))
	for n := range 5000 {
		b := make([]byte, src.IntN(1200))
		for i := range b {
			b[i] = byte(src.Uint32())
		}
		if n%2 == 0 && len(b) > 250 {
			copy(b, []byte{1, 1, 6, 0})
			copy(b[236:], []byte{0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255})
			b[28] &^= 1
			clear(b[24:28]) // no relay
		}
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
	}
}
