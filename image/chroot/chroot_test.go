package chroot

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image/imagetest"
)

func TestMain(m *testing.M) {
	Child()
	if tree := os.Getenv("TEST_KILLED"); tree != "" {
		Command{Tree: tree, Args: []string{"/bin/sh", "-c", "echo; exec busybox sleep 97"}, Stdout: os.Stdout}.Run(context.Background())
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// small is a tree that has only busybox, and an etc when there are files for it.
func small(t *testing.T, etc ...string) string {
	t.Helper()
	imagetest.Root(t)
	dir := filepath.Join(t.TempDir(), "small_tree")
	imagetest.Programs(t, dir, "busybox")
	must(t, os.MkdirAll(filepath.Join(dir, "bin"), 0o755))
	busybox, err := exec.LookPath("busybox")
	must(t, err)
	must(t, os.Symlink(busybox, filepath.Join(dir, "bin/sh")))
	for _, name := range etc {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte("the tree's\n"), 0o644))
	}
	// Times that are not today's show whether anybody touched a directory.
	old := time.Unix(1e9, 123456789)
	for _, d := range []string{"etc", "usr/sbin", "."} {
		if err := os.Chtimes(filepath.Join(dir, d), old, old); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// in runs a line of shell in a tree, and checks that neither the tree nor this
// machine's mounts remember it.
func in(t *testing.T, tree, line string) (string, error) {
	t.Helper()
	before := imagetest.Snapshot(t, tree)
	out, err := dirty(t.Context(), tree, line)
	imagetest.Same(t, imagetest.Snapshot(t, tree), before)
	mounts, readErr := os.ReadFile("/proc/self/mountinfo")
	must(t, readErr)
	if strings.Contains(string(mounts), tree) {
		t.Errorf("%s is still in the mounts:\n%s", tree, mounts)
	}
	return out, err
}

func dirty(ctx context.Context, tree, line string) (string, error) {
	var out bytes.Buffer
	err := Command{Tree: tree, Args: []string{"/bin/sh", "-c", line}, Stdout: &out, Stderr: &out}.Run(ctx)
	return out.String(), err
}

func TestATreeIsAMachine(t *testing.T) {
	tree := small(t, "etc/hosts")
	resolv, err := os.ReadFile("/etc/resolv.conf")
	must(t, err)
	top := []string{"/dev", "/proc", "/run", "/sys"}
	own, err := os.ReadDir(tree) // with libraries, unless busybox is static
	must(t, err)
	for _, e := range own {
		top = append(top, "/"+e.Name())
	}
	slices.Sort(top)
	for _, tt := range []struct{ line, want string }{
		{"busybox hostname", "small-tree\n"},
		{"echo /*", strings.Join(top, " ") + "\n"},
		{"echo $PPID; set -- /proc/[0-9]*; echo $#", "1\n2\n"}, // the first process and the shell
		{"busybox cat /etc/resolv.conf", string(resolv)},
		{"echo x > /dev/null; busybox head -c 3 /dev/zero | busybox wc -c; echo ok >/dev/stdout", "3\nok\n"},
		{"busybox ls -d /sys/kernel /dev/pts/ptmx /run/lock", "/dev/pts/ptmx\n/run/lock\n/sys/kernel\n"},
		{"echo 1 > /proc/sys/kernel/panic", "/bin/sh: can't create /proc/sys/kernel/panic: Read-only file system\n"},
		{"busybox ls /dev | busybox grep -E '^(loop|sd|vd|nvme)'", ""},
		{"echo $HOME $PWD; busybox cut -d ' ' -f 5 /proc/self/mountinfo | busybox sort | busybox tr '\\n' ' '",
			"/root /\n/ /dev /dev/pts /dev/shm /etc/resolv.conf /proc /proc/sys /run /sys "},
	} {
		if out, _ := in(t, tree, tt.line); out != tt.want {
			t.Errorf("%s: %q, want %q", tt.line, out, tt.want)
		}
	}
}

func TestResolvConf(t *testing.T) {
	resolv, err := os.ReadFile("/etc/resolv.conf")
	must(t, err)
	link := func(to string) func(*testing.T, string) {
		return func(t *testing.T, tree string) {
			must(t, os.Symlink(to, filepath.Join(tree, "etc/resolv.conf")))
		}
	}
	for _, tt := range []struct {
		name string
		make func(*testing.T, string)
		want string
	}{
		{"a file", func(t *testing.T, tree string) {
			must(t, os.WriteFile(filepath.Join(tree, "etc/resolv.conf"), []byte("nameserver 192.0.2.1\n"), 0o644))
		}, string(resolv)},
		{"none", func(*testing.T, string) {}, string(resolv)},
		{"of systemd", link("../run/systemd/resolve/stub-resolv.conf"), string(resolv)},
		{"of resolvconf, absolute", link("/run/resolvconf/resolv.conf"), string(resolv)},
		{"of netconfig, by var/run", func(t *testing.T, tree string) {
			must(t, os.MkdirAll(filepath.Join(tree, "var"), 0o755))
			must(t, os.Symlink("/run", filepath.Join(tree, "var/run")))
			link("/var/run/netconfig/resolv.conf")(t, tree)
		}, string(resolv)},
		{"of resolvconf, by a link of its own", func(t *testing.T, tree string) {
			must(t, os.Mkdir(filepath.Join(tree, "etc/resolvconf"), 0o755))
			must(t, os.Symlink("/run/resolvconf", filepath.Join(tree, "etc/resolvconf/run")))
			link("resolvconf/run/resolv.conf")(t, tree)
		}, string(resolv)},
		{"a link to a file", link("hosts"), string(resolv)},
		{"a link to where a file can be", link("/etc/real"), string(resolv)},
		{"a link to nowhere", link("/none/resolv.conf"), ""},
		{"a link that leaves the tree", link("../../../../etc/hosts"), string(resolv)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tree := small(t, "etc/hosts")
			tt.make(t, tree)
			if out, _ := in(t, tree, "busybox cat /etc/resolv.conf 2>/dev/null"); out != tt.want {
				t.Errorf("resolv.conf: %q, want %q", out, tt.want)
			}
		})
	}
}

func TestStatus(t *testing.T) {
	tree := small(t)
	for _, tt := range []struct {
		line string
		want error
	}{
		{"true", nil},
		{"exit 7", Exit(7)},
		{"kill -TERM $$", Exit(143)},
		{"exec /no/such", Exit(127)},
		{"kill -STOP $$; exit 3", Exit(3)}, // goes on
		{"busybox sleep 1000 & exit 4", Exit(4)},
		{"(busybox true &); exit 5", Exit(5)}, // an orphan
	} {
		if out, err := in(t, tree, tt.line); err != tt.want {
			t.Errorf("%s: %v, want %v: %s", tt.line, err, tt.want, out)
		}
	}
	if err := (Command{Tree: tree, Args: []string{"missing"}}).Run(t.Context()); err != Exit(127) {
		t.Errorf("a missing program: %v, want exit status 127", err)
	}
}

// What is left behind ends with the command, and with the wish to end it.
func TestNobodyStays(t *testing.T) {
	tree := small(t)
	out, err := in(t, tree, "busybox setsid busybox sleep 10007 >/dev/null 2>&1 & echo $!")
	must(t, err)
	if running(t, "sleep\x0010007\x00") {
		t.Errorf("process %s is still there", out)
	}

	ctx, cancel := context.WithCancel(t.Context())
	r, w, err := os.Pipe()
	must(t, err)
	done := make(chan error)
	go func() {
		done <- Command{Tree: tree, Args: []string{"/bin/sh", "-c", "echo; exec busybox sleep 10008"}, Stdout: w}.Run(ctx)
		w.Close()
	}()
	_, err = r.Read(make([]byte, 1))
	must(t, err)
	if _, err := dirty(t.Context(), tree, "true"); !errors.Is(err, ErrBusy) {
		t.Errorf("a second shell: %v, want %v", err, ErrBusy)
	}
	cancel()
	if err := <-done; err != Exit(143) {
		t.Errorf("a command that was ended: %v, want exit status 143", err)
	}
	if running(t, "sleep\x0010008\x00") {
		t.Error("the command is still there")
	}
}

// What runs in a tree ends with who started it, who may be killed.
func TestNobodyOutlivesTheProgram(t *testing.T) {
	tree := small(t)
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), "TEST_KILLED="+tree)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	_, err = out.Read(make([]byte, 1))
	must(t, err)
	must(t, cmd.Process.Kill())
	cmd.Wait()
	for deadline := time.Now().Add(10 * time.Second); running(t, "sleep\x0097\x00"); {
		if time.Now().After(deadline) {
			t.Fatal("the command is still there")
		}
	}
}

