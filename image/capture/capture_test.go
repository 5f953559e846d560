package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/capture/capturetest"
	"rookery/image/chroot"
	"rookery/image/imagetest"
	"rookery/image/tree"
)

func TestMain(m *testing.M) {
	chroot.Child()
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A golden is a client to be captured.
type golden struct{ *capturetest.Golden }

func newGolden(t *testing.T, setup string, programs ...string) golden {
	t.Helper()
	return golden{capturetest.Start(t, setup, programs...)}
}

// remote is how g is reached.
func (g golden) remote() Remote { return Remote{Address: g.Address, Options: g.Options} }

// capture captures g into dir.
func (g golden) capture(t *testing.T, dir string, more string) Result {
	t.Helper()
	s, err := Connect(t.Context(), g.remote())
	must(t, err)
	defer s.Close()
	x, err := tree.ParseExcludes("test", strings.NewReader(more))
	must(t, err)
	r, err := s.Capture(t.Context(), NewPlan(s.Facts, tree.Builtin().With(x), true), dir, nil)
	must(t, err)
	must(t, s.Close())
	return r
}

// everything puts a tree with all that a filesystem can hold into dir.
func everything(t *testing.T, dir string) {
	t.Helper()
	data, d := imagetest.Nasty().Layer(t)
	_, err := image.Extract(t.Context(), dir, image.Options{}, image.Layer{Descriptor: d, Bytes: bytes.NewReader(data)})
	must(t, err)
}

func TestCapture(t *testing.T) {
	g := newGolden(t, "true", "rsync")
	everything(t, filepath.Join(g.Root, "srv"))
	dir := filepath.Join(t.TempDir(), "trees", "golden")
	quick := filepath.Join(g.Root, "srv/quick")
	must(t, os.WriteFile(quick, []byte("one"), 0o644))
	must(t, os.Chtimes(quick, imagetest.When, imagetest.When))
	before := imagetest.Snapshot(t, g.Root)
	first := g.capture(t, dir, "")
	imagetest.Same(t, imagetest.Snapshot(t, g.Root), before)
	imagetest.Same(t, stored(t, dir), stored(t, g.Root))
	if left := append(mountsBelow(t, g.Root), mountsBelow(t, dir)...); len(left) > 0 {
		t.Errorf("still mounted: %q", left)
	}
	if len(first.Changed) > 0 || first.Sent < 300 || first.Received < 6<<20 {
		t.Errorf("first: %+v", first)
	}

	// Again, of a client that is not the same any more.
	must(t, os.RemoveAll(filepath.Join(g.Root, "srv/many")))
	must(t, os.WriteFile(filepath.Join(g.Root, "srv/a/sudo"), []byte("other"), 0))
	must(t, os.WriteFile(quick, []byte("two"), 0o644))
	must(t, os.Chtimes(quick, imagetest.When, imagetest.When.Add(1))) // in the same second
	must(t, os.Rename(filepath.Join(g.Root, "srv/b/z hard"), filepath.Join(g.Root, "srv/b/renamed")))
	must(t, os.Chown(filepath.Join(g.Root, "srv/a/acl"), 12345, 54321))
	must(t, os.WriteFile(filepath.Join(dir, "only in the tree"), nil, 0o644))
	second := g.capture(t, dir, "")
	imagetest.Same(t, stored(t, dir), stored(t, g.Root))
	if second.Deleted != 303 || second.Received > first.Received/50 { // 300 files, their directory, a name, and what was only here
		t.Errorf("second: %d deleted, %d bytes after %d: want 303, and few", second.Deleted, second.Received, first.Received)
	}
	t.Logf("first %d bytes, then %d", first.Received, second.Received)

	// What is left out now goes from the tree as well.
	g.capture(t, dir, "/srv/a/*")
	left, err := os.ReadDir(filepath.Join(dir, "srv/a"))
	if err != nil || len(left) > 0 {
		t.Errorf("srv/a: %v, %v, want it empty", left, err)
	}
}

// stored is a snapshot without the mount points, which on a machine that runs
// look as what is mounted there does.
func stored(t *testing.T, dir string) []string {
	t.Helper()
	return slices.DeleteFunc(imagetest.Snapshot(t, dir), func(line string) bool {
		return slices.ContainsFunc([]string{`"dev"`, `"proc"`, `"run"`, `"sys"`}, func(name string) bool { return strings.HasPrefix(line, name) })
	})
}

// mountsBelow is what this machine has mounted in a directory.
func mountsBelow(t *testing.T, dir string) (mounts []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, dir) {
			mounts = append(mounts, line)
		}
	}
	return mounts
}

