package swarm

import (
	"crypto/sha1"

	"rookery/transport"
)

func rehash(info transport.Info, content []byte, length int) transport.Info {
	info.PieceLength = int64(length)
	info.Hashes = nil
	for off := 0; off < len(content); off += length {
		info.Hashes = append(info.Hashes, sha1.Sum(content[off:min(off+length, len(content))]))
	}
	return info
}
