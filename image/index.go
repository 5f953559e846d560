package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"
)

// The index is a skippable frame (RFC 8878, 3.1.2): magic, length, then
// indexMagic and a zstd frame of the body. All numbers of the body are varints,
// all strings a length and bytes:
//
//	entries, then for each:
//	  type (one byte), path
//	  Hardlink: link, and nothing else; Whiteout: nothing else
//	  mode, uid, gid, seconds (signed), nanoseconds
//	  xattrs, then for each, in the order of the names: name, value
//	  Regular: size; when not 0: bytes of the stream since the end of the last content, SHA-256
//	  Symlink: link
//	  Char, Block: major, minor
//	frames, then for each: compressed size, plain size, SHA-256
//
// Places are sums of what comes before, so they cannot overlap or run back.
const (
	skippableIndex = 0x184D2A52
	skippableSeek  = 0x184D2A5E // zstd's contrib/seekable_format says which
	seekMagic      = 0x8F92EAB1
	indexMagic     = "RKIX\x01" // the last byte is the version
)

// skippable wraps b so that zstd passes over it.
func skippable(magic uint32, b []byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, magic)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(b)))
	return append(out, b...)
}

func (x *Index) encode(enc *zstd.Encoder) ([]byte, error) {
	b := x.body()
	if len(b) > maxIndexPlain {
		return nil, fmt.Errorf("index of %d bytes, at most %d are read", len(b), maxIndexPlain)
	}
	out := skippable(skippableIndex, enc.EncodeAll(b, []byte(indexMagic)))
	if len(out) > MaxIndex {
		return nil, fmt.Errorf("index of %d bytes, at most %d are read", len(out), MaxIndex)
	}
	return out, nil
}

func (x *Index) body() []byte {
	var b []byte
	num := func(v int64) { b = binary.AppendUvarint(b, uint64(v)) }
	str := func(s string) { num(int64(len(s))); b = append(b, s...) }

	num(int64(len(x.Entries)))
	end := int64(0)
	for i := range x.Entries {
		e := &x.Entries[i]
		b = append(b, byte(e.Type))
		str(e.Path)
		switch e.Type {
		case Hardlink:
			str(e.Link)
			continue
		case Whiteout:
			continue
		}
		num(int64(e.Mode))
		num(int64(e.UID))
		num(int64(e.GID))
		b = binary.AppendVarint(b, e.MTime.Unix())
		num(int64(e.MTime.Nanosecond()))
		num(int64(len(e.Xattrs)))
		for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
			str(name)
			str(e.Xattrs[name])
		}
		switch e.Type {
		case Regular:
			num(e.Size)
			if e.Size > 0 {
				num(e.Offset - end)
				end = e.Offset + e.Size
				b = append(b, e.SHA256[:]...)
			}
		case Symlink:
			str(e.Link)
		case Char, Block:
			num(int64(e.Major))
			num(int64(e.Minor))
		}
	}
	num(int64(len(x.Frames)))
	for _, f := range x.Frames {
		num(f.Size)
		num(f.PlainSize)
		b = append(b, f.SHA256[:]...)
	}
	return b
}

// ParseIndex parses the skippable frame at [IndexOffset, IndexOffset+IndexSize)
// of a layer. What it returns can be relied on: clean sorted paths whose
// parents are directories of the same tree, hard links to earlier files, and
// contents and frames that lie one after the other within the stream.
func ParseIndex(b []byte) (*Index, error) {
	x, err := parseIndex(b)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	return x, nil
}

const indexHead = 8 + len(indexMagic)

func isIndex(b []byte) bool {
	return len(b) >= indexHead && binary.LittleEndian.Uint32(b) == skippableIndex && string(b[8:indexHead]) == indexMagic
}

func parseIndex(b []byte) (*Index, error) {
	if len(b) < indexHead || len(b) > MaxIndex {
		return nil, fmt.Errorf("%d bytes, want %d to %d", len(b), indexHead, MaxIndex)
	}
	if !isIndex(b) {
		return nil, fmt.Errorf("begins with %x: not an index of this version", b[:indexHead])
	}
	if n := binary.LittleEndian.Uint32(b[4:]); int64(n) != int64(len(b)-8) {
		return nil, fmt.Errorf("skippable frame says %d bytes, has %d", n, len(b)-8)
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxIndexPlain))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	plain, err := dec.DecodeAll(b[indexHead:], nil)
	if err != nil {
		return nil, err
	}
	r := reader{b: plain}
	x := r.index()
	if r.err != nil {
		return nil, r.err
	}
	if len(r.b) > 0 {
		return nil, fmt.Errorf("%d bytes too many", len(r.b))
	}
	if err := x.check(); err != nil {
		return nil, err
	}
	x.parsed = true
	return x, nil
}

// check holds what the extractor relies on.
func (x *Index) check() error {
	if err := checkEntries(x.Entries); err != nil {
		return err
	}
	var at, plain int64
	for n, f := range x.Frames {
		if f.Offset != at || f.Plain != plain || f.Size <= 0 || f.PlainSize <= 0 || f.PlainSize > MaxPlain || f.Size > maxCompressed {
			return fmt.Errorf("frame %d: %d bytes at %d, plain %d at %d", n, f.Size, f.Offset, f.PlainSize, f.Plain)
		}
		at, plain = at+f.Size, plain+f.PlainSize
	}
	end := int64(0)
	for i := range x.Entries {
		e := &x.Entries[i]
		if e.Size == 0 {
			continue
		}
		if e.Offset < end || e.Size > plain-e.Offset {
			return fmt.Errorf("%q: content at %d+%d, the last one ends at %d, the stream at %d", e.Path, e.Offset, e.Size, end, plain)
		}
		end = e.Offset + e.Size
	}
	return nil
}

