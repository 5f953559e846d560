package multicast

import (
	"bytes"
	"testing"
)

func TestParse(t *testing.T) {
	h := header{layer: [8]byte{1, 2, 3}, sender: 4, seq: 5, pass: 6, last: 7, block: 8, row: 9, ends: 10}
	whole := append(appendHeader(nil, h), bytes.Repeat([]byte{10}, 128)...)
	got, shard, err := parse(whole)
	if err != nil || got != h || len(shard) != 128 || shard[0] != 10 {
		t.Fatalf("parse: %+v, %d bytes, %v", got, len(shard), err)
	}
	for name, b := range map[string][]byte{
		"nothing":           nil,
		"a header alone":    whole[:headerSize],
		"half a header":     whole[:headerSize/2],
		"half a unit":       whole[:headerSize+32],
		"another version":   append([]byte{'R', 'K', 'M', 1}, whole[4:]...),
		"too large a shard": append(whole, make([]byte, maxShard)...),
	} {
		if _, _, err := parse(b); err == nil {
			t.Errorf("%s: nil, want an error", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(append(appendHeader(nil, header{block: 1, row: 2}), make([]byte, 64)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, shard, err := parse(b)
		if err != nil {
			return
		}
		again := append(appendHeader(nil, h), shard...)
		if !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}
