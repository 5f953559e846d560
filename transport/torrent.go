package transport

import (
	"bytes"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"

	"rookery/wire"
)

// MaxTorrent is the size of the largest torrent file that is read, in bytes:
// a layer of 1 TiB needs 5 MiB.
const MaxTorrent = 6 << 20

// What is passed on is a whole piece, so the last node is later by the time of
// a piece for every hop: pieces want to be many and small, but each costs a
// message to every neighbour.
const (
	minPiece  = 32 << 10
	maxPiece  = 4 << 20
	maxPieces = 4096
	maxLayer  = 1 << 40
)

// An Info is what a torrent says of a layer.
type Info struct {
	Name        string      // the file's name for other clients: the layer's hex digits
	Layer       wire.Digest // from the name
	InfoHash    [20]byte    // of the info dictionary: the swarm's name
	Length      int64       // of the layer in bytes, at least 1
	PieceLength int64       // of every piece but the last, a power of two
	Hashes      [][20]byte  // SHA-1 of each piece
	Trackers    []string    // announce URLs, often none: trackers are told at run time
	File        []byte      // the torrent file itself
	whole       bool        // Layer is what the one piece has to have
}

// InfoOf is what is known of a file that has no torrent: it is one piece, which is
// right when it has the digest.
func InfoOf(file wire.Digest, size int64) Info {
	i := Info{Name: file.Hex(), Layer: file, Length: size, PieceLength: size, Hashes: make([][20]byte, 1), whole: true}
	i.InfoHash = sha1.Sum([]byte(file))
	return i
}

// right says whether b is piece n.
func (i Info) right(n int, b []byte) bool {
	if i.whole {
		return i.Layer.Verify(b) == nil
	}
	return sha1.Sum(b) == i.Hashes[n]
}

// PieceSize is the length of piece n in bytes.
func (i Info) PieceSize(n int) int {
	return int(min(i.PieceLength, i.Length-int64(n)*i.PieceLength))
}

// NewTorrent reads the size bytes of a layer and returns its torrent file: the
// same bytes for the same layer, without trackers, marked private so that
// other clients do not look for peers elsewhere.
func NewTorrent(r io.Reader, size int64, layer wire.Digest) ([]byte, error) {
	if err := layer.Check(); err != nil {
		return nil, fmt.Errorf("torrent: %w", err)
	}
	if size < 1 || size > maxLayer {
		return nil, fmt.Errorf("torrent: layer has %d bytes, want 1 to %d", size, int64(maxLayer))
	}
	private := true
	info := metainfo.Info{Name: layer.Hex(), Length: size, PieceLength: pieceLength(size), Private: &private}
	piece := make([]byte, info.PieceLength)
	for left := size; left > 0; left -= int64(len(piece)) {
		piece = piece[:min(left, info.PieceLength)]
		if n, err := io.ReadFull(r, piece); err != nil {
			return nil, fmt.Errorf("torrent: layer ends at %d, want %d bytes: %w", size-left+int64(n), size, err)
		}
		sum := sha1.Sum(piece)
		info.Pieces = append(info.Pieces, sum[:]...)
	}
	encoded, err := bencode.Marshal(info)
	if err != nil {
		return nil, fmt.Errorf("torrent: %w", err)
	}
	return bencode.Marshal(metainfo.MetaInfo{InfoBytes: encoded})
}

// pieceLength is the smallest that keeps the number of pieces bounded.
func pieceLength(size int64) int64 {
	length := int64(minPiece)
	for length < maxPiece && size > maxPieces*length {
		length *= 2
	}
	return length
}

// ParseTorrent reads a torrent file of one layer. What NewTorrent would not
// write in the info dictionary is refused, except for another piece length.
func ParseTorrent(b []byte) (Info, error) {
	info, err := parseTorrent(b)
	if err != nil {
		return Info{}, fmt.Errorf("torrent: %w", err)
	}
	return info, nil
}

func parseTorrent(b []byte) (Info, error) {
	if len(b) > MaxTorrent {
		return Info{}, fmt.Errorf("%d bytes, want at most %d", len(b), MaxTorrent)
	}
	var meta metainfo.MetaInfo
	if err := bencode.Unmarshal(b, &meta); err != nil {
		return Info{}, err
	}
	if len(meta.InfoBytes) == 0 {
		return Info{}, errors.New("no info")
	}
	in, err := meta.UnmarshalInfo()
	if err != nil {
		return Info{}, fmt.Errorf("info: %w", err)
	}
	if in.Length < 1 || in.Length > maxLayer {
		return Info{}, fmt.Errorf("length %d, want 1 to %d", in.Length, int64(maxLayer))
	}
	if l := in.PieceLength; l < 16<<10 || l > 16<<20 || bits.OnesCount64(uint64(l)) != 1 {
		return Info{}, fmt.Errorf("piece length %d, want a power of two from 16 KiB to 16 MiB", l)
	}
	count := (in.Length + in.PieceLength - 1) / in.PieceLength
	if int64(len(in.Pieces)) != 20*count {
		return Info{}, fmt.Errorf("%d bytes of hashes, want %d for %d pieces", len(in.Pieces), 20*count, count)
	}
	// What is not in this struct (other files, unknown keys, a second spelling
	// of the same) has no meaning here: encoding it again shows that.
	known := metainfo.Info{Name: in.Name, Length: in.Length, PieceLength: in.PieceLength, Pieces: in.Pieces, Private: in.Private}
	if again, err := bencode.Marshal(known); err != nil || !bytes.Equal(again, meta.InfoBytes) {
		return Info{}, errors.New("info: keys other than name, length, piece length, pieces and private, or not canonical")
	}
	out := Info{
		Name:        in.Name,
		Layer:       wire.Digest("sha256:" + in.Name),
		InfoHash:    meta.HashInfoBytes(),
		Length:      in.Length,
		PieceLength: in.PieceLength,
		Hashes:      make([][20]byte, count),
		File:        b,
	}
	if err := out.Layer.Check(); err != nil {
		return Info{}, fmt.Errorf("name: %w", err)
	}
	for n := range out.Hashes {
		copy(out.Hashes[n][:], in.Pieces[20*n:])
	}
	for _, tier := range meta.UpvertedAnnounceList() {
		out.Trackers = append(out.Trackers, tier...)
	}
	return out, nil
}
