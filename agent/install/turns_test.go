package install

import (
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"testing"

	"rookery/disklayout"
	"rookery/image/tree"
)

func TestTakeTurns(t *testing.T) {
	for transports, want := range map[string][][]string{
		"bittorrent http":            {{"bittorrent", "http"}},
		"rsync":                      {{"rsync"}},
		"bittorrent http rsync":      {{"bittorrent", "http"}, {"rsync"}},
		"rsync http bittorrent":      {{"rsync"}, {"http", "bittorrent"}},
		"bittorrent rsync http":      {{"bittorrent"}, {"rsync"}, {"http"}},
		"http rsync http rsync http": {{"http"}, {"rsync"}},
	} {
		if got := takeTurns(strings.Fields(transports)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", transports, got, want)
		}
	}
}

// What differs because there are filesystems is as it has to be, and nothing else.
func TestMeant(t *testing.T) {
	plan := disklayout.Plan{Partitions: []disklayout.PlannedPartition{
		{Number: 1, Mount: "/boot/efi", FS: disklayout.VFAT}, {Number: 2, Mount: "/", FS: disklayout.Ext4}, {Number: 3, Mount: "/srv", FS: disklayout.Ext4},
	}}
	if got, want := stays(plan), []string{"boot", "boot/efi", "boot/efi/lost+found", "lost+found", "srv", "srv/lost+found"}; !slices.Equal(got, want) {
		t.Errorf("stays: %q, want %q", got, want)
	}
	for _, tt := range []struct {
		tree.Change
		mode fs.FileMode
		want bool
	}{
		{tree.Change{Kind: "added", Path: "lost+found"}, fs.ModeDir | 0o755, true},
		{tree.Change{Kind: "added", Path: "srv/lost+found"}, fs.ModeDir | 0o755, true},
		{tree.Change{Kind: "added", Path: "boot"}, fs.ModeDir | 0o755, true},
		{tree.Change{Kind: "added", Path: "var/log/rookery/install.log"}, 0o644, true},
		{tree.Change{Kind: "added", Path: "var/log"}, fs.ModeDir | 0o755, true},
		{tree.Change{Kind: "added", Path: "lost+found"}, fs.ModeSetuid | 0o755, false},
		{tree.Change{Kind: "added", Path: "srv/lost+found"}, fs.ModeSymlink | 0o777, false},
		{tree.Change{Kind: "added", Path: "var/log/rookery"}, fs.ModeSymlink | 0o777, false},
		{tree.Change{Kind: "added", Path: "var/log/rookery/install.log"}, fs.ModeSymlink | 0o777, false},
		{tree.Change{Kind: "added", Path: "var/log/rookery/install.log"}, fs.ModeSetuid | 0o755, false},
		{tree.Change{Kind: "added", Path: "var/log/rookery/install.log"}, fs.ModeDir | 0o755, false},
		{tree.Change{Kind: "added", Path: "var/lo"}, 0o644, false},
		{tree.Change{Kind: "changed", Path: "var/log", What: []string{"owner"}}, 0o644, false},
		{tree.Change{Kind: "added", Path: "lost+found/x"}, 0o644, false},
		{tree.Change{Kind: "added", Path: "etc/cron.d/x"}, 0o644, false},
		{tree.Change{Kind: "added", Path: "boot/efi/x"}, 0o644, false},
		{tree.Change{Kind: "removed", Path: "boot/efi/x"}, 0o644, false},
		{tree.Change{Kind: "changed", Path: "boot/efi", What: []string{"mode", "time"}}, fs.ModeDir | 0o755, true},
		{tree.Change{Kind: "changed", Path: "boot/efi/x", What: []string{"owner"}}, 0o644, true},
		{tree.Change{Kind: "changed", Path: "boot/efi/x", What: []string{"content", "time"}}, 0o644, false},
		{tree.Change{Kind: "changed", Path: "boot/efix", What: []string{"mode"}}, 0o644, false},
		{tree.Change{Kind: "changed", Path: "srv", What: []string{"mode"}}, 0o644, false},
		{tree.Change{Kind: "changed", Path: ".", What: []string{"mode"}}, 0o644, false},
	} {
		if got := meant(tt.Change, tt.mode, plan); got != tt.want {
			t.Errorf("%+v, %v: %v, want %v", tt.Change, tt.mode, got, tt.want)
		}
	}
}
