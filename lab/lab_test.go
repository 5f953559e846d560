package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"rookery/disklayout"
)

var network *Network // nil: why says why there is none

var why error

func TestMain(m *testing.M) {
	code, err := Enter(func(n *Network) int { network = n; return m.Run() })
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		why = err
		code = m.Run()
	}
	os.Exit(code)
}

func needNetwork(t *testing.T) {
	t.Helper()
	if network == nil {
		t.Skipf("%v", why)
	}
}

// deadline ends what hangs; nothing here takes near as long.
func deadline(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), Within(d), fmt.Errorf("more than %s", Within(d)))
	t.Cleanup(cancel)
	return ctx
}

func TestTheNetworkIsPrivate(t *testing.T) {
	needNetwork(t)
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		if i.Name != "lo" && i.Name != network.Bridge && !strings.HasPrefix(i.Name, "rookery-") && !strings.HasPrefix(i.Name, "veth") && !strings.HasPrefix(i.Name, "tap") {
			t.Errorf("interface %s is not the lab's", i.Name)
		}
	}
	if os.Getpid() != 1 {
		t.Errorf("pid %d: the lab's processes are not gone with it", os.Getpid())
	}
	// The names below 1024 are free, whoever we are.
	ln, err := net.Listen("tcp4", netip.AddrPortFrom(Address.Addr(), 80).String())
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
}

func TestHostsReachEachOther(t *testing.T) {
	needNetwork(t)
	a, err := network.Host("a", "52:54:00:00:00:0a", netip.MustParseAddr("10.7.0.21"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := network.Host("b", "", netip.MustParseAddr("10.7.0.22"))
	if err != nil {
		t.Fatal(err)
	}

	var ln net.Listener
	a.Do(func() { ln, err = net.Listen("tcp4", "10.7.0.21:80") })
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	said := make(chan error, 1)
	go func() {
		conn, err := ln.Accept()
		if err == nil {
			_, err = io.WriteString(conn, "hello")
			conn.Close()
		}
		said <- err
	}()

	// A program on b, with b's network, not the test's.
	cmd := exec.Command("sh", "-c", "exec 3<>/dev/tcp/10.7.0.21/80; cat <&3")
	cmd.Path, cmd.Args[0] = "/bin/bash", "bash"
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := b.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || out.String() != "hello" {
		t.Fatalf("b: %v, %q", err, out.String())
	}
	if err := <-said; err != nil {
		t.Fatal(err)
	}

	see := exec.Command("sh", "-c", "ls /sys/class/net; cat /sys/class/net/eth0/address")
	out.Reset()
	see.Stdout = &out
	if err := a.Start(see); err != nil {
		t.Fatal(err)
	}
	if err := see.Wait(); err != nil || out.String() != "eth0\nlo\n52:54:00:00:00:0a\n" {
		t.Fatalf("a's /sys: %v, %q", err, out.String())
	}
}

func TestALinkHasItsRate(t *testing.T) {
	needNetwork(t)
	const size = 1 << 20
	a, err := network.Host("c", "", netip.MustParseAddr("10.7.0.23"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := network.Host("d", "", netip.MustParseAddr("10.7.0.24"))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []*Host{a, b} {
		if err := errors.Join(h.Link(8, 9000), h.Congestion("reno"), h.Knows([]*Host{a, b})); err != nil {
			t.Fatal(err)
		}
	}
	var ln net.Listener
	b.Do(func() { ln, err = net.Listen("tcp4", "10.7.0.24:80") })
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	start := time.Now()
	send := exec.Command("bash", "-c", fmt.Sprintf("head -c %d /dev/zero >/dev/tcp/10.7.0.24/80", size))
	if err := a.Start(send); err != nil {
		t.Fatal(err)
	}
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, conn)
	if err := errors.Join(err, conn.Close(), send.Wait()); err != nil || n != size {
		t.Fatalf("%d bytes of %d, %v", n, size, err)
	}
	if took, least := time.Since(start), time.Second*size*8/8e6*9/10; took < least {
		t.Errorf("%d bytes took %s at 8 Mbit/s, want at least %s", size, took, least)
	}
	for name, traffic := range map[string]func() (int64, error){
		"sent":        func() (int64, error) { _, sent, err := a.Traffic(); return sent, err },
		"by loopback": func() (int64, error) { return talkToItself(b, "10.7.0.24:81", size) },
		"received":    func() (int64, error) { received, _, err := b.Traffic(); return received, err },
	} {
		if n, err := traffic(); err != nil || n < size || n > size*11/10 {
			t.Errorf("%s: %d bytes of %d, %v", name, n, size, err)
		}
	}
}

// talkToItself returns what the host's loopback counts for size bytes.
func talkToItself(h *Host, addr string, size int) (int64, error) {
	var ln net.Listener
	var err error
	h.Do(func() { ln, err = net.Listen("tcp4", addr) })
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	host, port, _ := strings.Cut(addr, ":")
	send := exec.Command("bash", "-c", fmt.Sprintf("head -c %d /dev/zero >/dev/tcp/%s/%s", size, host, port))
	if err := h.Start(send); err != nil {
		return 0, err
	}
	conn, err := ln.Accept()
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, conn)
	if err := errors.Join(err, conn.Close(), send.Wait()); err != nil {
		return 0, err
	}
	return h.Loopback()
}

// Firmware asks the network first, finds nobody, then finds nothing on the disk.
func TestMachinesAskTheNetworkFirst(t *testing.T) {
	needNetwork(t)
	for _, needed := range []string{"/usr/bin/qemu-system-x86_64", ovmfCode, "/usr/lib/ipxe/qemu/efi-virtio.rom"} {
		if _, err := os.Stat(needed); err != nil {
			t.Skipf("%v: make deps installs it", err)
		}
	}
	for firmware, want := range map[disklayout.Firmware][]string{
		disklayout.BIOS: {`iPXE`, `net0: 52:54:00:00:00:01`},
		disklayout.UEFI: {`Start PXE over IPv4`},
	} {
		t.Run(string(firmware), func(t *testing.T) {
			t.Parallel()
			ctx := deadline(t, 60*time.Second)
			vm := &VM{Name: "n1", MAC: "52:54:00:00:00:01", Firmware: firmware, Memory: 256, Dir: t.TempDir()}
			if err := network.Plug(vm); err != nil {
				t.Fatal(err)
			}
			defer vm.PowerOff()
			if err := vm.PowerOn(); err != nil {
				t.Fatal(err)
			}
			for _, line := range want {
				if _, err := vm.Console.Expect(ctx, line); err != nil {
					t.Fatal(err)
				}
			}
			if firmware == disklayout.BIOS { // the quicker one: the console goes on after a power cycle
				if err := vm.PowerCycle(); err != nil {
					t.Fatal(err)
				}
				if _, err := vm.Console.Expect(ctx, want[0]); err != nil {
					t.Fatal(err)
				}
			}
			vm.PowerOff()
			_, err := vm.Console.Expect(ctx, "nothing like this")
			if err == nil || !strings.Contains(err.Error(), "switched off") {
				t.Fatalf("Expect on a machine without power: %v", err)
			}
		})
	}
}