// What changes while it is read is named.
func TestChangesDuringACapture(t *testing.T) {
	g := newGolden(t, `touch "/srv/quiet"; (while :; do echo x >>"/srv/be usy"; usleep 1000; done) &`, "rsync")
	r := g.capture(t, filepath.Join(t.TempDir(), "tree"), "")
	if !slices.Equal(r.Changed, []string{"/srv/be usy"}) {
		t.Errorf("changed: %q, want /srv/be usy", r.Changed)
	}
	if live := r.Plan.Live(); len(live) != 1 || live[0] != "/ (ext4): neither on LVM nor btrfs" && !strings.HasPrefix(live[0], "/ (") {
		t.Errorf("live: %q", live)
	}
}

func TestFactsOfAClient(t *testing.T) {
	g := newGolden(t, "true", "rsync")
	s, err := Connect(t.Context(), g.remote())
	must(t, err)
	defer s.Close()
	f := s.Facts
	if f.Host != "golden" || f.OS != "Golden 1" || !strings.HasPrefix(f.Kernel, "Linux ") || f.Raw["time"] == "" {
		t.Errorf("facts: %+v", f)
	}
	if _, err := f.Layout(); err == nil || err.Error() != "lsblk says nothing of the disks" {
		t.Errorf("layout of a client without lsblk: %v", err)
	}
}

