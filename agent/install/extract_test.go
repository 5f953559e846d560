package install

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"rookery/disklayout"
	"rookery/image"
	"rookery/transport/transporttest"
)

// A bug in the extraction fails the step; it does not end the agent.
func TestAPanicWhileExtractingIsAFailure(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 64<<10)
	l := &layer{pieces: transporttest.Seed(info, content), needs: []need{{Frame: image.Frame{Size: 100, PlainSize: 100}}}}
	err := extract(t.Context(), []*layer{l}, nil, 2) // without an extractor
	if err == nil || !strings.Contains(err.Error(), "panic: ") {
		t.Errorf("extract: %v, want the panic told", err)
	}
}

// A filesystem that cannot be mounted is known before the disk is written.
func TestPartitionRefusesWhatCannotBeMounted(t *testing.T) {
	const size = 64 << 20
	disk := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, size); err != nil {
		t.Fatal(err)
	}
	c := &Computer{Root: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
	_, err := c.Partition(t.Context(), disklayout.Plan{
		Disk:       disklayout.Disk{Name: "disk.img", Path: disk, Size: size},
		Partitions: []disklayout.PlannedPartition{{Number: 1, Name: "root", Type: disklayout.Linux, Start: 1 << 20, End: 63 << 20, FS: "nosuchfs", Mount: "/"}},
	})
	if err == nil || !strings.Contains(err.Error(), "partition root: the kernel knows no nosuchfs") {
		t.Errorf("Partition: %v, want the partition and its filesystem named", err)
	}
	if b, err := os.ReadFile(disk); err != nil || strings.Trim(string(b), "\x00") != "" {
		t.Errorf("the disk was written to (%v)", err)
	}
}
