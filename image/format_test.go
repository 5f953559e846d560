package image_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"rookery/image"
	"rookery/image/imagetest"
)

// A page is a second reader of layers, made from docs/layer-format.md alone: of
// package image it uses the types in which its findings are compared.
type page struct {
	t     *testing.T
	dec   *zstd.Decoder
	body  []byte
	layer []byte
}

func (p *page) number() uint64 {
	v, n := binary.Uvarint(p.body)
	if n <= 0 {
		p.t.Fatalf("no varint at % .20x", p.body)
	}
	p.body = p.body[n:]
	return v
}

func (p *page) signed() int64 {
	v := p.number()
	return int64(v>>1) ^ -int64(v&1)
}

func (p *page) bytes(n uint64) (b []byte) {
	b, p.body = p.body[:n], p.body[n:]
	return b
}

func (p *page) string() string { return string(p.bytes(p.number())) }

// skippable takes the frame with that magic off the beginning of b.
func (p *page) skippable(magic uint32, b []byte) []byte {
	if got := binary.LittleEndian.Uint32(b); got != magic {
		p.t.Fatalf("skippable frame %x, want %x", got, magic)
	}
	if n := binary.LittleEndian.Uint32(b[4:]); int(n) != len(b)-8 {
		p.t.Fatalf("skippable frame says %d bytes, has %d", n, len(b)-8)
	}
	return b[8:]
}

func (p *page) index(frame []byte) (x image.Index) {
	frame = p.skippable(0x184D2A52, frame)
	compressed, ok := bytes.CutPrefix(frame, []byte("RKIX\x01"))
	if !ok {
		p.t.Fatalf("index begins with %x", frame[:5])
	}
	body, err := p.dec.DecodeAll(compressed, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	p.body = body
	end := uint64(0) // of the last content
	for range p.number() {
		kind := p.bytes(1)[0]
		e := image.Entry{Type: image.Type(kind), Path: p.string()}
		switch kind {
		case 4:
			e.Link = p.string()
			x.Entries = append(x.Entries, e)
			continue
		case 8:
			x.Entries = append(x.Entries, e)
			continue
		}
		e.Mode, e.UID, e.GID = uint32(p.number()), uint32(p.number()), uint32(p.number())
		seconds := p.signed()
		e.MTime = time.Unix(seconds, int64(p.number())).UTC()
		for range p.number() {
			if e.Xattrs == nil {
				e.Xattrs = make(map[string]string)
			}
			name := p.string()
			e.Xattrs[name] = p.string()
		}
		switch kind {
		case 2:
			if size := p.number(); size > 0 {
				start := end + p.number()
				end = start + size
				e.Size, e.Offset = int64(size), int64(start)
				e.SHA256 = [32]byte(p.bytes(32))
			}
		case 3:
			e.Link = p.string()
		case 5, 6:
			e.Major, e.Minor = uint32(p.number()), uint32(p.number())
		}
		x.Entries = append(x.Entries, e)
	}
	var offset, plain int64
	for range p.number() {
		f := image.Frame{Offset: offset, Plain: plain, Size: int64(p.number()), PlainSize: int64(p.number())}
		f.SHA256 = [32]byte(p.bytes(32))
		offset, plain = offset+f.Size, plain+f.PlainSize
		x.Frames = append(x.Frames, f)
	}
	if len(p.body) != 0 {
		p.t.Fatalf("%d bytes after the frames", len(p.body))
	}
	return x
}

// stream is the plain tar stream: all frames, each checked first.
func (p *page) stream(x image.Index) (stream []byte) {
	for n, f := range x.Frames {
		compressed := p.layer[f.Offset : f.Offset+f.Size]
		if sha256.Sum256(compressed) != f.SHA256 {
			p.t.Fatalf("frame %d: its sha256 is another", n)
		}
		plain, err := p.dec.DecodeAll(compressed, nil)
		if err != nil || int64(len(plain)) != f.PlainSize || len(plain) > 8<<20 {
			p.t.Fatalf("frame %d: %d bytes, want %d: %v", n, len(plain), f.PlainSize, err)
		}
		stream = append(stream, plain...)
	}
	return stream
}

// entries are what the tar stream says, in the terms of the index.
func (p *page) entries(stream []byte) (es []image.Entry) {
	r := bytes.NewReader(stream)
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return es
		}
		if err != nil {
			p.t.Fatal(err)
		}
		e := image.Entry{Path: path.Clean(h.Name), Mode: uint32(h.Mode), UID: uint32(h.Uid), GID: uint32(h.Gid), MTime: h.ModTime.UTC()}
		dir, name := path.Split(e.Path)
		switch h.Typeflag {
		case tar.TypeDir:
			e.Type = image.Dir
		case tar.TypeReg:
			if removed, ok := strings.CutPrefix(name, ".wh."); ok {
				es = append(es, image.Entry{Type: image.Whiteout, Path: path.Join(dir, removed)})
				continue
			}
			e.Type, e.Size = image.Regular, h.Size
		case tar.TypeSymlink:
			e.Type, e.Link = image.Symlink, h.Linkname
		case tar.TypeLink:
			es = append(es, image.Entry{Type: image.Hardlink, Path: e.Path, Link: h.Linkname})
			continue
		case tar.TypeChar, tar.TypeBlock:
			e.Type = image.Char
			if h.Typeflag == tar.TypeBlock {
				e.Type = image.Block
			}
			e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
		case tar.TypeFifo:
			e.Type = image.Fifo
		}
		for key, value := range h.PAXRecords {
			if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
				if e.Xattrs == nil {
					e.Xattrs = make(map[string]string)
				}
				e.Xattrs[strings.NewReplacer("%25", "%", "%3D", "=").Replace(name)] = value
			}
		}
		if e.Size > 0 {
			e.Offset = int64(len(stream)) - int64(r.Len())
			e.SHA256 = sha256.Sum256(stream[e.Offset : e.Offset+e.Size])
		}
		es = append(es, e)
	}
}