// running says whether a process has these arguments at the end.
func running(t *testing.T, args string) bool {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(t, err)
	return slices.ContainsFunc(all, func(file string) bool {
		b, _ := os.ReadFile(file) // a process may just have ended
		return strings.HasSuffix(string(b), args)
	})
}

func TestNoServices(t *testing.T) {
	for _, own := range [][]string{{"usr/sbin/invoke-rc.d"}, {"usr/sbin/invoke-rc.d", "usr/sbin/policy-rc.d"}} {
		tree := small(t, own...)
		if out, err := in(t, tree, "/usr/sbin/policy-rc.d ssh start; echo $?"); err != nil || out != "101\n" {
			t.Errorf("with %v: policy-rc.d: %q, %v, want 101", own, out, err)
		}
	}
	if out, _ := in(t, small(t), "busybox ls /usr"); strings.Contains(out, "sbin") {
		t.Errorf("a tree without packages got a policy-rc.d: %s", out)
	}
}

// What the command itself makes of the mount points is its own.
func TestChangesStay(t *testing.T) {
	tree := small(t, "etc/hosts")
	out, err := dirty(t.Context(), tree, "echo mine > /etc/new; busybox mkdir -p /run/x /root/.ssh; echo y > /run/x/y")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, want := range map[string]bool{"etc/new": true, "root/.ssh": true, "run": false, "proc": false, "etc/resolv.conf": false} {
		if _, err := os.Lstat(filepath.Join(tree, name)); (err == nil) != want {
			t.Errorf("%s: %v, want it there: %v", name, err, want)
		}
	}
	if info, err := os.Stat(filepath.Join(tree, "etc")); err != nil || time.Since(info.ModTime()) > time.Hour {
		t.Errorf("etc, to which a file was added: %v, %v, want today's time", info.ModTime(), err)
	}
}

