package wire

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// A Digest is an OCI content digest, "sha256:" and 64 lower-case hex digits.
type Digest string

const digestAlgorithm = "sha256:"

// DigestOf is the digest of b.
func DigestOf(b []byte) Digest {
	sum := sha256.Sum256(b)
	return Digest(digestAlgorithm + hex.EncodeToString(sum[:]))
}

// DigestSum writes a SHA-256 sum as a digest.
func DigestSum(sum [32]byte) Digest {
	return Digest(digestAlgorithm + hex.EncodeToString(sum[:]))
}

// Check says what is wrong with the form of d, or nil.
func (d Digest) Check() error {
	hexed, ok := strings.CutPrefix(string(d), digestAlgorithm)
	if !ok {
		return fmt.Errorf("digest %.80q: want sha256:HEX", string(d))
	}
	if len(hexed) != 64 {
		return fmt.Errorf("digest %.80q: sha256 has %d digits, want 64", string(d), len(hexed))
	}
	if strings.Trim(hexed, "0123456789abcdef") != "" {
		return fmt.Errorf("digest %.80q: want lower-case hex", string(d))
	}
	return nil
}

// Hex is the digits of d without the algorithm.
func (d Digest) Hex() string { return strings.TrimPrefix(string(d), digestAlgorithm) }

// Verify says whether b is what d names.
func (d Digest) Verify(b []byte) error {
	if err := d.Check(); err != nil {
		return err
	}
	if got := DigestOf(b); got != d {
		return fmt.Errorf("digest is %s, want %s", got, d)
	}
	return nil
}
