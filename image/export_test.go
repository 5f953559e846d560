package image

import (
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
