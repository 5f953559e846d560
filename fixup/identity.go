package fixup

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
)

func (m machine) hostname() (string, error) {
	if m.id.Hostname == "" {
		return "", fmt.Errorf("the script gives none")
	}
	hosts, err := m.read("etc/hosts")
	if err != nil {
		return "", err
	}
	if err := m.write("etc/hosts", withHost(hosts, m.ownAddress(), m.names()), 0o644); err != nil {
		return "", err
	}
	return m.id.Hostname, m.write("etc/hostname", m.id.Hostname+"\n", 0o644)
}

// names is what the machine is called, the full name first.
func (m machine) names() []string {
	if m.id.Domain == "" {
		return []string{m.id.Hostname}
	}
	return []string{m.id.Hostname + "." + m.id.Domain, m.id.Hostname}
}

// ownAddress is where the machine's name leads: to its fixed address, so that
// others can be told the name, or to Debian's 127.0.1.1.
func (m machine) ownAddress() string {
	for _, n := range m.id.Network {
		if prefix, err := netip.ParsePrefix(n.Address); err == nil {
			return prefix.Addr().String()
		}
	}
	return "127.0.1.1"
}

// withHost is a hosts file in which address has the names, and no other line
// has one of them. Lines about others stay.
func withHost(hosts, address string, names []string) string {
	if strings.TrimSpace(hosts) == "" {
		hosts = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
	}
	var out []string
	for _, line := range lines(hosts) {
		text, _, _ := strings.Cut(line, "#")
		fields := strings.Fields(text)
		if len(fields) > 1 {
			if fields[0] == "127.0.1.1" || fields[0] == address {
				continue // the name of the machine the image was made on
			}
			kept := slices.DeleteFunc(slices.Clone(fields[1:]), func(f string) bool { return slices.Contains(names, f) })
			if len(kept) == 0 {
				continue
			}
			if len(kept) < len(fields)-1 {
				line = fields[0] + " " + strings.Join(kept, " ")
			}
		}
		out = append(out, line)
	}
	out = append(out, address+" "+strings.Join(names, " "))
	return strings.Join(out, "\n") + "\n"
}

func (m machine) machineID() (string, error) {
	id := m.id.MachineID
	if len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%.40q: want 32 lower-case hex digits", id)
	}
	// D-Bus has a copy of its own where it was not made a link.
	if st, err := m.root.Lstat("var/lib/dbus/machine-id"); err == nil && st.Mode().IsRegular() {
		if err := m.link("/etc/machine-id", "var/lib/dbus/machine-id"); err != nil {
			return "", err
		}
	}
	return id, m.write("etc/machine-id", id+"\n", 0o444)
}

// hostKeys replaces the image's keys, which all its copies would share.
func (m machine) hostKeys() (string, error) {
	if !m.exists("etc/ssh/sshd_config") && !m.exists("usr/sbin/sshd") {
		return "", nil
	}
	names, err := m.list("etc/ssh")
	if err != nil {
		return "", err
	}
	for _, n := range names {
		if strings.HasPrefix(n, "ssh_host_") {
			if err := m.remove("etc/ssh/" + n); err != nil {
				return "", err
			}
		}
	}
	comment := "root@" + m.id.Hostname
	var did []string
	for _, kind := range []struct {
		name string
		make func() (crypto.Signer, error)
	}{
		{"ed25519", func() (crypto.Signer, error) { _, key, err := ed25519.GenerateKey(rand.Reader); return key, err }},
		{"ecdsa", func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }},
		{"rsa", func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 3072) }}, // ssh-keygen's size
	} {
		key, err := kind.make()
		if err != nil {
			return "", err
		}
		private, err := ssh.MarshalPrivateKey(key, comment)
		if err != nil {
			return "", err
		}
		public, err := ssh.NewPublicKey(key.Public())
		if err != nil {
			return "", err
		}
		file := "etc/ssh/ssh_host_" + kind.name + "_key"
		if err := m.write(file, string(pem.EncodeToMemory(private)), 0o600); err != nil {
			return "", err
		}
		line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(public))) + " " + comment + "\n"
		if err := m.write(file+".pub", line, 0o644); err != nil {
			return "", err
		}
		did = append(did, kind.name+" "+ssh.FingerprintSHA256(public))
	}
	return strings.Join(did, ", "), nil
}

// authorizedKeys lets root's keys in. Those of the image stay.
func (m machine) authorizedKeys() (string, error) {
	if len(m.id.AuthorizedKeys) == 0 {
		return "", nil
	}
	const dir, file = "root/.ssh", "root/.ssh/authorized_keys"
	if err := m.root.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	old, err := m.read(file)
	if err != nil {
		return "", err
	}
	keys := lines(old)
	for _, key := range m.id.AuthorizedKeys {
		if key = strings.TrimSpace(key); !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
	}
	// sshd refuses keys that others could have written.
	if err := m.root.Chmod(dir, 0o700); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d for root", len(m.id.AuthorizedKeys)), m.write(file, strings.Join(keys, "\n")+"\n", 0o600)
}

// serialLogin asks for a login on the serial line. systemd does so by itself
// when the line is a console of the kernel; then this is the same again.
func (m machine) serialLogin() (string, error) {
	line, mode, _ := strings.Cut(m.id.Serial, ",")
	if line == "" {
		return "", nil
	}
	if strings.Trim(line, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") != "" {
		return "", fmt.Errorf("serial %.40q: want a line's name", m.id.Serial)
	}
	if file, ok := m.unit("serial-getty@.service"); ok {
		return "systemd on " + line, m.enable("serial-getty@"+line+".service", "getty.target", file)
	}
	inittab, err := m.read("etc/inittab")
	if err != nil || inittab == "" {
		return "", err
	}
	speed := mode[:len(mode)-len(strings.TrimLeft(mode, "0123456789"))]
	if speed == "" {
		speed = "115200"
	}
	text := slices.DeleteFunc(lines(inittab), func(l string) bool {
		return strings.Contains(l, "getty") && strings.Contains(l, line+" ") && !strings.HasPrefix(l, "#")
	})
	text = append(text, "S0:2345:respawn:/sbin/getty -L "+line+" "+speed+" vt100")
	return "inittab on " + line, m.write("etc/inittab", strings.Join(text, "\n")+"\n", 0o644)
}

// leftovers are files in which the machine that the image came from lives on:
// seeds of randomness that all copies would share, leases of its addresses,
// names of its network interfaces.
func (m machine) leftovers() (string, error) {
	var gone []string
	for _, pattern := range []string{
		"var/lib/systemd/random-seed", "var/lib/urandom/random-seed", "var/lib/random-seed", "var/lib/systemd/credential.secret",
		"boot/efi/loader/random-seed",
		"var/lib/dhcp/*.lease*", "var/lib/dhclient/*.lease*", "var/lib/NetworkManager/*.lease",
		"etc/udev/rules.d/70-persistent-net.rules",
	} {
		names, err := fs.Glob(m.root.FS(), pattern)
		if err != nil {
			return "", err
		}
		for _, name := range names {
			if err := m.remove(name); err != nil {
				return "", err
			}
			gone = append(gone, name)
		}
	}
	if len(gone) == 0 {
		return "", nil
	}
	return "removed " + strings.Join(gone, ", "), nil
}
