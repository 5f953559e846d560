package rsyncd

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"rookery/image/imagetest"
	"rookery/image/store"
	"rookery/server/site"
	"rookery/transport/rsync"
	"rookery/wire"
)

// newSite makes one in a directory.
func newSite(t *testing.T) (dir string, keys *site.Site) {
	t.Helper()
	dir = t.TempDir()
	keys, err := site.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return dir, keys
}

// serveSSH serves the images of a store by ssh alone.
func serveSSH(t *testing.T, keys *site.Site, images *store.Store, v store.Version) wire.Tree {
	t.Helper()
	hostKey, err := keys.HostKey()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, &Server{Dir: filepath.Join(t.TempDir(), "rsync"), Store: images, SSH: ln, HostKey: hostKey}, nil)
	return s.tree(t, v)
}

// sshCommand is the distribution's ssh, which asks nobody anything and knows the
// site in dir alone.
func sshCommand(dir string, port int, more ...string) []string {
	return append([]string{
		"ssh", "-F", "none", "-p", strconv.Itoa(port), "-o", "BatchMode=yes", "-o", "HostKeyAlias=" + wire.ServerName,
		"-o", "UserKnownHostsFile=" + site.KnownHostsFile(dir), "-o", "GlobalKnownHostsFile=none",
	}, more...)
}

func needsSSH(t *testing.T) {
	t.Helper()
	needsRsync(t)
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skipf("%v: install Debian's package openssh-client", err)
	}
}

// Everything that an image can have arrives at a stock rsync by a stock ssh,
// which nobody has told more than the site's authority.
func TestStockSSH(t *testing.T) {
	needsSSH(t)
	nasty := imagetest.Nasty()
	images, v := publish(t, nasty)
	dir, keys := newSite(t)
	tree := serveSSH(t, keys, images, v)
	for _, module := range []string{"nasty-1", tree.Module} {
		to := t.TempDir()
		if err := stock(t, nil, "rsync", "-aHAXS", "-e", strings.Join(sshCommand(dir, tree.SSHPort), " "), "127.0.0.1::"+module+"/", to); err != nil {
			t.Fatal(err)
		}
		imagetest.Same(t, imagetest.Snapshot(t, to), nasty.Lines())
	}
	foreign, _ := newSite(t)
	err := stock(t, nil, "rsync", "-a", "-e", strings.Join(sshCommand(foreign, tree.SSHPort), " "), "127.0.0.1::nasty-1/", t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "Host key verification failed") {
		t.Errorf("with the authority of another site: %v", err)
	}
}

// Nothing but the daemon's modules is to be had, and nothing is changed.
func TestSSHRefuses(t *testing.T) {
	needsSSH(t)
	images, v := publish(t, imagetest.New().Dir("etc").File("etc/it", []byte("it\n")))
	dir, keys := newSite(t)
	tree := serveSSH(t, keys, images, v)
	made := filepath.Join(t.TempDir(), "made")
	for _, command := range []string{
		"", "id", "touch " + made, "rsync", "rsync --version",
		"rsync --server --sender -logDtpre.iLsfxC . /etc/",
		"rsync --server -logDtpre.iLsfxC . /tmp/",
		"rsync --server --daemon --config=/dev/stdin .",
		"rsync --server --daemon --log-file=" + made + " .",
		rsync.Remote + "; touch " + made,
		rsync.Remote + "\ntouch " + made,
		rsync.Remote + " ",
		" " + rsync.Remote,
		"/bin/sh -c '" + rsync.Remote + "'",
	} {
		args := sshCommand(dir, tree.SSHPort, "-T", "127.0.0.1")
		if command != "" {
			args = append(args, command)
		}
		out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
		if err == nil || err.Error() != "exit status 1" || !strings.Contains(string(out), "rookery: images by rsync are here and nothing else") {
			t.Errorf("%q: %v\n%s", command, err, out)
		}
	}
	for name, args := range map[string][]string{
		"subsystem": {"-s", "127.0.0.1", "sftp"},
		"tunnel":    {"-W", "127.0.0.1:" + strconv.Itoa(tree.SSHPort), "127.0.0.1"},
		"listener":  {"-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1", "127.0.0.1"},
	} {
		args = sshCommand(dir, tree.SSHPort, args...)
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).Output(); err == nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	from := "127.0.0.1::nasty-1/"
	for want, args := range map[string][]string{
		"module is read only": {"-r", "--delete", t.TempDir() + "/", from},
		"--remove-source-files cannot be used with a read-only module": {"-a", "--remove-source-files", from, t.TempDir()},
		"configured to refuse --log-file":                              {"-a", "-M--log-file=" + made, from, t.TempDir()},
		"must start with a module name":                                {"-a", "127.0.0.1::/etc/", t.TempDir()},
		"No such file or directory":                                    {"-a", from + "../name", t.TempDir()}, // our own note of it is there
		"Unknown module 'none'":                                        {"-a", "127.0.0.1::none/", t.TempDir()},
		"rookery: images by rsync are here and nothing else":           {"-a", "127.0.0.1:/etc/", t.TempDir()},
	} {
		args = append([]string{"-e", strings.Join(sshCommand(dir, tree.SSHPort), " ")}, args...)
		if out, err := exec.CommandContext(t.Context(), "rsync", args...).CombinedOutput(); err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%q: %v, want %s\n%s", args, err, want, out)
		}
	}
	if _, err := os.Lstat(made); err == nil {
		t.Errorf("%s was made", made)
	}
	if err := stock(t, nil, "rsync", "-a", "-e", strings.Join(sshCommand(dir, tree.SSHPort), " "), from, dir+"/all"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "all/etc/it")); err != nil {
		t.Error(err)
	}
}

