// Package capturetest is a golden client for tests, without a machine.
package capturetest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"rookery/image/chroot"
	"rookery/image/imagetest"
)

// A Golden is a client whose root is a directory: sshd runs there, with processes
// and mounts of its own.
type Golden struct {
	Root    string
	Address string   // root@127.0.0.1:PORT
	Options []string // of ssh, to be let in
}

// Start starts a client that has these programs besides busybox and sshd, when it
// has done what the lines of shell in setup say. It ends with the test, whose
// TestMain calls chroot.Child.
func Start(t testing.TB, setup string, programs ...string) *Golden {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	imagetest.Root(t)
	home := t.TempDir()
	root := filepath.Join(home, "golden")
	imagetest.Programs(t, root, append([]string{"busybox", "sshd"}, programs...)...)
	for _, dir := range []string{"bin", "etc", "root/.ssh", "srv"} {
		must(os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	busybox, err := exec.LookPath("busybox")
	must(err)
	applets, err := exec.Command(busybox, "--list").Output()
	must(err)
	for applet := range strings.FieldsSeq(string(applets)) {
		os.Symlink(busybox, filepath.Join(root, "bin", applet)) // of the programs some may be there
	}
	must(os.Symlink("/run/resolv.conf", filepath.Join(root, "etc/resolv.conf")))
	key := filepath.Join(home, "key")
	for _, file := range []string{key, filepath.Join(root, "etc/hostkey")} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s: make deps", err, out)
		}
	}
	public, err := os.ReadFile(key + ".pub")
	must(err)
	host, err := os.ReadFile(filepath.Join(root, "etc/hostkey.pub"))
	must(err)
	port := FreePort(t)
	known := filepath.Join(home, "known_hosts")
	for file, text := range map[string]string{
		known: fmt.Sprintf("[127.0.0.1]:%d %s", port, host),
		filepath.Join(root, "root/.ssh/authorized_keys"): string(public),
		filepath.Join(root, "etc/passwd"):                "root:x:0:0::/root:/bin/sh\nsshd:x:100:100::/run:/bin/false\nbob:x:7:7::/:/bin/sh\n",
		filepath.Join(root, "etc/group"):                 "root:x:0:\n",
		filepath.Join(root, "etc/os-release"):            "NAME=x\nPRETTY_NAME=\"Golden 1\"\n",
		filepath.Join(root, "etc/sshd_config"): fmt.Sprintf("ListenAddress 127.0.0.1:%d\nHostKey /etc/hostkey\nPidFile none\nStrictModes no\n"+
			"AuthorizedKeysFile /root/.ssh/authorized_keys\nPasswordAuthentication no\nUsePAM no\n", port),
	} {
		must(os.WriteFile(file, []byte(text), 0o644))
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	r, w, err := os.Pipe()
	must(err)
	var said bytes.Buffer
	go func() {
		sshd, _ := exec.LookPath("sshd")
		ended <- chroot.Command{Tree: root, Stderr: w, Stdout: w, Args: []string{
			"/bin/sh", "-c", "set -e; mkdir -p /run/sshd; " + setup + "\nexec " + sshd + " -D -e -f /etc/sshd_config"}}.Run(ctx)
		w.Close()
	}()
	listens := make(chan bool, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		b := make([]byte, 4096)
		for {
			n, err := r.Read(b)
			said.Write(b[:n])
			if bytes.Contains(said.Bytes(), []byte("listening")) {
				select {
				case listens <- true:
				default:
				}
			}
			if err != nil {
				select {
				case listens <- false:
				default:
				}
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		<-read
		if t.Failed() {
			t.Logf("sshd: %s", said.Bytes())
		}
	})
	if !<-listens {
		t.Fatal("sshd does not listen")
	}
	return &Golden{
		Root: root, Address: fmt.Sprintf("root@127.0.0.1:%d", port),
		Options: []string{"-i", key, "-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile=" + known},
	}
}

// FreePort is a port of 127.0.0.1 that nobody listens on.
func FreePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
