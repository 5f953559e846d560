package main

import (
	"strings"
	"testing"
	"time"

	"rookery/disklayout"
	"rookery/wire"
)

func TestMachines(t *testing.T) {
	for n, want := range map[int]string{
		1: "n1 uefi",
		2: "n1 bios, n2 uefi",
		4: "n1 bios, n2 uefi, n3 uefi late, n4 uefi late",
	} {
		var got []string
		for _, m := range machines(n) {
			s := m.name + " " + string(m.firmware)
			if m.late {
				s += " late"
			}
			got = append(got, s)
		}
		if got := strings.Join(got, ", "); got != want {
			t.Errorf("%d machines: %s, want %s", n, got, want)
		}
	}
}

const visited = `hostname n2
machine-id 0123456789abcdef0123456789abcdef
address 10.7.0.12/24
hostkey ssh-ed25519 AAAA
hostkey ssh-rsa BBBB
root /dev/vda3
files 12345
firmware uefi
kernel 6.1.0
`

func TestFindings(t *testing.T) {
	n2 := machines(3)[1]
	for _, tt := range []struct{ from, to, want string }{
		{"", "", ""},
		{"hostname n2", "hostname localhost", "hostname is localhost, want n2"},
		{"10.7.0.12/24", "10.7.0.100/24", "address is 10.7.0.100/24, want 10.7.0.12/24"},
		{"files 12345", "files 9999\naddress 10.7.0.9/24", "address is 10.7.0.12/24 and 10.7.0.9/24, want 10.7.0.12/24; 9999 files, want 10000 or more"},
		{"/dev/vda3", "rootfs", `root is "rootfs", want a partition of /dev/vda`},
		{"machine-id 0123456789abcdef0123456789abcdef", "machine-id ", `machine-id "" has 0 digits, want 32`},
		{"hostkey ssh-ed25519 AAAA\nhostkey ssh-rsa BBBB\n", "", "no ssh host keys"},
		{"firmware uefi", "firmware bios", "firmware is bios, want uefi"},
	} {
		err := parseFindings(strings.Replace(visited, tt.from, tt.to, 1)).check(n2)
		if got := ""; err != nil {
			got = err.Error()
			if got != tt.want {
				t.Errorf("%q: %s, want %s", tt.to, got, tt.want)
			}
		} else if tt.want != "" {
			t.Errorf("%q: fine, want %s", tt.to, tt.want)
		}
	}

	a, b := &node{machine: n2, found: parseFindings(visited)}, &node{machine: machines(3)[2], found: findings{"hostkey": {"ssh-rsa BBBB"}}}
	if err := unique([]*node{a, b}); err == nil || err.Error() != "n3: ssh: hostkey ssh-rsa BBBB is that of n2 too" {
		t.Errorf("unique: %v", err)
	}
}

func TestRows(t *testing.T) {
	for _, tt := range []struct {
		row  row
		want string
	}{
		{row{name: "n1", firmware: "bios", stage: "netboot", since: 9 * time.Second}, "n1   bios netboot       9 s"},
		{row{name: "n1", firmware: "bios", stage: "loader", text: "grub-install\n /dev/vda"}, "n1   bios loader        0 s  grub-install /dev/vda"},
		{row{name: "n2", firmware: "uefi", stage: "fetch", since: time.Minute, fetch: &wire.Transfer{Total: 200, Done: 51, Rate: 12_340_000, Peers: 2}},
			"n2   uefi fetch        60 s  [#####---------------]  26 %   12.3 MB/s  2 peers"},
	} {
		if got := tt.row.String(); got != tt.want {
			t.Errorf("row is\n%q, want\n%q", got, tt.want)
		}
	}
}

func TestScreen(t *testing.T) {
	a, b := row{name: "a", stage: "boot"}, row{name: "b", stage: "off"}
	later := row{name: "a", stage: "plan"}

	var out strings.Builder
	s := &screen{out: &out}
	s.draw([]row{a, b}, true)
	s.draw([]row{a, b}, false)
	s.draw([]row{later, b}, false)
	if got := strings.Count(out.String(), "\n"); got != 3 {
		t.Errorf("without a terminal %d lines, want 3:\n%s", got, out.String())
	}

	// What is done is told once.
	out.Reset()
	done := row{name: "a", stage: stepDone}
	s.draw([]row{done, b}, true)
	s.draw([]row{done, b}, true)
	if got := strings.Count(out.String(), stepDone); got != 1 {
		t.Errorf("done is told %d times, want once:\n%s", got, out.String())
	}

	out.Reset()
	s = &screen{out: &out, width: func() int { return 8 }}
	s.draw([]row{a, b}, true)
	s.draw([]row{later, b}, true)
	if got, want := out.String(), "\ra      \x1b[K\n\rb      \x1b[K\n\x1b[2A\ra      \x1b[K\n\rb      \x1b[K\n"; got != want {
		t.Errorf("on a terminal %q, want %q", got, want)
	}
}

func TestTable(t *testing.T) {
	r := report{Nodes: []nodeReport{{
		Name: "n1", Firmware: disklayout.BIOS, FromServer: 120_000_000, FromPeers: 40_000_000,
		Steps: []seconds{{stepNetboot, 10}, {"login", 21.5}}, Phases: []seconds{{"fetch", 30.25}},
	}}}
	lines := strings.Split(r.table(), "\n")
	if got, want := strings.Join(strings.Fields(lines[0]), " "), "node firmware netboot boot network hello script plan partition fetch fixup loader linger end restart login from server from peers"; got != want {
		t.Errorf("head %s, want %s", got, want)
	}
	if got, want := strings.Join(strings.Fields(lines[1]), " "), "n1 bios 10.0 - - - - - - 30.2 - - - - - 21.5 120.0 MB 40.0 MB"; got != want {
		t.Errorf("n1 %s, want %s", got, want)
	}
}