func TestRefusals(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o644))
	here, err := filepath.Abs(".")
	must(t, err)
	for _, tt := range []struct {
		tree, want string
		do         func(tree string)
	}{
		{"/", "/: is this machine's own root", nil},
		{strings.Repeat("../", 40), "is this machine's own root", nil},
		{file, "is no directory", nil},
		{filepath.Join(here, "none"), "no such file", nil},
		{t.TempDir(), "there is no bin/sh", nil},
		{small(t), "proc: is no directory", func(tree string) { os.Symlink("/etc", filepath.Join(tree, "proc")) }},
	} {
		if tt.do != nil {
			tt.do(tt.tree)
		}
		if err := (Command{Tree: tt.tree}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.tree, err, tt.want)
		}
	}
}

// A shell at a terminal has job control and gets what is typed, ^C included;
// afterwards the terminal is its caller's again.
func TestTerminal(t *testing.T) {
	tree := small(t)
	if _, err := exec.LookPath("script"); err != nil {
		t.Fatalf("%v: make deps", err) // bsdutils is essential
	}
	if os.Getenv("ROOKERY_AT_TERMINAL") != "" {
		err := Command{Tree: os.Getenv("ROOKERY_AT_TERMINAL"), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}.Run(t.Context())
		group, _ := unix.IoctlGetInt(0, unix.TIOCGPGRP)
		t.Logf("ended with %v, back in the foreground: %v", err, group == unix.Getpgrp())
		return
	}
	cmd := exec.CommandContext(t.Context(), "script", "-qec", "/proc/self/exe -test.v -test.run '^TestTerminal$'", "/dev/null")
	self, err := os.Executable()
	must(t, err)
	cmd.Args[2] = strings.Replace(cmd.Args[2], "/proc/self/exe", self, 1)
	cmd.Env = append(os.Environ(), "ROOKERY_AT_TERMINAL="+tree)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	said := ""
	expect := func(want string) {
		t.Helper()
		b := make([]byte, 4096)
		for !strings.Contains(said, want) {
			n, err := out.Read(b)
			if err != nil {
				t.Fatalf("%q not seen: %v: %s", want, err, said)
			}
			said += string(b[:n])
		}
		_, said, _ = strings.Cut(said, want)
	}
	write := func(s string) {
		_, err := in.Write([]byte(s))
		must(t, err)
	}
	expect("# ")
	write(`sh -c 'trap "echo int""errupted; exit" INT; echo rea""dy; while :; do busybox sleep 1; done'` + "\n")
	expect("ready")
	write("\x03")
	expect("interrupted")
	expect("# ")
	write("busybox sleep 10010 &\n")
	expect("# ")
	write("jobs; tty; exit 9\n")
	expect("sleep 10010")
	expect("ended with exit status 9, back in the foreground: true")
	must(t, cmd.Wait())
	if running(t, "sleep\x0010010\x00") {
		t.Error("a job of the shell is still there")
	}
}

