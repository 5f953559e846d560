// Package multicast sends the pieces of a layer to any number of nodes at once:
// a Sender repeats them at a set rate, as numbered datagrams with forward error
// correction, and a Source begins to listen at any time. What is lost comes with
// the next round or from another source.
package multicast

import (
	"encoding/binary"
	"errors"
)

// magic begins every datagram; its last byte is the version of what follows and
// of how a layer is cut.
const magic = 'R'<<24 | 'K'<<16 | 'M'<<8 | 2

// headerSize is how many bytes of a datagram are before the shard.
const headerSize = 36

// A header says what the shard behind it is. A datagram needs no other one.
type header struct {
	layer  [8]byte // the first bytes of the infohash
	sender uint32  // random: two may send the same layer
	seq    uint32  // of this sender's datagrams, all of them
	pass   uint32  // of this sender, a turn over what is wanted
	last   uint32  // block of the pass
	block  uint32
	row    uint16 // in the block: data, then parity
	ends   uint16 // 1: the pass, with this datagram, 2: with the next one, ...; 0: not soon
}

var errForeign = errors.New("not a datagram of ours")

// appendHeader adds the header to b.
func appendHeader(b []byte, h header) []byte {
	b = binary.BigEndian.AppendUint32(b, magic)
	b = append(b, h.layer[:]...)
	for _, n := range []uint32{h.sender, h.seq, h.pass, h.last, h.block} {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	b = binary.BigEndian.AppendUint16(b, h.row)
	return binary.BigEndian.AppendUint16(b, h.ends)
}

// parse takes a datagram apart. The shard is of a size that a layout can have; what
// the numbers mean depends on the layer.
func parse(b []byte) (h header, shard []byte, err error) {
	if len(b) < headerSize || binary.BigEndian.Uint32(b) != magic {
		return h, nil, errForeign
	}
	shard = b[headerSize:]
	if checkShard(len(shard)) != nil {
		return h, nil, errForeign
	}
	copy(h.layer[:], b[4:])
	for i, n := range []*uint32{&h.sender, &h.seq, &h.pass, &h.last, &h.block} {
		*n = binary.BigEndian.Uint32(b[12+4*i:])
	}
	h.row, h.ends = binary.BigEndian.Uint16(b[32:]), binary.BigEndian.Uint16(b[34:])
	return h, shard, nil
}