// endsAt says what is wrong when frames do not fill the layer up to its index.
func (x *Index) endsAt(offset int64) error {
	var end int64
	if n := len(x.Frames); n > 0 {
		end = x.Frames[n-1].Offset + x.Frames[n-1].Size
	}
	if end != offset {
		return fmt.Errorf("index: its %d frames end at %d, the index begins at %d", len(x.Frames), end, offset)
	}
	return nil
}

// A reader takes numbers and strings off b until the first error; after it
// everything it gives is zero.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.b = nil
}

var errShort = errors.New("ends too early")

func (r *reader) num(what string, limit int64) int64 {
	v, n := binary.Uvarint(r.b)
	switch {
	case n <= 0:
		r.fail(fmt.Errorf("%s: %w", what, errShort))
		return 0
	case v > uint64(limit):
		r.fail(fmt.Errorf("%s is %d, at most %d is read", what, v, limit))
		return 0
	}
	r.b = r.b[n:]
	return int64(v)
}

func (r *reader) take(what string, n int64) []byte {
	if n > int64(len(r.b)) {
		r.fail(fmt.Errorf("%s of %d bytes: %w", what, n, errShort))
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) str(what string, limit int64) string {
	return string(r.take(what, r.num(what, limit)))
}

func (r *reader) sum() (sum [32]byte) {
	copy(sum[:], r.take("sha256", 32))
	return sum
}

func (r *reader) index() *Index {
	x := &Index{}
	// The least entry takes 4 bytes, the least frame 34: what is left bounds
	// the counts, and so what is allocated.
	count := r.num("number of entries", min(maxEntries, int64(len(r.b)/4)))
	x.Entries = make([]Entry, 0, count)
	end := int64(0)
	for range count {
		e := r.entry(&end)
		if r.err != nil {
			r.err = fmt.Errorf("entry %d, %.200q: %w", len(x.Entries), e.Path, r.err)
			return x
		}
		x.Entries = append(x.Entries, e)
	}
	count = r.num("number of frames", min(maxFrames, int64(len(r.b)/34)))
	x.Frames = make([]Frame, 0, count)
	var at, plain int64
	for range count {
		f := Frame{Offset: at, Plain: plain}
		f.Size = r.num("compressed size", maxCompressed)
		f.PlainSize = r.num("plain size", MaxPlain)
		f.SHA256 = r.sum()
		if r.err != nil {
			r.err = fmt.Errorf("frame %d: %w", len(x.Frames), r.err)
			return x
		}
		at, plain = at+f.Size, plain+f.PlainSize
		x.Frames = append(x.Frames, f)
	}
	return x
}

func (r *reader) entry(end *int64) (e Entry) {
	if t := r.take("type", 1); t != nil {
		e.Type = Type(t[0])
	}
	e.Path = r.str("path", maxPath)
	switch e.Type {
	case Hardlink:
		e.Link = r.str("link", maxPath)
		return e
	case Whiteout:
		return e
	}
	e.Mode = uint32(r.num("mode", 0o7777))
	e.UID = uint32(r.num("uid", 1<<32-1))
	e.GID = uint32(r.num("gid", 1<<32-1))
	sec, n := binary.Varint(r.b)
	if n <= 0 {
		r.fail(fmt.Errorf("seconds: %w", errShort))
		return e
	}
	r.b = r.b[n:]
	e.MTime = time.Unix(sec, r.num("nanoseconds", 1e9-1)).UTC()
	if count := r.num("number of extended attributes", maxXattrs); count > 0 {
		e.Xattrs = make(map[string]string)
		last := ""
		for range count {
			name := r.str("extended attribute", maxName)
			if r.err == nil && name <= last {
				r.fail(fmt.Errorf("extended attribute %q comes after %q", name, last))
			}
			if r.err != nil {
				return e
			}
			e.Xattrs[name] = r.str(name, maxXattr)
			last = name
		}
	}
	switch e.Type {
	case Regular:
		e.Size = r.num("size", maxStream)
		if e.Size > 0 {
			e.Offset = *end + r.num("place", maxStream)
			*end = e.Offset + e.Size
			if *end > maxStream {
				r.fail(fmt.Errorf("content reaches to %d, at most %d is read", *end, int64(maxStream)))
			}
			e.SHA256 = r.sum()
		}
	case Symlink:
		e.Link = r.str("link", maxLink)
	case Char, Block:
		e.Major = uint32(r.num("major", 1<<32-1))
		e.Minor = uint32(r.num("minor", 1<<32-1))
	}
	return e
}

// seekTable is the standard seek table, so that tools which know it can read
// the stream from any frame. Skippable frames are in it with no plain bytes.
func (x *Index) seekTable(indexSize int) []byte {
	var b []byte
	row := func(size, plain int64) {
		b = binary.LittleEndian.AppendUint32(b, uint32(size))
		b = binary.LittleEndian.AppendUint32(b, uint32(plain))
	}
	for _, f := range x.Frames {
		row(f.Size, f.PlainSize)
	}
	row(int64(indexSize), 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(x.Frames)+1))
	b = append(b, 0) // no checksums: the index has better ones
	b = binary.LittleEndian.AppendUint32(b, seekMagic)
	return skippable(skippableSeek, b)
}
