package install

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"rookery/disklayout"
	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/oci"
	"rookery/transport"
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

// Who needs all frames takes the whole layer, and can give it to everybody; who
// does not, takes what it needs.
func TestWant(t *testing.T) {
	lower, d := imagetest.New().File("a", imagetest.Noise(1, 9<<20)).File("b", imagetest.Noise(2, 9<<20)).Layer(t)
	index, err := image.ReadIndex(bytes.NewReader(lower), d)
	if err != nil {
		t.Fatal(err)
	}
	gone := &image.Index{Entries: imagetest.New().Whiteout("b").Entries}
	for _, tt := range []struct {
		stack []*image.Index
		whole bool
	}{{[]*image.Index{index}, true}, {[]*image.Index{index, gone}, false}} {
		view, err := image.Flatten(tt.stack...)
		if err != nil {
			t.Fatal(err)
		}
		const piece = 16
		info := transport.Info{Layer: d.Digest, Length: d.Size, PieceLength: piece, Hashes: make([][20]byte, (d.Size+piece-1)/piece)}
		l := &layer{Layer: oci.Layer{Descriptor: d}, at: []int{0}, pieces: transport.NewPieces(info, nil)}
		l.want(view)
		if whole := !slices.Contains(l.pieces.Wanted(), false); whole != tt.whole || len(l.needs) != len(view.Needed(0)) {
			t.Errorf("%d layers: all of it %t, %d frames", len(tt.stack), whole, len(l.needs))
		}
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