// A node gets all by ssh, from a server that its site's authority vouches for,
// and from no other.
func TestNodeBySSH(t *testing.T) {
	needsRsync(t)
	nasty := imagetest.Nasty()
	images, v := publish(t, nasty)
	_, keys := newSite(t)
	_, foreign := newSite(t)
	tree := serveSSH(t, keys, images, v)
	for _, tt := range []struct {
		name string
		of   *site.Site
		want string
	}{
		{"ours", keys, "<nil>"},
		{"another site's", foreign, "no authorities for hostname"},
	} {
		authority, err := rsync.Authority(tt.of.Public().CA)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		err = rsync.Run(t.Context(), rsync.Job{Module: tree.Module, Dir: dir, Work: ".work", Dial: func(ctx context.Context) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", tree.SSHPort))
			if err != nil {
				return nil, err
			}
			return rsync.SSH(ctx, conn, authority)
		}})
		if got := fmt.Sprint(err); !strings.Contains(got, tt.want) {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}
		if err == nil {
			if err := os.RemoveAll(filepath.Join(dir, ".work")); err != nil {
				t.Fatal(err)
			}

			below := func(lines []string) []string { // removing Work has changed the time of the root
				return slices.DeleteFunc(lines, func(line string) bool { return strings.HasPrefix(line, `"."(`) })
			}
			imagetest.Same(t, below(imagetest.Snapshot(t, dir)), below(nasty.Lines()))
		}
	}
}

// Who takes nothing is given up, although the connection itself is not full.
func TestSSHClientTakesNothing(t *testing.T) {
	_, keys := newSite(t)
	hostKey, err := keys.HostKey()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var parts sync.WaitGroup
	defer parts.Wait()
	parts.Go(func() {
		c, err := ssh.Dial("tcp", ln.Addr().String(), &ssh.ClientConfig{HostKeyCallback: ssh.InsecureIgnoreHostKey()})
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		c.OpenChannel("session", nil)
		c.Wait() // reads the connection, and not the channel
	})
	here, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(hostKey)
	_, channels, requests, err := ssh.NewServerConn(here, config)
	if err != nil {
		t.Fatal(err)
	}
	parts.Go(func() { ssh.DiscardRequests(requests) })
	channel, asks, err := (<-channels).Accept()
	if err != nil {
		t.Fatal(err)
	}
	parts.Go(func() { ssh.DiscardRequests(asks) })
	client := &session{Conn: here, channel: channel}
	client.SetWriteDeadline(time.Now().Add(time.Second / 10))
	if n, err := client.Write(make([]byte, 16<<20)); err == nil {
		t.Errorf("%d bytes were taken", n)
	}
}

func TestAsked(t *testing.T) {
	exec := ssh.Marshal(struct{ Command string }{rsync.Remote})
	for _, tt := range []struct {
		kind    string
		payload []byte
		command string
		ok      bool
	}{
		{"exec", exec, rsync.Remote, true},
		{"exec", exec[:len(exec)-1], "", false},
		{"exec", append(slices.Clone(exec), 0), "", false},
		{"exec", nil, "", false},
		{"shell", nil, "", true},
		{"pty-req", exec, "", false},
		{"subsystem", exec, "", false},
		{"env", exec, "", false},
	} {
		command, ok := asked(tt.kind, tt.payload)
		if ok != tt.ok || ok && command != tt.command {
			t.Errorf("%s %q: %q, %v; want %q, %v", tt.kind, tt.payload, command, ok, tt.command, tt.ok)
		}
	}
}

func FuzzAsked(f *testing.F) {
	f.Add("exec", ssh.Marshal(struct{ Command string }{rsync.Remote}))
	f.Fuzz(func(t *testing.T, kind string, payload []byte) {
		if command, ok := asked(kind, payload); ok && command != "" && kind != "exec" {
			t.Errorf("%q wants %q", kind, command)
		}
	})
}
