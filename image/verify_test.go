package image_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/wire"
)

// A badDisk cannot read one byte.
type badDisk struct {
	io.ReaderAt
	bad int64
	err error
}

func (d badDisk) ReadAt(p []byte, off int64) (int, error) {
	if off <= d.bad && d.bad < off+int64(len(p)) {
		return 0, d.err
	}
	return d.ReaderAt.ReadAt(p, off)
}

func TestVerifyLayer(t *testing.T) {
	tree := imagetest.New().File("a", []byte("small")).File("b", imagetest.Noise(1, 40<<20)).File("c", []byte("last"))
	layer, d := tree.Layer(t)
	x := readIndex(t, layer, d)
	last := len(x.Frames) - 1
	seekTable := d.IndexOffset + d.IndexSize
	flip := func(at int64) io.ReaderAt {
		b := bytes.Clone(layer)
		b[at] ^= 4
		return bytes.NewReader(b)
	}
	other := d
	other.Digest = wire.DigestOf(nil)
	for _, tt := range []struct {
		name  string
		layer io.ReaderAt
		d     image.Descriptor
		want  []string // part and files each
	}{
		{"nothing", bytes.NewReader(layer), d, nil},
		{"first frame", flip(100), d, []string{"frame 0 [a b]"}},
		{"frame in the middle", flip(x.Frames[1].Offset), d, []string{"frame 1 [b]"}},
		{"last frame", flip(d.IndexOffset - 1), d, []string{fmt.Sprintf("frame %d [b c]", last)}},
		{"index", flip(d.IndexOffset + 30), d, []string{"index []"}},
		{"seek table", flip(seekTable + 9), d, []string{"seek table []"}},
		{"end", flip(d.Size - 1), d, []string{"seek table []"}},
		{"digest", bytes.NewReader(layer), other, []string{"layer []"}},
		{"longer", bytes.NewReader(append(bytes.Clone(layer), 0)), d, []string{"layer []"}},
		{"cut in the seek table", bytes.NewReader(layer[:d.Size-1]), d, []string{"seek table []"}},
		{"cut in the last frame", bytes.NewReader(layer[:d.IndexOffset-1]), d, []string{"frames []", "index []", "seek table []"}},
		{"bad sector", badDisk{bytes.NewReader(layer), x.Frames[1].Offset, unix.EIO}, d, []string{"frame 1 [b]"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			done := int64(0)
			damages, err := image.VerifyLayer(tt.layer, tt.d, func(n int64) { done = n })
			if err != nil || done != d.Size {
				t.Fatalf("%v, %d of %d bytes", err, done, d.Size)
			}
			var got []string
			for _, d := range damages {
				got = append(got, fmt.Sprintf("%s %v", d.Part, d.Files))
			}
			if tt.name == "cut in the last frame" { // its data frames are as many as were read at a time
				got = slices.Compact(got)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q: %v", got, tt.want, damages)
			}
		})
	}
	if _, err := image.VerifyLayer(badDisk{bytes.NewReader(layer), x.Frames[1].Offset, errors.New("gone")}, d, nil); err == nil || !strings.Contains(err.Error(), "frame 1 at ") {
		t.Errorf("a broken connection: %v", err)
	}
}

func TestDescribe(t *testing.T) {
	for _, tree := range []*imagetest.Tree{imagetest.New(), imagetest.Nasty()} {
		layer, want := tree.Layer(t)
		got, err := image.Describe(bytes.NewReader(layer), want.Size)
		want.Digest, want.DiffID = "", ""
		if err != nil || got != want {
			t.Fatalf("%+v, %v, want %+v", got, err, want)
		}
		for _, cut := range []int64{1, 8, want.Size - want.IndexOffset, want.Size} {
			if _, err := image.Describe(bytes.NewReader(layer), want.Size-cut); !errors.Is(err, image.ErrForeign) {
				t.Errorf("%d bytes cut off: %v", cut, err)
			}
		}
		// What only looks like one of ours is damaged, not foreign.
		for _, at := range []int64{want.IndexOffset + 40, want.IndexOffset + want.IndexSize} {
			bad := bytes.Clone(layer)
			bad[at] ^= 1
			if _, err := image.Describe(bytes.NewReader(bad), want.Size); err == nil || errors.Is(err, image.ErrForeign) {
				t.Errorf("flipped bit at %d: %v", at, err)
			}
		}
	}
}

// Whatever Describe takes, ReadIndex reads.
func FuzzDescribe(f *testing.F) {
	layer, d := imagetest.New().File("f", []byte("content")).Layer(f)
	f.Add(layer)
	f.Add(layer[d.IndexOffset:])
	f.Add(layer[:len(layer)-1])
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := image.Describe(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		d.Digest = wire.DigestOf(b)
		if _, err := image.ReadIndex(bytes.NewReader(b), d); err != nil {
			t.Fatal(err)
		}
		if damages, err := image.VerifyLayer(bytes.NewReader(b), d, nil); err != nil {
			t.Fatal(damages, err)
		}
	})
}
