package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"rookery/boot/netboot"
	"rookery/server/fleet"
	"rookery/wire"
)

const (
	// asRookery makes the test binary the program, in a network of its own.
	asRookery = "ROOKERY_TEST_AS_ROOKERY"
	// asProgram makes it the program.
	asProgram = "ROOKERY_TEST_AS_PROGRAM"
)

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		os.Exit(0)
	}
	if os.Getenv(asRookery) == "" {
		os.Exit(m.Run())
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "ip: %v: %s\n", err, out)
		os.Exit(2)
	}
	main()
	os.Exit(0)
}

// run carries out one command line on a state directory.
func run(t testing.TB, state string, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := root()
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(append([]string{"--state", state}, args...))
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func must(t testing.TB, state string, args ...string) string {
	t.Helper()
	out, err := run(t, state, args...)
	if err != nil {
		t.Fatalf("rookery %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// file writes a file below a new directory.
func file(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// published is a state directory with a small image, debian12:1.
func published(t testing.TB) string {
	t.Helper()
	state := filepath.Join(t.TempDir(), "state")
	must(t, state, "image", "import", "debian12:1", filepath.Dir(file(t, "hello", "hello\n")))
	return state
}

const nodeYAML = `kind: Node
name: n1
macs: ["52:54:00:12:34:56"]
image: debian12
address: 10.7.0.11/24
`

func TestImportListShow(t *testing.T) {
	state := published(t)
	if out := must(t, state, "image", "list"); !strings.Contains(out, "debian12:1 ") {
		t.Errorf("image list:\n%s", out)
	}
	var v imageView
	if err := json.Unmarshal([]byte(must(t, state, "image", "show", "debian12", "-o", "json")), &v); err != nil {
		t.Fatal(err)
	}
	if v.Name != "debian12:1" || len(v.Layers) != 1 {
		t.Fatalf("image show: %+v", v)
	}
	if st, err := os.Stat(v.Layers[0].Blob); err != nil || st.Size() != v.Size {
		t.Errorf("blob of %d bytes: %v, %v", v.Size, st, err)
	}
}

func TestApplyListShowInstallRemove(t *testing.T) {
	state := published(t)
	f := file(t, "n.yaml", nodeYAML)
	for _, want := range []string{"node n1 created\n", "nothing to change\n"} {
		if out := must(t, state, "apply", "-f", f); out != want {
			t.Errorf("apply: %q, want %q", out, want)
		}
	}
	for _, args := range [][]string{{"node", "list"}, {"node", "show", "n1"}} {
		if out := must(t, state, args...); !strings.Contains(out, "10.7.0.11/24") || !strings.Contains(out, "debian12") || !strings.Contains(out, "installs when it boots from the network") {
			t.Errorf("rookery %s:\n%s", strings.Join(args, " "), out)
		}
	}
	var all []fleet.View
	if err := json.Unmarshal([]byte(must(t, state, "node", "list", "-o", "json")), &all); err != nil || len(all) != 1 || all[0].Record.Image != "debian12" {
		t.Errorf("node list -o json: %+v, %v", all, err)
	}
	if out, err := run(t, state, "node", "install", "n2", "n1"); err == nil || err.Error() != "node n2: not found" || out != "n1: installs when it next boots from the network\n" {
		t.Errorf("node install n2 n1: %q, %v", out, err)
	}
	if out := must(t, state, "events"); out != "" {
		t.Errorf("events of a node that never started: %q", out)
	}
	must(t, state, "node", "rm", "n1")
	if out := must(t, state, "node", "list", "-o", "json"); out != "[]\n" {
		t.Errorf("node list after rm: %s", out)
	}
}

// A group from file to node and back, by its commands.
func TestGroupsOnTheCommandLine(t *testing.T) {
	state := published(t)
	f := file(t, "site.yaml", "kind: Group\nname: compute\npriority: 10\ntransports: [bittorrent]\nimage: debian12\n---\nkind: Group\nname: gpu\ntransports: [http]\ndownloadLimit: 1MB\n---\n"+nodeYAML)
	for _, step := range []struct {
		args string
		want string // all of what it says, or of what it refuses with
	}{
		{"diff -f " + f, "group compute: new\ngroup gpu: new\nnode n1: new\n"},
		{"apply -f " + f, "group compute created\ngroup gpu created\nnode n1 created\n"},
		{"diff -f " + f, "nothing to change\n"},
		{"node set n1 --group gpu,compute", "n1: changed\n"},
		{"diff -f " + f, "node n1: groups: nothing, was [\"gpu\",\"compute\"]\n"},
		{"group list", "GROUP    PRIORITY  NODES\ncompute  10        n1\ngpu      0         n1\n"},
		{"get", "KIND   NAME\nGroup  compute\nGroup  gpu\nNode   n1\n"},
		{"get group gpu -o yaml", "kind: Group\nname: gpu\ntransports:\n  - http\ndownloadLimit: 1MB\n"},
		{"node set n1 --group none", `node n1: groups: no group "none"`},
		{"node set n1 --transports http,http", `node n1: transports: "http" stands twice`},
		{"node set n1 --transports pigeon", `node n1: transports: "pigeon" is not one of ` + strings.Join(wire.Transports, ", ")},
		{"group rm gpu", "group gpu: node n1 is in it"},
		{"group rm none", "group none: not found"},
		{"node set n1 --image= --group gpu --group compute", "n1: changed\n"},
	} {
		out, err := run(t, state, strings.Fields(step.args)...)
		if err != nil {
			out = err.Error()
		}
		if out != step.want {
			t.Errorf("rookery %s: %q, want %q", step.args, out, step.want)
		}
	}
	shows := func(want ...string) {
		t.Helper()
		out := must(t, state, "node", "show", "n1")
		for _, row := range want {
			if !strings.Contains(regexp.MustCompile(" +").ReplaceAllString(out, " "), row+"\n") {
				t.Errorf("no %q in\n%s", row, out)
			}
		}
	}
	shows("groups compute, gpu", "image debian12 (group compute)", "transports bittorrent (group compute)", "downloadLimit 1MB (group gpu)", "seedFor 60 (the program)", "layout the program's own layout")
	must(t, state, "node", "set", "n1", "--transports", "http,bittorrent", "--download-limit", "none")
	shows("transports http, bittorrent (the node's record)", "downloadLimit none (the node's record)")
	must(t, state, "node", "set", "n1", "--transports", "", "--download-limit", "")
	shows("transports bittorrent (group compute)", "downloadLimit 1MB (group gpu)")
	if out := must(t, state, "node", "list"); !strings.Contains(out, " debian12 ") {
		t.Errorf("node list has no image of the group:\n%s", out)
	}
	all := must(t, state, "get", "-o", "yaml")
	if out := must(t, state, "apply", "-f", file(t, "all.yaml", all)); out != "nothing to change\n" {
		t.Errorf("apply of all that get says: %q\n%s", out, all)
	}
	must(t, state, "node", "set", "n1", "--group", "compute")
	if out := must(t, state, "group", "rm", "gpu"); out != "gpu: forgotten\n" {
		t.Errorf("group rm: %q", out)
	}
}

func TestCommandsRefuse(t *testing.T) {
	state := published(t)
	must(t, state, "apply", "-f", file(t, "n.yaml", nodeYAML))
	empty, text, missing := t.TempDir(), file(t, "text", strings.Repeat("no tarball\n", 100)), filepath.Join(t.TempDir(), "none")
	typo := file(t, "typo.yaml", strings.Replace(nodeYAML, "image:", "imge:", 1))
	kernel := file(t, "vmlinuz", bzImage("6.1.0-56-cloud-amd64"))
	for _, tt := range []struct {
		args []string
		want string // the beginning
	}{
		{[]string{"nod"}, `unknown command "nod" for "rookery"`},
		{[]string{"node", "lst"}, `unknown command "lst" for "rookery node"`},
		{[]string{"image", "remove", "debian12:1"}, `unknown command "remove" for "rookery image"`},
		{[]string{"--state", "", "node", "list"}, "state: no directory is named"},
		{[]string{"--state", "/" + strings.Repeat("x", 120), "node", "list"}, "state: the path of /xxx"},
		{[]string{"serve", "--http-port", "99999"}, `--http-port: "99999": value out of range`},
		{[]string{"node", "list", "-o", "xml"}, `output "xml": want table, json or yaml`},

		{[]string{"image", "import", "Debian:12", empty}, `image name "Debian:12": want NAME:TAG`},
		{[]string{"image", "import", "e:latest", empty}, `image name "e:latest": the tag "latest" follows`},
		{[]string{"image", "import", "e:1", empty}, "import e:1: " + empty + " holds no files"},
		{[]string{"image", "import", "e:1", "/dev/null"}, "import e:1: tarball /dev/null: "},
		{[]string{"image", "import", "e:1", missing}, "import e:1: stat " + missing + ": no such file"},
		{[]string{"image", "import", "e:1", text}, "import e:1: tarball " + text + ": "},
		{[]string{"image", "import", "e:1"}, "accepts 2 arg(s), received 1: want rookery image import NAME[:TAG] SOURCE"},
		{[]string{"image", "import", "e:1", "oci:" + empty}, "import e:1: oci:" + empty + ": open " + empty + "/index.json"},
		{[]string{"image", "import", "e:1", "docker-archive:" + text}, "import e:1: docker-archive:" + text + ": "},
		{[]string{"image", "import", "e:1", "https://example.org/e"}, "import e:1: https://example.org/e: an image in a registry is docker://"},
		{[]string{"image", "show", "e"}, `image "e": not found`},
		{[]string{"image", "list", "e"}, `image "e": not found`},
		{[]string{"image", "verify", "debian12:2"}, `image "debian12:2": not found`},
		{[]string{"image", "extract", "e", empty}, `image "e": not found`},
		{[]string{"image", "checkout", "e"}, `image "e": not found`},
		{[]string{"image", "publish", "nosuch", "e"}, "publish e: open " + state + "/trees/nosuch: no such file"},
		{[]string{"image", "publish", empty, "e"}, "publish e: " + empty + " holds no files"},
		{[]string{"image", "publish", empty, "e", "--parent", "f"}, `publish e: parent: image "f": not found`},
		{[]string{"image", "publish", empty, "e/f"}, `image name "e/f:1": want NAME:TAG`},
		{[]string{"image", "diff", "debian12", "e"}, `diff: image "e": not found`},
		{[]string{"image", "diff", "debian12"}, "diff: nothing says which version " + state + "/trees/debian12 comes from"},
		{[]string{"image", "copy", "debian12"}, "copy: name another store"},
		{[]string{"image", "copy", "debian12", "--to", "registry:"}, `registry "": `},
		{[]string{"image", "copy", "debian12", "--to", text}, "image store " + text},
		{[]string{"image", "export", "debian12", missing}, "export debian12:1 to " + missing + ": want oci:DIR"},
		{[]string{"image", "export", "debian12", "oci:" + empty + "/a/b"}, "export debian12:1 to oci:"},
		{[]string{"image", "tag", "debian12:1", "e:1"}, `tag e:1: a tag of debian12:1 has to begin with "debian12:"`},
		{[]string{"image", "tag", "debian12:9", "debian12:x"}, `image "debian12:9": not found`},
		{[]string{"image", "untag", "debian12:1"}, "untag debian12:1: is a version"},
		{[]string{"image", "rm", "debian12"}, "remove debian12: want NAME:TAG"},
		{[]string{"image", "rm", "debian12:latest"}, "remove debian12:latest: is a tag of debian12:1"},
		{[]string{"image", "prune", "--keep", "-1"}, "--keep: -1, want at least 0"},
		{[]string{"image", "prune", "--older-than", "5"}, `--older-than: "5": want an age such as 90d or 12h`},
		{[]string{"image", "prune", "-o", "xml"}, `output "xml": want table, json or yaml`},

		{[]string{"apply", "-f", typo}, typo + ":4: node n1: imge: unknown key"},
		{[]string{"apply", "-f", missing}, "apply: lstat " + missing},
		{[]string{"apply", "-f", empty}, "apply: " + empty + ": no .yaml or .yml file"},
		{[]string{"apply", "-f", "/dev/zero"}, "apply: /dev/zero: more than 16777216 bytes"},
		{[]string{"diff", "-f", typo}, typo + ":4: node n1: imge: unknown key"},
		{[]string{"diff"}, `required flag(s) "filename" not set`},
		{[]string{"get", "host"}, `kind: "host" is not one of Node, Group, Layout, Defaults`},
		{[]string{"get", "node", "n2"}, "node n2: not found"},
		{[]string{"node", "set", "n1"}, "node set: nothing to change: name a flag, such as --group"},
		{[]string{"node", "set", "n2", "--image", "debian12"}, "node n2: not found"},
		{[]string{"plan", "n1"}, "node n1: its disks are not known: it never said hello"},
		{[]string{"plan", "n2"}, "node n2: not found"},
		{[]string{"events", "n2"}, "node n2: not found"},
		{[]string{"node", "show", "n2"}, "node n2: not found"},
		{[]string{"node", "accept", "52:54:00:12:34:57", "--name", "n2"}, "accept: no new machine with MAC address 52:54:00:12:34:57"},
		{[]string{"node", "accept", "52:54:00:12:34:56", "--name", "n2"}, "accept: 52:54:00:12:34:56 is node n1 already"},
		{[]string{"node", "accept", "52:54:00:12:34:57"}, `required flag(s) "name" not set`},
		{[]string{"node", "accept", "x", "--name", "n2", "--authorized-key", file(t, "key", "-----BEGIN OPENSSH PRIVATE KEY-----\n")}, "authorized key: "},

		{[]string{"initramfs", "build", "--kernel", missing, "--modules", empty, "--agent", text}, "kernel: open " + missing},
		{[]string{"initramfs", "build", "--kernel", "/", "--modules", empty, "--agent", text}, "kernel: /: read /: is a directory"},
		{[]string{"initramfs", "build", "--kernel", text, "--modules", empty, "--agent", text}, "kernel: " + text + ": is not a Linux kernel"},
		{[]string{"initramfs", "build", "--kernel", kernel, "--modules", empty, "--agent", text}, "initramfs: agent: " + text},

		{[]string{"serve"}, "serve: --interface is missing"},
		{[]string{"serve", "--interface", "nosuch0"}, `serve: interface "nosuch0": no such network interface`},
		{[]string{"serve", "--interface", "lo", "--address", "10.1.2.3"}, "serve: address 10.1.2.3: interface "},
		{[]string{"serve", "--interface", "lo", "--without", "dchp"}, `serve: without: "dchp" is not one of dhcp, tftp, radvd, seeder, multicast, rsync`},
		{[]string{"serve", "--interface", "lo", "--tftp-port", "0"}, "serve: a port is 0"},
		{[]string{"serve", "--interface", "lo", "--rsync-port", "0", "--rsync-tls-port", "0"}, "serve: rsync-port, rsync-tls-port and rsync-ssh-port are all 0"},
		{[]string{"serve", "--interface", "lo", "--multicast-group", "nonsense"}, `serve: multicast-group: "nonsense" is not a range of multicast addresses`},
		{[]string{"serve", "--interface", "lo", "--multicast-group", "10.0.0.0/8"}, `serve: multicast-group: "10.0.0.0/8" is not a range of multicast addresses`},
		{[]string{"serve", "--interface", "lo", "--multicast-port", "0"}, "serve: multicast-port: 0, want 1 to 65535"},
		{[]string{"serve", "--interface", "lo", "--multicast-rate", "none"}, "serve: multicast-rate: none: it never waits"},
		{[]string{"serve", "--interface", "lo", "--multicast-ttl", "0"}, "serve: multicast-ttl: 0, want 1 to 255"},
		{[]string{"serve", "--interface", "lo", "--multicast-min-clients", "0"}, "serve: multicast-min-clients: 0, want 1 or more"},
		{[]string{"serve", "--interface", "lo", "--multicast-interface", "nosuch0"}, `serve: multicast-interface: "nosuch0": `},
		{[]string{"serve", "--interface", "lo", "--lease-time", "-5s"}, "serve: lease-time: -5s, want at least 1m0s"},
		{[]string{"serve", "--interface", "lo", "--domain", "exa mple"}, `serve: domain: "exa mple"`},
		{[]string{"serve", "--interface", "lo", "--kernel-args", "quiet || exit"}, `serve: kernel-args: "quiet || exit"`},
		{[]string{"serve", "--interface", "lo", "--egress-limit", "90%"}, `serve: egress-limit: "90%" is not a rate`},
		{[]string{"serve", "--interface", "lo", "--ipxe", empty}, "serve: boot program: stat " + empty},
		{[]string{"serve", "--interface", "lo", "--ipxe", empty, "--without", "dhcp"}, "serve: boot program: stat " + empty},
		// Who boots nothing from here needs nothing to boot; the next thing is wrong.
		{[]string{"serve", "--interface", "lo", "--ipxe", empty, "--without", "dhcp,tftp", "--http-port", "40007", "--https-port", "40007"}, "serve: listen tcp 127.0.0.1:40007: "},
	} {
		if out, err := run(t, state, tt.args...); err == nil || !strings.HasPrefix(err.Error(), tt.want) || out != "" {
			t.Errorf("rookery %s: %v\n%s\nwant %s", strings.Join(tt.args, " "), err, out, tt.want)
		}
	}
	if left, err := os.ReadDir(stateDir{path: state}.boot()); err == nil && len(left) > 0 {
		t.Errorf("initramfs build failed and left %v", left)
	}
}

// bzImage is as much of an x86 kernel as says which one it is.
func bzImage(release string) string {
	b := make([]byte, 0x400)
	copy(b, "MZ")
	copy(b[0x202:], "HdrS")
	b[0x20e] = 0x90 // at 0x290
	copy(b[0x290:], release+" (someone@somewhere) #1 SMP\x00")
	return string(b)
}

func TestKernelRelease(t *testing.T) {
	for _, tt := range []struct {
		name, image, want string
		err               bool
	}{
		{name: "x86", image: bzImage("6.1.0-56-cloud-amd64"), want: "6.1.0-56-cloud-amd64"},
		{name: "a program for UEFI", image: "MZ" + strings.Repeat("\x00", 0x400)},
		{name: "cut off", image: bzImage("6.1.0-56")[:0x20f], err: true},
		{name: "text", image: strings.Repeat("text ", 1000), err: true},
	} {
		got, err := kernelRelease(strings.NewReader(tt.image))
		if got != tt.want || err != nil != tt.err {
			t.Errorf("%s: %q, %v, want %q", tt.name, got, err, tt.want)
		}
	}
}

// The server's flags are in the file; what is done to one node is not.
func TestConfigurationIsTheServers(t *testing.T) {
	config := file(t, "rookery.yaml", "address: 10.7.0.1\n")
	t.Setenv("ROOKERY_ADDRESS", "10.7.0.1")
	for command, want := range map[string]string{"serve": "10.7.0.1", "accept": ""} {
		cmd := root()
		cmd, _, err := cmd.Find(map[string][]string{"serve": {"serve"}, "accept": {"node", "accept"}}[command])
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.ParseFlags([]string{"--config", config}); err != nil {
			t.Fatal(err)
		}
		if err := configure(cmd, os.LookupEnv); err != nil {
			t.Fatal(err)
		}
		if got, _ := cmd.Flags().GetString("address"); got != want {
			t.Errorf("%s: --address is %q, want %q", command, got, want)
		}
	}
	if _, err := run(t, t.TempDir(), "--config", file(t, "rookery.yaml", "name: n1\n"), "node", "list"); err == nil || !strings.Contains(err.Error(), `line 1: unknown key "name"`) {
		t.Errorf("configuration with a key of node accept: %v", err)
	}
}

func TestAnInterruptEndsAnImport(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	ctx, interrupt := context.WithCancel(t.Context())
	interrupt()
	cmd := root()
	cmd.SetArgs([]string{"--state", state, "image", "import", "debian12:1", filepath.Dir(file(t, "hello", "hello\n"))})
	if err := cmd.ExecuteContext(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("image import: %v, want it interrupted", err)
	}
	if out := must(t, state, "image", "list", "-o", "json"); out != "[]\n" {
		t.Errorf("images after the interrupt: %s", out)
	}
}

func TestWhatANodeSaysDoesNotCommandTheTerminal(t *testing.T) {
	e := fleet.NodeEvent{Node: "n1", Event: wire.Event{Phase: wire.PhaseFetch, State: wire.Failed, Text: "a\x1b]0;b\x07\nc\u009bd"}}
	v := fleet.View{State: wire.Failed, Error: &fleet.Failure{Step: wire.PhaseFetch, Cause: e.Text}}
	for _, got := range []string{line(e), state(v)} {
		if !strings.HasSuffix(got, "a ]0;b  c d") {
			t.Errorf("%q", got)
		}
	}
}

// A server is rookery serve in a process and a network of its own.
type server struct {
	*exec.Cmd
	said   bytes.Buffer
	silent chan struct{} // closed once said is complete
}

// startServer starts one and waits until it serves, or is gone.
func startServer(t *testing.T, state string) *server {
	t.Helper()
	return startServerIn(t, state, &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	})
}

func startServerIn(t *testing.T, state string, namespaces *syscall.SysProcAttr) *server {
	t.Helper()
	ipxe := t.TempDir()
	for _, path := range []string{
		filepath.Join(ipxe, netboot.FileBIOS), filepath.Join(ipxe, netboot.FileUEFI),
		stateDir{path: state}.kernel(), stateDir{path: state}.initramfs(),
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("program"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	s := &server{Cmd: exec.Command("/proc/self/exe", "--state", state, "serve", "--interface", "lo", "--ipxe", ipxe), silent: make(chan struct{})}
	s.Env = append(os.Environ(), asRookery+"=1")
	s.SysProcAttr = namespaces
	stderr, err := s.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Skipf("no namespaces here (%v): run as root, or allow kernel.unprivileged_userns_clone", err)
	}
	t.Cleanup(func() { s.end(syscall.SIGKILL) })
	serving := make(chan struct{})
	go func() {
		defer close(s.silent)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			fmt.Fprintln(&s.said, lines.Text())
			if strings.Contains(lines.Text(), "msg=serving") {
				close(serving)
			}
		}
	}()
	select {
	case <-serving:
	case <-s.silent:
	}
	return s
}

// end is how the server ends after a signal, once it has.
func (s *server) end(signal os.Signal) error {
	s.Process.Signal(signal)
	<-s.silent
	return s.Wait()
}

func TestServeIsKilledAndGoesOn(t *testing.T) {
	state := published(t)
	s := startServer(t, state)
	// Commands speak to the server: it alone holds the records.
	f := file(t, "n.yaml", nodeYAML)
	if out := must(t, state, "apply", "-f", f); out != "node n1 created\n" {
		t.Errorf("apply: %q", out)
	}
	must(t, state, "image", "import", "fresh:1", filepath.Dir(f))
	must(t, state, "apply", "-f", file(t, "n.yaml", "kind: Node\nname: n2\nmacs: [52:54:00:12:34:57]\nimage: fresh\n"))
	if _, err := run(t, state, "apply", "-f", file(t, "n.yaml", "kind: Node\nname: n3\nmacs: [52:54:00:12:34:58]\naddress: 127.0.0.1/8\nimage: fresh\n")); err == nil {
		t.Error("apply of a node with the server's address: no error")
	}
	before := must(t, state, "node", "list", "-o", "json")

	second := startServer(t, state)
	if err := second.end(syscall.SIGTERM); err == nil || !strings.Contains(second.said.String(), "another rookery holds it") {
		t.Errorf("second server on the same state: %v\n%s", err, &second.said)
	}

	s.end(syscall.SIGKILL)
	if _, err := os.Stat(stateDir{path: state}.admin()); err != nil {
		t.Errorf("a killed server leaves its socket: %v", err)
	}
	if out := must(t, state, "node", "list", "-o", "json"); out != before {
		t.Errorf("node list after the kill:\n%s\nwant\n%s", out, before)
	}
	s = startServer(t, state)
	if out := must(t, state, "node", "list", "-o", "json"); out != before {
		t.Errorf("node list after the restart:\n%s\nwant\n%s\n%s", out, before, &s.said)
	}
	if err := s.end(syscall.SIGTERM); err != nil {
		t.Errorf("the server ends with %v\n%s", err, &s.said)
	}
	if _, err := os.Stat(stateDir{path: state}.admin()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a server that ended leaves its socket: %v", err)
	}
}

// A mistyped directory does not become a site of its own.
func TestCommandsDoNotMakeAStateDirectory(t *testing.T) {
	state := filepath.Join(t.TempDir(), "typo")
	for _, args := range [][]string{{"node", "list"}, {"events"}, {"plan", "n1"}, {"apply", "-f", file(t, "n.yaml", "kind: Defaults\n")}} {
		if _, err := run(t, state, args...); err == nil || !strings.Contains(err.Error(), "state directory: stat "+state) {
			t.Errorf("rookery %s: %v, want the directory named", strings.Join(args, " "), err)
		}
		if _, err := os.Stat(state); err == nil {
			t.Fatalf("rookery %s made %s", strings.Join(args, " "), state)
		}
	}
}