// Debian's own tools do their work in a Debian tree.
func TestDebian(t *testing.T) {
	imagetest.Root(t)
	const tarball = "../../out/cache/debian12.tar"
	if _, err := os.Stat(tarball); err != nil {
		t.Skipf("%v: make image", err)
	}
	if testing.Short() {
		t.Skip("unpacks 400 MB: run it without -short")
	}
	tree := filepath.Join(t.TempDir(), "debian12")
	must(t, os.Mkdir(tree, 0o755))
	if out, err := exec.CommandContext(t.Context(), "tar", "-C", tree, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", tarball).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	out, err := in(t, tree, "hostname; findmnt -n -o FSTYPE /proc; invoke-rc.d ssh start; systemctl start ssh; pidof sshd")
	for _, want := range []string{"debian12\n", "proc\n", "policy-rc.d denied execution of start"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q, %v, want %q", out, err, want)
		}
	}
	if err != Exit(1) {
		t.Errorf("pidof sshd: %v, want that there is none", err)
	}
	// A package with scripts, out of the tree's own files.
	out, err = dirty(t.Context(), tree, `set -e
mkdir -p /tmp/p/DEBIAN /tmp/p/usr/bin
printf 'Package: ours\nVersion: 1\nArchitecture: all\nMaintainer: us <us@example.org>\nDescription: ours\n' >/tmp/p/DEBIAN/control
printf '#!/bin/sh\nset -e\ninvoke-rc.d ssh restart\nldconfig\necho configured >/etc/ours\n' >/tmp/p/DEBIAN/postinst
chmod 755 /tmp/p/DEBIAN/postinst
echo ours >/tmp/p/usr/bin/ours
dpkg-deb --build /tmp/p /tmp/p.deb
apt-get -y install /tmp/p.deb
dpkg -s ours | grep Status
rm -r /tmp/p /tmp/p.deb`)
	if err != nil || !strings.Contains(out, "Status: install ok installed") {
		t.Errorf("a package: %v: %s", err, out)
	}
	if b, err := os.ReadFile(filepath.Join(tree, "etc/ours")); string(b) != "configured\n" {
		t.Errorf("what the package's script wrote: %q, %v", b, err)
	}
	if _, err := os.Lstat(filepath.Join(tree, "usr/sbin/policy-rc.d")); err == nil {
		t.Error("policy-rc.d is still there")
	}
}
