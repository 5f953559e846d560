package image

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
)

var fast, _ = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))

// WrapIndexBody makes an index of its body, for fuzzing.
func WrapIndexBody(body []byte) []byte {
	return skippable(skippableIndex, fast.EncodeAll(body, []byte(indexMagic)))
}

// IndexBody is the opposite.
func IndexBody(tb testing.TB, index []byte) []byte {
	dec, err := zstd.NewReader(nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer dec.Close()
	body, err := dec.DecodeAll(index[8+len(indexMagic):], nil)
	if err != nil {
		tb.Fatal(err)
	}
	return body
}

// EncodeIndex encodes x as Write does.
func EncodeIndex(tb testing.TB, x *Index) []byte {
	b, err := x.encode(fast)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// NewEncoder is the encoder of Write, for one frame at a time.
func NewEncoder(tb testing.TB) *zstd.Encoder {
	enc, err := newEncoder(1)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { enc.Close() })
	return enc
}

// Reboot gives the machine another boot ID until the test ends.
func Reboot(tb testing.TB) {
	was := bootFile
	tb.Cleanup(func() { bootFile = was })
	bootFile = filepath.Join(tb.TempDir(), "boot_id")
	if err := os.WriteFile(bootFile, []byte(rand.Text()), 0o644); err != nil {
		tb.Fatal(err)
	}
}

// SyncAlways has journals sync after every frame until the test ends.
func SyncAlways(tb testing.TB) {
	was := syncEvery
	tb.Cleanup(func() { syncEvery = was })
	syncEvery = 0
}

// A JournalOf has frames of a layer each.
type JournalOf []int

// Parse is what counts in a boot, and the length of what is whole.
func (j JournalOf) Parse(b []byte, boot uint64) (done [][2]int, length int64, err error) {
	found, length, err := parseJournal(b, [32]byte{1}, boot, j)
	for id := range found {
		done = append(done, [2]int{id.layer, id.frame})
	}
	return done, length, err
}

// Journal writes a journal of records: a kind, a layer and a number each.
func Journal(records ...[3]uint64) []byte {
	b := head([32]byte{1})
	for _, r := range records {
		b = append(b, record(byte(r[0]), int(r[1]), r[2])...)
	}
	return b
}

// FrameOf compresses without much ado.
func FrameOf(plain []byte) []byte { return fast.EncodeAll(plain, nil) }
