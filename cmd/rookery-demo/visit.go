package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"rookery/lab"
)

// leastFiles is how many files an installed machine has at the least.
const leastFiles = 10_000

// look is what the demo runs on an installed machine: one "key value" a line.
const look = `
echo hostname $(hostname)
echo machine-id $(cat /etc/machine-id)
for a in $(ip -4 -o address show scope global | awk '{print $4}'); do echo address $a; done
for k in /etc/ssh/ssh_host_*_key.pub; do echo hostkey $(cut -d' ' -f1,2 "$k"); done
echo root $(findmnt -n -o SOURCE /)
echo files $(find / -xdev | wc -l)
[ -d /sys/firmware/efi ] && echo firmware uefi || echo firmware bios
echo kernel $(uname -r)
`

// findings are the answers, in their order, by key.
type findings map[string][]string

// visit logs in to n with the demo's key and looks around.
func (d *demo) visit(ctx context.Context, n *node) error {
	// The login prompt may come before sshd: ssh tries again every second.
	cmd := exec.CommandContext(ctx, "ssh", "-F", "/dev/null", "-i", d.key(),
		"-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "LogLevel=ERROR",
		"-o", "StrictHostKeyChecking=accept-new", "-o", "UserKnownHostsFile="+filepath.Join(d.dir, "known_hosts"), "-o", "GlobalKnownHostsFile=/dev/null",
		"-o", "ConnectTimeout=10", "-o", "ConnectionAttempts=30",
		"root@"+n.address, "sh -s")
	var out, complaints bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(look), &out, &complaints
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("root@%s: %w: %s", n.address, err, strings.TrimSpace(complaints.String()))
	}
	found := parseFindings(out.String())
	n.mu.Lock()
	n.found = found
	n.mu.Unlock()
	return found.check(n.machine)
}

func parseFindings(text string) findings {
	found := findings{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		found[key] = append(found[key], value)
	}
	return found
}

// check says everything that is not as m should be.
func (f findings) check(m machine) error {
	var wrong []string
	want := func(key, what string) {
		if len(f[key]) != 1 || f[key][0] != what {
			wrong = append(wrong, fmt.Sprintf("%s is %s, want %s", key, strings.Join(f[key], " and "), what))
		}
	}
	want("hostname", m.name)
	want("address", fmt.Sprintf("%s/%d", m.address, lab.Address.Bits()))
	want("firmware", string(m.firmware))
	if root := strings.Join(f["root"], " "); !strings.HasPrefix(root, "/dev/vda") {
		wrong = append(wrong, fmt.Sprintf("root is %q, want a partition of /dev/vda", root))
	}
	if id := strings.Join(f["machine-id"], " "); len(id) != 32 {
		wrong = append(wrong, fmt.Sprintf("machine-id %q has %d digits, want 32", id, len(id)))
	}
	if len(f["hostkey"]) == 0 {
		wrong = append(wrong, "no ssh host keys")
	}
	if files, err := strconv.Atoi(strings.Join(f["files"], " ")); err != nil || files < leastFiles {
		wrong = append(wrong, fmt.Sprintf("%d files, want %d or more", files, leastFiles))
	}
	if wrong != nil {
		return errors.New(strings.Join(wrong, "; "))
	}
	return nil
}

// unique says which machines share what is to be each one's own.
func unique(nodes []*node) error {
	for _, key := range []string{"machine-id", "hostkey"} {
		owner := map[string]string{}
		for _, n := range nodes {
			for _, value := range n.found[key] {
				if other, taken := owner[value]; taken {
					return fmt.Errorf("%s: ssh: %s %s is that of %s too", n.name, key, value, other)
				}
				owner[value] = n.name
			}
		}
	}
	return nil
}
