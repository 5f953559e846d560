package fixup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"rookery/disklayout"
	"rookery/wire"
)

var (
	quiet = slog.New(slog.DiscardHandler)
	id    = wire.Identity{
		Hostname: "n042", Domain: "lab.example", MachineID: "0123456789abcdef0123456789abcdef",
		Network:        []wire.Network{{MAC: "52:54:00:AA:bb:cc", Address: "10.0.0.42/24", Gateway: "10.0.0.1"}},
		Nameservers:    []string{"10.0.0.1", "10.0.0.2"},
		AuthorizedKeys: []string{"ssh-ed25519 AAAA admin"},
		Serial:         "ttyS0,115200",
	}
	dhcp = []wire.Network{{MAC: "52:54:00:aa:bb:cc"}}
)

func plan(t *testing.T) disklayout.Plan {
	t.Helper()
	disks := []disklayout.Disk{{Name: "vda", Path: "/dev/vda", Size: 8 * disklayout.GiB}}
	p, err := disklayout.Fit(disklayout.Default(), disks, disklayout.UEFI, "fixup-test")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// tree makes a root: a value that begins with "->" is a link to the rest of it.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		name = filepath.Join(root, name)
		err := os.MkdirAll(filepath.Dir(name), 0o755)
		if target, ok := strings.CutPrefix(text, "->"); ok {
			err = errors.Join(err, os.Symlink(target, name))
		} else {
			err = errors.Join(err, os.WriteFile(name, []byte(text), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// do runs one fixup on a tree.
func do(t *testing.T, name, root string, id wire.Identity) (string, error) {
	t.Helper()
	r, err := os.OpenRoot(root)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, f := range fixups {
		if f.name == name {
			return f.do(machine{r, id, plan(t)})
		}
	}
	t.Fatalf("no fixup %q", name)
	return "", nil
}

// gone, as the wanted text of a file, says that it is not to be there.
const gone = "(gone)"

func TestFixups(t *testing.T) {
	with := func(change func(*wire.Identity)) wire.Identity { i := id; change(&i); return i }
	p := plan(t)
	fstab := fmt.Sprintf("UUID=%s / ext4 errors=remount-ro 0 1\nUUID=%s /boot/efi vfat umask=0077 0 2\nUUID=%s none swap sw 0 0\n",
		p.At("/").FSUUID, p.At("/boot/efi").FSUUID, p.Partitions[1].FSUUID)
	const lo = "# Written by Rookery when this machine was installed.\nsource /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n"
	const static = "# Written by Rookery when this machine was installed.\n\nauto mac/52:54:00:aa:bb:cc=rookery0\niface rookery0 inet static\n\taddress 10.0.0.42/24\n\tgateway 10.0.0.1\n\tdns-nameservers 10.0.0.1 10.0.0.2\n"
	const networkd = "# Written by Rookery when this machine was installed.\n[Match]\nMACAddress=52:54:00:aa:bb:cc\nType=ether\n\n[Network]\nAddress=10.0.0.42/24\nGateway=10.0.0.1\nDNS=10.0.0.1\nDNS=10.0.0.2\nDomains=lab.example\n"
	const networkdDHCP = "# Written by Rookery when this machine was installed.\n[Match]\nMACAddress=52:54:00:aa:bb:cc\nType=ether\n\n[Network]\nDHCP=yes\nDNS=10.0.0.1\nDNS=10.0.0.2\nDomains=lab.example\n\n[DHCPv4]\nClientIdentifier=mac\n"
	const resolv = "search lab.example\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n"

	for _, tt := range []struct {
		fixup, name string
		files       map[string]string
		id          wire.Identity
		did, err    string
		want        map[string]string
	}{
		{fixup: "hostname", name: "nothing there", id: id, did: "n042", want: map[string]string{
			"etc/hostname": "n042\n",
			"etc/hosts":    "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n10.0.0.42 n042.lab.example n042\n",
		}},
		{fixup: "hostname", name: "others' lines stay, the golden client's go", id: id, did: "n042",
			files: map[string]string{"etc/hostname": "->/dev/null", "etc/hosts": "# ours\n127.0.0.1 localhost n042\n127.0.1.1 golden.x golden\n10.0.0.9 nfs # storage\n10.9.9.9 n042"},
			want: map[string]string{"etc/hostname": "n042\n",
				"etc/hosts": "# ours\n127.0.0.1 localhost\n10.0.0.9 nfs # storage\n10.0.0.42 n042.lab.example n042\n"}},
		{fixup: "hostname", name: "no fixed address", id: with(func(i *wire.Identity) { i.Network, i.Domain = dhcp, "" }), did: "n042",
			files: map[string]string{"etc/hosts": "127.0.0.1 localhost\n"},
			want:  map[string]string{"etc/hosts": "127.0.0.1 localhost\n127.0.1.1 n042\n"}},
		{fixup: "hostname", name: "none", id: wire.Identity{}, err: "the script gives none"},

		{fixup: "machine-id", name: "replaced", id: id, did: id.MachineID,
			files: map[string]string{"etc/machine-id": "ffff\n", "var/lib/dbus/machine-id": "ffff\n"},
			want:  map[string]string{"etc/machine-id": id.MachineID + "\n", "var/lib/dbus/machine-id": "->/etc/machine-id"}},
		{fixup: "machine-id", name: "bad", id: with(func(i *wire.Identity) { i.MachineID = "XY" }), err: `"XY": want 32 lower-case hex digits`},

		{fixup: "fstab", name: "none", id: id, did: "3 filesystems by UUID", want: map[string]string{"etc/fstab": fstab}},
		{fixup: "fstab", name: "foreign lines stay, lost disks are told", id: id, did: "3 filesystems by UUID",
			files: map[string]string{"etc/fstab": "# UNCONFIGURED FSTAB FOR BASE SYSTEM\nUUID=1-2 / xfs defaults 0 1\nUUID=3 /home ext4 defaults 0 2\n/dev/sda5 none swap sw 0 0\n" +
				"nfs:/srv /srv nfs _netdev 0 0\ntmpfs /tmp tmpfs nosuid 0 0\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n# a comment\n" + fstab},
			want: map[string]string{"etc/fstab": fstab + "# not on this machine: UUID=3 /home ext4 defaults 0 2\n# not on this machine: /dev/sda5 none swap sw 0 0\n" +
				"nfs:/srv /srv nfs _netdev 0 0\ntmpfs /tmp tmpfs nosuid 0 0\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n# a comment\n"}},

		{fixup: "network", name: "ifupdown", id: id, did: "ifupdown",
			files: map[string]string{"usr/sbin/ifup": "", "etc/network/interfaces": "source /etc/network/interfaces.d/*\n", "usr/lib/systemd/system/systemd-networkd.service": ""},
			want:  map[string]string{"etc/network/interfaces": lo, "etc/network/interfaces.d/rookery": static, "etc/systemd/network/00-rookery0.network": gone}},
		{fixup: "network", name: "ifupdown of a golden client", id: id, did: "ifupdown",
			files: map[string]string{"usr/sbin/ifup": "", "etc/network/interfaces": "auto eth0\niface eth0 inet static\n\taddress 10.0.0.7/24\n", "etc/network/interfaces.d/eth1": "iface eth1 inet dhcp", "etc/network/interfaces.d/lo": "iface lo inet loopback"},
			want: map[string]string{"etc/network/interfaces": lo, "etc/network/interfaces.d/rookery": static, "etc/network/interfaces.d/eth1": gone,
				"etc/network/interfaces.image/eth1": "iface eth1 inet dhcp", "etc/network/interfaces.d/lo": "iface lo inet loopback",
				"etc/network/interfaces.image/interfaces": "auto eth0\niface eth0 inet static\n\taddress 10.0.0.7/24\n"}},
		{fixup: "network", name: "ifupdown with DHCP", id: with(func(i *wire.Identity) { i.Network = dhcp }), did: "ifupdown",
			files: map[string]string{"usr/sbin/ifup": "", "usr/sbin/dhclient": ""},
			want: map[string]string{"etc/network/interfaces": lo,
				"etc/network/interfaces.d/rookery": "# Written by Rookery when this machine was installed.\n\nauto mac/52:54:00:aa:bb:cc=rookery0\niface rookery0 inet dhcp\n"}},
		{fixup: "network", name: "ifupdown without a DHCP client beside networkd", id: with(func(i *wire.Identity) { i.Network = dhcp }), did: "systemd-networkd, enabled",
			files: map[string]string{"usr/sbin/ifup": "", "usr/lib/systemd/system/systemd-networkd.service": "", "usr/lib/systemd/system/systemd-networkd.socket": ""},
			want: map[string]string{"etc/network/interfaces": lo, "etc/network/interfaces.d/rookery": gone, "etc/systemd/network/00-rookery0.network": networkdDHCP,
				"etc/systemd/system/multi-user.target.wants/systemd-networkd.service": "->/usr/lib/systemd/system/systemd-networkd.service",
				"etc/systemd/system/sockets.target.wants/systemd-networkd.socket":     "->/usr/lib/systemd/system/systemd-networkd.socket"}},
		{fixup: "network", name: "ifupdown without any DHCP client", id: with(func(i *wire.Identity) { i.Network = dhcp }),
			files: map[string]string{"sbin/ifup": ""}, err: "the image has ifupdown, and for DHCP none of dhclient, dhcpcd and udhcpc"},
		{fixup: "network", name: "networkd", id: id, did: "systemd-networkd",
			files: map[string]string{"usr/sbin/ifup": "", "lib/systemd/system/systemd-networkd.service": "", "etc/systemd/system/multi-user.target.wants/systemd-networkd.service": "->/lib/systemd/system/systemd-networkd.service"},
			want:  map[string]string{"etc/systemd/network/00-rookery0.network": networkd, "etc/network/interfaces.d/rookery": gone}},
		{fixup: "network", name: "netplan", id: id, did: "systemd-networkd",
			files: map[string]string{"usr/sbin/netplan": "", "usr/lib/systemd/system/systemd-networkd.service": ""},
			want: map[string]string{"etc/systemd/network/00-rookery0.network": networkd,
				"etc/systemd/system/multi-user.target.wants/systemd-networkd.service": "->/usr/lib/systemd/system/systemd-networkd.service"}},
		{fixup: "network", name: "NetworkManager", id: id, did: "NetworkManager",
			files: map[string]string{"usr/lib/systemd/system/systemd-networkd.service": "", "etc/systemd/system/multi-user.target.wants/NetworkManager.service": "->/x"},
			want: map[string]string{"etc/NetworkManager/system-connections/rookery0.nmconnection": "[connection]\nid=rookery0\ntype=ethernet\nautoconnect-priority=100\n\n[ethernet]\nmac-address=52:54:00:aa:bb:cc\n\n" +
				"[ipv4]\nmethod=manual\naddress1=10.0.0.42/24,10.0.0.1\ndns=10.0.0.1;10.0.0.2;\n\n[ipv6]\nmethod=auto\n"}},
		{fixup: "network", name: "nothing that configures", id: id, err: "the image has none of NetworkManager (enabled), systemd-networkd and ifupdown"},
		{fixup: "network", name: "nothing to configure", id: wire.Identity{}, files: map[string]string{"etc/network/interfaces": "as it was"}, want: map[string]string{"etc/network/interfaces": "as it was"}},
		{fixup: "network", name: "bad address", id: wire.Identity{Network: []wire.Network{{MAC: "52:54:00:aa:bb:cc", Address: "10.0.0.1"}}},
			err: `52:54:00:aa:bb:cc: netip.ParsePrefix("10.0.0.1"): no '/'`},

		{fixup: "resolver", name: "file", id: id, did: "resolv.conf", files: map[string]string{"etc/resolv.conf": "nameserver 1.2.3.4\n"}, want: map[string]string{"etc/resolv.conf": resolv}},
		{fixup: "resolver", name: "link to nobody's file", id: id, did: "resolv.conf", files: map[string]string{"etc/resolv.conf": "->/run/systemd/resolve/stub-resolv.conf"}, want: map[string]string{"etc/resolv.conf": resolv}},
		{fixup: "resolver", name: "resolved", id: id, did: "systemd-resolved",
			files: map[string]string{"etc/resolv.conf": "->../run/systemd/resolve/stub-resolv.conf", "etc/systemd/system/sysinit.target.wants/systemd-resolved.service": "->/x"},
			want:  map[string]string{"etc/resolv.conf": "->../run/systemd/resolve/stub-resolv.conf", "etc/systemd/resolved.conf.d/rookery.conf": "[Resolve]\nDNS=10.0.0.1 10.0.0.2\nDomains=lab.example\n"}},
		{fixup: "resolver", name: "none", id: wire.Identity{}, files: map[string]string{"etc/resolv.conf": "as it was"}, want: map[string]string{"etc/resolv.conf": "as it was"}},
		{fixup: "resolver", name: "bad", id: wire.Identity{Nameservers: []string{"dns"}}, err: `nameserver: ParseAddr("dns"): unable to parse IP`},

		{fixup: "authorized keys", name: "first", id: id, did: "1 for root", want: map[string]string{"root/.ssh/authorized_keys": "ssh-ed25519 AAAA admin\n"}},
		{fixup: "authorized keys", name: "the image's stay", id: id, did: "1 for root", files: map[string]string{"root/.ssh/authorized_keys": "ssh-rsa BBBB boss\nssh-ed25519 AAAA admin"},
			want: map[string]string{"root/.ssh/authorized_keys": "ssh-rsa BBBB boss\nssh-ed25519 AAAA admin\n"}},
		{fixup: "authorized keys", name: "none", id: wire.Identity{}, want: map[string]string{"root/.ssh": gone}},

		{fixup: "serial login", name: "systemd", id: id, did: "systemd on ttyS0", files: map[string]string{"lib/systemd/system/serial-getty@.service": ""},
			want: map[string]string{"etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service": "->/lib/systemd/system/serial-getty@.service"}},
		{fixup: "serial login", name: "inittab", id: id, did: "inittab on ttyS0", files: map[string]string{"etc/inittab": "1:2345:respawn:/sbin/getty 38400 tty1\n#T0:23:respawn:/sbin/getty -L ttyS0 9600 vt100\n"},
			want: map[string]string{"etc/inittab": "1:2345:respawn:/sbin/getty 38400 tty1\n#T0:23:respawn:/sbin/getty -L ttyS0 9600 vt100\nS0:2345:respawn:/sbin/getty -L ttyS0 115200 vt100\n"}},
		{fixup: "serial login", name: "no line", id: wire.Identity{}, files: map[string]string{"etc/inittab": "x"}, want: map[string]string{"etc/inittab": "x"}},
		{fixup: "serial login", name: "bad line", id: wire.Identity{Serial: "../../x"}, err: `serial "../../x": want a line's name`},

		{fixup: "leftovers", name: "all", id: id, did: "removed var/lib/systemd/random-seed, var/lib/dhcp/dhclient.eth0.leases, etc/udev/rules.d/70-persistent-net.rules",
			files: map[string]string{"var/lib/systemd/random-seed": "x", "var/lib/dhcp/dhclient.eth0.leases": "x", "etc/udev/rules.d/70-persistent-net.rules": "x", "etc/udev/rules.d/70-mine.rules": "x"},
			want:  map[string]string{"var/lib/systemd/random-seed": gone, "var/lib/dhcp/dhclient.eth0.leases": gone, "etc/udev/rules.d/70-persistent-net.rules": gone, "etc/udev/rules.d/70-mine.rules": "x"}},
		{fixup: "leftovers", name: "none", id: id},

		{fixup: "ssh host keys", name: "no sshd", id: id, want: map[string]string{"etc/ssh": gone}},
	} {
		t.Run(tt.fixup+"/"+tt.name, func(t *testing.T) {
			root := tree(t, tt.files)
			for pass := range 2 { // done again, it comes to the same files
				did, err := do(t, tt.fixup, root, tt.id)
				if fmt.Sprint(err) != map[bool]string{true: "<nil>", false: tt.err}[tt.err == ""] {
					t.Fatalf("%v, want %q", err, tt.err)
				}
				if err != nil {
					return
				}
				if did != tt.did && pass == 0 {
					t.Errorf("did %q, want %q", did, tt.did)
				}
				for name, want := range tt.want {
					if got := show(filepath.Join(root, name)); got != want {
						t.Errorf("%s:\n%s\nwant:\n%s", name, got, want)
					}
				}
			}
		})
	}
}

// show is a file as tree takes it.
func show(name string) string {
	if target, err := os.Readlink(name); err == nil {
		return "->" + target
	}
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return gone
	}
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// An installation into a directory has no disk; its fstab is somebody else's.
func TestWithoutDisk(t *testing.T) {
	root := tree(t, map[string]string{"etc/fstab": "UUID=1-2 / xfs defaults 0 1\n"})
	if _, err := Apply(t.Context(), root, wire.Identity{Hostname: "n1", MachineID: id.MachineID}, disklayout.Plan{}, quiet); err != nil {
		t.Fatal(err)
	}
	if got := show(filepath.Join(root, "etc/fstab")); got != "UUID=1-2 / xfs defaults 0 1\n" {
		t.Errorf("fstab: %q", got)
	}
}

func TestHostKeys(t *testing.T) {
	files := map[string]string{"etc/ssh/sshd_config": "", "etc/ssh/ssh_host_dsa_key": "old", "etc/ssh/ssh_host_ed25519_key": "old", "etc/ssh/moduli": "stays"}
	one, two := tree(t, files), tree(t, files)
	for _, root := range []string{one, two} {
		if _, err := do(t, "ssh host keys", root, id); err != nil {
			t.Fatal(err)
		}
	}
	if show(filepath.Join(one, "etc/ssh/ssh_host_dsa_key")) != gone || show(filepath.Join(one, "etc/ssh/moduli")) != "stays" {
		t.Error("an old key is left, or something else is gone")
	}
	for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
		file := filepath.Join(one, "etc/ssh/ssh_host_"+kind+"_key")
		key, err := ssh.ParsePrivateKey([]byte(show(file)))
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		public, comment, _, _, err := ssh.ParseAuthorizedKey([]byte(show(file + ".pub")))
		if err != nil || comment != "root@n042" || string(public.Marshal()) != string(key.PublicKey().Marshal()) {
			t.Errorf("%s: public half %q: %v", kind, show(file+".pub"), err)
		}
		if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", kind, st.Mode(), err)
		}
		if show(file) == show(filepath.Join(two, "etc/ssh/ssh_host_"+kind+"_key")) {
			t.Errorf("%s: two machines have the same key", kind)
		}
	}
}

func TestModes(t *testing.T) {
	root := tree(t, map[string]string{"root/.ssh/authorized_keys": "x"})
	if err := os.Chmod(filepath.Join(root, "root/.ssh"), 0o777); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"authorized keys", "machine-id"} {
		if _, err := do(t, name, root, id); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]os.FileMode{"root/.ssh": 0o700, "root/.ssh/authorized_keys": 0o600, "etc/machine-id": 0o444} {
		if st, err := os.Stat(filepath.Join(root, name)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %v", name, st.Mode(), err, want)
		}
	}
}

func TestApply(t *testing.T) {
	root := tree(t, map[string]string{"etc/ssh/sshd_config": "", "usr/sbin/ifup": "", "etc/resolv.conf": ""})
	done, err := Apply(t.Context(), root, id, plan(t), quiet)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, line := range done {
		name, _, _ := strings.Cut(line, ": ")
		names = append(names, name)
	}
	want := []string{"hostname", "machine-id", "ssh host keys", "fstab", "network", "resolver", "authorized keys"}
	if !slices.Equal(names, want) {
		t.Errorf("done %q, want %q", names, want)
	}
	bad := id
	bad.MachineID = ""
	if _, err := Apply(t.Context(), root, bad, plan(t), quiet); err == nil || err.Error() != `fixup: machine-id: "": want 32 lower-case hex digits` {
		t.Errorf("Apply: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Apply(ctx, root, id, plan(t), quiet); !errors.Is(err, context.Canceled) {
		t.Errorf("Apply: %v, want %v", err, context.Canceled)
	}
}

// Nothing is written or removed outside, whatever directory is a link.
func TestStaysInside(t *testing.T) {
	outside := t.TempDir()
	files := []string{"hostname", "hosts", "machine-id", "fstab", "resolv.conf", "authorized_keys", "random-seed", "ssh_host_rsa_key", "sshd_config", "interfaces"}
	for _, name := range files {
		if err := os.WriteFile(filepath.Join(outside, name), []byte("theirs"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	up, err := filepath.Rel("/a", outside)
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{outside, "../../../../../../../.." + outside, up} {
		for _, link := range []string{"etc", "root", "root/.ssh", "etc/ssh", "etc/network", "etc/systemd", "var", "var/lib", "var/lib/systemd", "usr"} {
			t.Run(link+" to "+target, func(t *testing.T) {
				root := tree(t, map[string]string{link: "->" + target})
				for _, f := range fixups {
					do(t, f.name, root, id) // most fail, as they should
				}
				for _, name := range files {
					if got := show(filepath.Join(outside, name)); got != "theirs" {
						t.Fatalf("%s is now %q", name, got)
					}
				}
				if names, err := os.ReadDir(outside); err != nil || len(names) != len(files) {
					t.Fatalf("outside: %v, %v", names, err)
				}
			})
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("UUID=1-2 / xfs defaults 0 1\n127.0.1.1 golden # x\n")
	f.Fuzz(func(t *testing.T, text string) {
		p := plan(t)
		mounts, n := withMounts(text, p)
		if again, _ := withMounts(mounts, p); n == 3 && strings.Count(again, "UUID="+p.At("/").FSUUID) < 1 {
			t.Fatalf("no root in %q", again)
		}
		if hosts := withHost(text, "10.0.0.1", []string{"n1"}); !strings.HasSuffix(hosts, "10.0.0.1 n1\n") {
			t.Fatalf("no own line in %q", hosts)
		}
		configures(text)
	})
}