func TestClientsThatCannotBeCaptured(t *testing.T) {
	without := newGolden(t, "true")
	with := newGolden(t, "true", "rsync")
	change := func(r Remote, address string, options ...string) Remote {
		if address != "" {
			r.Address = strings.Replace(r.Address, "root@127.0.0.1", address, 1)
		}
		r.Options = append(options, r.Options...)
		return r
	}
	for _, tt := range []struct {
		name, want string
		remote     Remote
	}{
		{"no rsync", "rsync is not installed there", without.remote()},
		{"not root", "the user there has number \"7\", want root's 0", change(with.remote(), "bob@127.0.0.1")},
		{"unknown host key", "Host key verification failed", change(with.remote(), "", "-o", "UserKnownHostsFile=/dev/null")},
		{"no key", "Permission denied", change(with.remote(), "", "-o", "PubkeyAuthentication=no")},
		{"nobody there", "Connection refused", Remote{Address: fmt.Sprintf("root@127.0.0.1:%d", capturetest.FreePort(t))}},
		{"an option", "want root@HOST", Remote{Address: "root@-oProxyCommand=x"}},
		{"no port", "want a number from 1 to 65535", Remote{Address: "root@h:0"}},
		{"no host", "want root@HOST", Remote{Address: "root@"}},
	} {
		s, err := Connect(t.Context(), tt.remote)
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// Two files that are written in lockstep are of one moment, and no more is left
// of the snapshot than of the captured tree's mounts.
func TestSnapshotOfBtrfs(t *testing.T) {
	imagetest.Root(t)
	if b, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(b), "\tbtrfs\n") {
		t.Skip("this kernel has no btrfs: modprobe btrfs")
	}
	file := filepath.Join(t.TempDir(), "btrfs.img")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, 256<<20))
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v: %s: make deps", name, strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out))
	}
	run("mkfs.btrfs", "-q", file)
	loop := run("losetup", "-f", "--show", file)
	t.Cleanup(func() { exec.Command("losetup", "-d", loop).Run() })
	mnt := filepath.Join(t.TempDir(), "top")
	must(t, os.Mkdir(mnt, 0o755))
	run("mount", loop, mnt)
	for _, v := range []string{"@data", "@data/nested", "other"} {
		run("btrfs", "subvolume", "create", filepath.Join(mnt, v))
	}
	run("umount", mnt)

	var st unix.Stat_t
	must(t, unix.Stat(loop, &st))
	g := newGolden(t, fmt.Sprintf(`
mknod %s b %d %d
mkdir -p /data
mount -t btrfs -o subvol=@data %s /data
echo nested >/data/nested/file
(while :; do echo >>/data/one; sync /data/one; echo >>/data/two; sync /data/two; done) &`, loop, unix.Major(st.Rdev), unix.Minor(st.Rdev), loop), "rsync", "btrfs", "sync")
	everything(t, filepath.Join(g.Root, "srv"))
	dir := filepath.Join(t.TempDir(), "tree")
	r := g.capture(t, dir, "")
	if want := []string{"/data/nested stays out: it is a subvolume of its own and not mounted"}; !slices.Equal(r.Plan.notes, want) {
		t.Errorf("notes: %q, want %q", r.Plan.notes, want)
	}
	if len(r.Changed) > 0 {
		t.Errorf("changed: %q, want nothing: what changes was read from a snapshot", r.Changed)
	}
	if live := r.Plan.Live(); len(live) != 1 || !strings.HasPrefix(live[0], "/ (") {
		t.Errorf("live: %q, want / alone", live)
	}
	one, two := size(t, filepath.Join(dir, "data/one")), size(t, filepath.Join(dir, "data/two"))
	if one == 0 || one-two != 0 && one-two != 1 {
		t.Errorf("files written in lockstep have %d and %d bytes", one, two)
	}
	if left := g.left(t); left != "" {
		t.Errorf("left on the client: %s", left)
	}

	// Who gives up leaves nothing behind either.
	ctx, cancel := context.WithCancel(t.Context())
	s, err := Connect(ctx, g.remote())
	must(t, err)
	_, err = s.Capture(ctx, NewPlan(s.Facts, tree.Builtin(), true), filepath.Join(t.TempDir(), "tree"), func(int64, int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a capture that is given up: %v, want %v", err, context.Canceled)
	}
	must(t, s.Close())
	if left := g.left(t); left != "" {
		t.Errorf("left on the client after giving up: %s", left)
	}

	// Nor does a connection that breaks.
	s, err = Connect(t.Context(), g.remote())
	must(t, err)
	plan := NewPlan(s.Facts, tree.Builtin(), true)
	_, err = s.hold(t.Context(), &plan)
	must(t, err)
	if g.left(t) == "" {
		t.Error("no snapshot is seen while it is held")
	}
	must(t, s.cmd.Process.Kill())
	if err := s.Close(); err == nil {
		t.Error("a broken connection is no error")
	}
	for deadline := time.Now().Add(20 * time.Second); g.left(t) != ""; {
		if time.Now().After(deadline) {
			t.Fatalf("left on the client after the connection broke: %s", g.left(t))
		}
	}
}

// left is what a capture has left on the client.
func (g golden) left(t *testing.T) (lines string) {
	t.Helper()
	s, err := Connect(t.Context(), g.remote())
	must(t, err)
	defer s.Close()
	for line := range strings.Lines(s.Facts.Raw["mountinfo"] + "\n" + s.Facts.Raw["subvolumes"]) {
		if strings.Contains(line, "rookery.") || strings.Contains(line, "path rookery-") {
			lines += line
		}
	}
	return lines
}

func size(t *testing.T, file string) int64 {
	t.Helper()
	info, err := os.Stat(file)
	must(t, err)
	return info.Size()
}
