package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"rookery/image/capture/capturetest"
	"rookery/image/chroot"
)

// What runs in a tree begins as this program, before TestMain is asked.
func init() { chroot.Child() }

func TestCaptureAndCaptureAgain(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a golden client in a directory needs root: run go test as root")
	}
	g := capturetest.Start(t, "touch /stop; (while [ -e /stop ]; do echo >>/srv/log; usleep 1000; done) &", "rsync")
	state := filepath.Join(t.TempDir(), "state")
	args := []string{"image", "capture", "golden", g.Address, "--identity", g.Options[1], "--ssh-option", g.Options[5], "--ssh-option", g.Options[3], "--exclude", "/srv/*.iso"}
	big := filepath.Join(g.Root, "srv/disc.iso")
	if err := os.WriteFile(big, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := must(t, state, append(args, "--dry-run")...); !strings.Contains(out, "): live, neither on LVM nor btrfs\n") ||
		!strings.Contains(out, "disk layout: cannot be taken over: lsblk says nothing of the disks\n") {
		t.Errorf("dry run: %s", out)
	}
	if _, err := os.Stat(state); err == nil {
		t.Error("a dry run makes the state directory")
	}

	first := must(t, state, args...)
	for _, want := range []string{
		"warning: 1 files changed during the capture, since these filesystems have no snapshot: / (", "  /srv/log\n",
		"warning: the disk layout cannot be taken over, nodes without one get the default: lsblk says nothing of the disks\n", "\ngolden:1: ",
	} {
		if !strings.Contains(first, want) {
			t.Errorf("capture says %s\nwant %q", first, want)
		}
	}
	if _, err := os.Stat(filepath.Join(state, "trees/golden/srv/disc.iso")); err == nil {
		t.Error("what is to stay out is in the tree")
	}
	var v imageView
	if err := json.Unmarshal([]byte(must(t, state, "image", "show", "golden:1", "-o", "json")), &v); err != nil {
		t.Fatal(err)
	}
	for label, want := range map[string]string{"source": g.Address, "host": "golden", "layout": "", "parent": ""} {
		if got := v.Labels["rookery."+label]; got != want {
			t.Errorf("label %s: %q, want %q", label, got, want)
		}
	}
	if v.Labels["rookery.captured"] == "" || v.Labels["rookery.firmware"] == "" {
		t.Errorf("labels: %v", v.Labels)
	}

	if err := os.Remove(filepath.Join(g.Root, "stop")); err != nil {
		t.Fatal(err)
	}
	second := must(t, state, args...)
	if !strings.Contains(second, " 1 deleted, ") || !strings.Contains(second, "golden:2: ") {
		t.Errorf("captured again: %s", second)
	}
	if err := json.Unmarshal([]byte(must(t, state, "image", "show", "golden:2", "-o", "json")), &v); err != nil {
		t.Fatal(err)
	}
	if v.Labels["rookery.parent"] != "golden:1" || len(v.Layers) > 2 {
		t.Errorf("the second version: %+v", v)
	}

	// A tree with somebody's work in it is not captured over.
	must(t, state, "image", "checkout", "golden:1", "other")
	if out, err := run(t, state, append([]string{"image", "capture", "other"}, args[3:]...)...); err == nil || !strings.Contains(err.Error(), "is there and not from a capture") {
		t.Errorf("capture over a tree: %v: %s", err, out)
	}
	out, err := run(t, state, "image", "shell", "other", "--", "/bin/sh", "-c", "cat /etc/os-release; exit 3")
	if err != chroot.Exit(3) || !strings.Contains(out, "Golden 1") {
		t.Errorf("shell: %v: %s", err, out)
	}
}