// What docs/layer-format.md says is enough to read a layer.
func TestFormatPage(t *testing.T) {
	tree := imagetest.Nasty().File("big", imagetest.Noise(3, 9<<20)).Whiteout("gone").Whiteout("etc/gone")
	tree.FileEntry(image.Entry{Path: "equals", Mode: 0o644, Xattrs: map[string]string{"user.a=b": "c=d"}}, []byte("x"))
	layer, d := tree.Layer(t)
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	p := &page{t: t, dec: dec, layer: layer}

	x := p.index(layer[d.IndexOffset : d.IndexOffset+d.IndexSize])
	want := readIndex(t, layer, d)
	compareEntries(t, "index", x.Entries, want.Entries)
	if fmt.Sprint(x.Frames) != fmt.Sprint(want.Frames) {
		t.Errorf("frames: %v, want %v", x.Frames, want.Frames)
	}
	if last := x.Frames[len(x.Frames)-1]; last.Offset+last.Size != d.IndexOffset {
		t.Errorf("frames end at %d, the index is at %d", last.Offset+last.Size, d.IndexOffset)
	}

	stream := p.stream(x)
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256(stream)); got != string(d.DiffID) {
		t.Errorf("stream is %s, diff ID %s", got, d.DiffID)
	}
	compareEntries(t, "tar", p.entries(stream), want.Entries)

	table := p.skippable(0x184D2A5E, layer[d.IndexOffset+d.IndexSize:])
	rows := x.Frames
	rows = append(rows, image.Frame{Size: d.IndexSize})
	for n, f := range rows {
		size, plain := binary.LittleEndian.Uint32(table[8*n:]), binary.LittleEndian.Uint32(table[8*n+4:])
		if int64(size) != f.Size || int64(plain) != f.PlainSize {
			t.Errorf("seek table, row %d: %d and %d, want %d and %d", n, size, plain, f.Size, f.PlainSize)
		}
	}
	foot := table[8*len(rows):]
	if len(foot) != 9 || binary.LittleEndian.Uint32(foot) != uint32(len(rows)) || foot[4] != 0 || binary.LittleEndian.Uint32(foot[5:]) != 0x8F92EAB1 {
		t.Errorf("seek table ends with %x", foot)
	}
}

func compareEntries(t *testing.T, what string, got, want []image.Entry) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d entries, want %d", what, len(got), len(want))
	}
	for i := range want {
		if g, w := fmt.Sprintf("%+v", got[i]), fmt.Sprintf("%+v", want[i]); g != w {
			t.Errorf("%s: entry %d is %.500s, want %.500s", what, i, g, w)
		}
	}
}
