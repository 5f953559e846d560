package image_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// BenchmarkFrames makes the table of docs/layer-format.md: what each size of
// frame and each level costs for the tarball ROOKERY_TAR. MB is of all frames,
// without an index; "last-ms" is how long the slowest one takes to decompress.
// All times are the processor's.
//
//	ROOKERY_TAR=out/cache/debian12.tar go test -run '^$' -bench Frames -benchtime 1x -cpu 1 ./image
func BenchmarkFrames(b *testing.B) {
	file := os.Getenv("ROOKERY_TAR")
	if file == "" {
		b.Skip("needs a tarball: set ROOKERY_TAR")
	}
	stream, err := os.ReadFile(file)
	if err != nil {
		b.Fatal(err)
	}
	ends := contentEnds(b, stream)
	for _, level := range []zstd.EncoderLevel{zstd.SpeedDefault, zstd.SpeedBetterCompression, zstd.SpeedBestCompression} {
		for _, c := range []struct{ size, enough int }{
			{1 << 20, 1 << 20}, {2 << 20, 2 << 20}, {4 << 20, 4 << 20}, {4 << 20, 3 << 20}, {6 << 20, 5 << 20},
			{8 << 20, 8 << 20}, {8 << 20, 6 << 20}, {8 << 20, 4 << 20}, {16 << 20, 12 << 20},
		} {
			b.Run(fmt.Sprintf("%s/%d-%dMiB", level, c.enough>>20, c.size>>20), func(b *testing.B) {
				window := 1 << 20
				for window < c.size {
					window *= 2
				}
				enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window))
				if err != nil {
					b.Fatal(err)
				}
				defer enc.Close()
				frames := cut(stream, ends, c.size, c.enough)
				compressed := make([][]byte, len(frames))
				start := cpuTime(b)
				for b.Loop() {
					for i, f := range frames {
						compressed[i] = enc.EncodeAll(f, nil)
					}
				}
				b.ReportMetric((cpuTime(b)-start).Seconds()/float64(b.N), "s")
				b.ReportMetric(0, "ns/op")
				size := 0
				for _, c := range compressed {
					size += len(c)
				}
				b.ReportMetric(float64(size)/1e6, "MB")
				b.ReportMetric(float64(len(frames)), "frames")
				all, slowest := decode(b, compressed, c.size)
				b.ReportMetric(float64(len(stream))/1e6/all.Seconds(), "decode-MB/s")
				b.ReportMetric(slowest.Seconds()*1e3, "last-ms")
			})
		}
	}
}

func cpuTime(b *testing.B) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}

func decode(b *testing.B, frames [][]byte, size int) (all, slowest time.Duration) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.IgnoreChecksum(true))
	if err != nil {
		b.Fatal(err)
	}
	defer dec.Close()
	buf := make([]byte, 0, size)
	for _, f := range frames {
		start := cpuTime(b)
		if _, err := dec.DecodeAll(f, buf); err != nil {
			b.Fatal(err)
		}
		took := cpuTime(b) - start
		all, slowest = all+took, max(slowest, took)
	}
	return all, slowest
}

// contentEnds are the places where a file's content ends and another entry begins.
func contentEnds(b *testing.B, stream []byte) (ends []int) {
	r := bytes.NewReader(stream)
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return append(ends, len(stream))
		}
		if err != nil {
			b.Fatal(err)
		}
		if h.Size > 0 {
			end := int64(len(stream)-r.Len()) + h.Size
			ends = append(ends, int((end+511)&^511))
		}
	}
}

// cut cuts as Write does, but for entries without content, which stay with what
// comes before the next content.
func cut(stream []byte, ends []int, size, enough int) (frames [][]byte) {
	at, entry := 0, 0
	for _, end := range ends {
		if entry-at >= enough && end-at > size {
			frames, at = append(frames, stream[at:entry]), entry
		}
		for end-at > size {
			frames, at = append(frames, stream[at:at+size]), at+size
		}
		entry = end
	}
	return append(frames, stream[at:])
}
