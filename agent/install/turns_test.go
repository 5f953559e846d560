package install

import (
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
		want bool
	}{
		{tree.Change{Kind: "added", Path: "lost+found"}, true},
		{tree.Change{Kind: "added", Path: "srv/lost+found"}, true},
		{tree.Change{Kind: "added", Path: "boot"}, true},
		{tree.Change{Kind: "added", Path: "var/log/rookery/install.log"}, true},
		{tree.Change{Kind: "added", Path: "var/log"}, true},
		{tree.Change{Kind: "added", Path: "var/lo"}, false},
		{tree.Change{Kind: "changed", Path: "var/log", What: []string{"owner"}}, false},
		{tree.Change{Kind: "added", Path: "lost+found/x"}, false},
		{tree.Change{Kind: "added", Path: "etc/cron.d/x"}, false},
		{tree.Change{Kind: "added", Path: "boot/efi/x"}, false},
		{tree.Change{Kind: "removed", Path: "boot/efi/x"}, false},
		{tree.Change{Kind: "changed", Path: "boot/efi", What: []string{"mode", "time"}}, true},
		{tree.Change{Kind: "changed", Path: "boot/efi/x", What: []string{"owner"}}, true},
		{tree.Change{Kind: "changed", Path: "boot/efi/x", What: []string{"content", "time"}}, false},
		{tree.Change{Kind: "changed", Path: "boot/efix", What: []string{"mode"}}, false},
		{tree.Change{Kind: "changed", Path: "srv", What: []string{"mode"}}, false},
		{tree.Change{Kind: "changed", Path: ".", What: []string{"mode"}}, false},
	} {
		if got := meant(tt.Change, plan); got != tt.want {
			t.Errorf("%+v: %v, want %v", tt.Change, got, tt.want)
		}
	}
}
