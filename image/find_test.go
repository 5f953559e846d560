package image_test

import (
	"slices"
	"testing"

	"rookery/image"
)

func TestFind(t *testing.T) {
	x := image.View{Entries: []image.Entry{
		{Path: ".", Type: image.Dir},
		{Path: "a", Type: image.Symlink, Link: "b"},
		{Path: "b", Type: image.Symlink, Link: "a"},
		{Path: "boot", Type: image.Dir},
		{Path: "boot/grub", Type: image.Dir},
		{Path: "boot/grub/grub.cfg", Type: image.Regular},
		{Path: "boot/vmlinuz-6.1", Type: image.Regular},
		{Path: "boot-old", Type: image.Dir},
		{Path: "boot-old/vmlinuz-5.10", Type: image.Regular},
		{Path: "lib", Type: image.Symlink, Link: "usr/lib"},
		{Path: "out", Type: image.Symlink, Link: "../boot"},
		{Path: "root", Type: image.Symlink, Link: "/boot"},
		{Path: "usr", Type: image.Dir},
		{Path: "usr/bin", Type: image.Dir},
		{Path: "usr/bin/grub2-install", Type: image.Regular},
		{Path: "usr/lib", Type: image.Dir},
		{Path: "usr/lib/kernel", Type: image.Symlink, Link: "../../boot/./grub/../vmlinuz-6.1"},
		{Path: "usr/sbin", Type: image.Symlink, Link: "bin"},
	}}
	for name, want := range map[string]string{
		".":                      ".",
		"boot/vmlinuz-6.1":       "boot/vmlinuz-6.1",
		"usr/sbin/grub2-install": "usr/bin/grub2-install",
		"lib/kernel":             "boot/vmlinuz-6.1",
		"boot/vmlinuz":           "", // is not there
		"boot/vmlinuz-6.1/x":     "", // lies below a file
		"a":                      "", // leads round and round
		"out":                    "", // leads out
		"root/grub":              "", // leads to another root
	} {
		if e, ok := x.Find(name); ok != (want != "") || ok && e.Path != want {
			t.Errorf("Find(%q): %q, %v; want %q", name, e.Path, ok, want)
		}
	}
	for dir, want := range map[string][]string{
		"boot": {"grub", "vmlinuz-6.1"}, "usr/sbin": {"grub2-install"}, "lib": {"kernel"}, "a": nil, "boot/vmlinuz-6.1": nil,
		".": {"a", "b", "boot", "boot-old", "lib", "out", "root", "usr"},
	} {
		if got := x.Names(dir); !slices.Equal(got, want) {
			t.Errorf("Names(%q): %q, want %q", dir, got, want)
		}
	}
}
