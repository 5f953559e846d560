package image_test

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
)

// What does not fit is said before anything is written, in bytes and in inodes.
func TestNoSpace(t *testing.T) {
	imagetest.Root(t) // to mount
	big := imagetest.New().File("big", imagetest.Noise(1, 3<<20))
	many := imagetest.New()
	for i := range 20 {
		many.File(fmt.Sprint(i), nil)
	}
	hole := make([]byte, 40<<20)
	copy(hole, "not only")
	for _, tt := range []struct {
		name, mount string
		tree        *imagetest.Tree
		want        string
	}{
		{"enough", "size=4m", big, ""},
		{"bytes", "size=2m", big, "no space: 2097152 bytes are free, the tree takes 314"},
		{"inodes", "size=2m,nr_inodes=11", many, "no space: 10 inodes are free, the tree takes 21"},
		{"hard links take none", "size=2m,nr_inodes=6", imagetest.New().File("a", nil).Link("b", "a").Link("c", "a").Link("d", "a"), ""},
		{"a hole", "size=12m", imagetest.New().File("hole", hole), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, tt.mount); err != nil {
				t.Skipf("mount: %v: run in a mount namespace of root's", err)
			}
			defer unix.Unmount(dir, unix.MNT_DETACH)
			layer, d := tt.tree.Layer(t)
			_, err := image.Extract(t.Context(), dir, image.Options{}, image.Layer{Descriptor: d, Bytes: bytes.NewReader(layer)})
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), dir+": "+tt.want) {
				t.Fatalf("%v, want %q", err, tt.want)
			}
			if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
				t.Fatalf("%v, %v lie there", err, names)
			}
		})
	}
}
