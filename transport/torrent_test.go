package transport_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"

	"rookery/transport"
	"rookery/transport/transporttest"
	"rookery/wire"
)

func TestTorrentSaysTheLayer(t *testing.T) {
	content, info := transporttest.Layer(t, 1, 300_000)
	if want := wire.DigestOf(content); info.Layer != want {
		t.Fatalf("layer %s, want %s", info.Layer, want)
	}
	if info.Length != 300_000 || info.PieceLength != 64<<10 || len(info.Hashes) != 5 || info.PieceSize(4) != 300_000-4*64<<10 {
		t.Fatalf("%d bytes in %d pieces of %d, the last of %d", info.Length, len(info.Hashes), info.PieceLength, info.PieceSize(4))
	}
	_, again := transporttest.Layer(t, 1, 300_000)
	if again.InfoHash != info.InfoHash {
		t.Fatalf("info hash %x, then %x", info.InfoHash, again.InfoHash)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestPiecesAreManyAndSmall(t *testing.T) {
	layer := wire.DigestOf(nil)
	for _, tt := range []struct {
		size, length int64
		count        int
	}{
		{1, 32 << 10, 1},
		{64 << 20, 32 << 10, 2048},
		{128 << 20, 32 << 10, 4096},
		{128<<20 + 1, 64 << 10, 2049},
	} {
		file, err := transport.NewTorrent(zeros{}, tt.size, layer)
		if err != nil {
			t.Fatal(err)
		}
		info, err := transport.ParseTorrent(file)
		if err != nil {
			t.Fatal(err)
		}
		if info.PieceLength != tt.length || len(info.Hashes) != tt.count {
			t.Errorf("%d bytes: %d pieces of %d, want %d of %d", tt.size, len(info.Hashes), info.PieceLength, tt.count, tt.length)
		}
	}
}

func TestNewTorrentRefuses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		size  int64
		layer wire.Digest
	}{
		{"an empty layer", 0, wire.DigestOf(nil)},
		{"a short layer", 4, wire.DigestOf(nil)},
		{"no digest", 3, "md5:0"},
	} {
		if _, err := transport.NewTorrent(bytes.NewReader([]byte("abc")), tt.size, tt.layer); err == nil {
			t.Errorf("%s: nil, want an error", tt.name)
		}
	}
}

// encode is a torrent file of whatever info is.
func encode(t testing.TB, info any) []byte {
	t.Helper()
	inner, err := bencode.Marshal(info)
	if err != nil {
		t.Fatal(err)
	}
	return bencode.MustMarshal(metainfo.MetaInfo{InfoBytes: inner, Announce: "http://192.0.2.1/announce"})
}

func good() map[string]any {
	return map[string]any{
		"name": wire.DigestOf(nil).Hex(), "length": 100_000, "piece length": 64 << 10,
		"pieces": string(make([]byte, 40)), "private": 1,
	}
}

func TestParseTorrent(t *testing.T) {
	info, err := transport.ParseTorrent(encode(t, good()))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"http://192.0.2.1/announce"}; !slices.Equal(info.Trackers, want) {
		t.Fatalf("trackers %q, want %q", info.Trackers, want)
	}
	for name, change := range map[string]func(map[string]any){
		"name is no digest":  func(m map[string]any) { m["name"] = "../../etc/passwd" },
		"no name":            func(m map[string]any) { delete(m, "name") },
		"no length":          func(m map[string]any) { delete(m, "length") },
		"negative length":    func(m map[string]any) { m["length"] = -1 },
		"huge length":        func(m map[string]any) { m["length"] = int64(1) << 62 },
		"no piece length":    func(m map[string]any) { delete(m, "piece length") },
		"tiny pieces":        func(m map[string]any) { m["piece length"] = 1 },
		"odd pieces":         func(m map[string]any) { m["piece length"] = 100_000 },
		"too few hashes":     func(m map[string]any) { m["pieces"] = string(make([]byte, 20)) },
		"half a hash":        func(m map[string]any) { m["pieces"] = string(make([]byte, 30)) },
		"hashes are a list":  func(m map[string]any) { m["pieces"] = []string{"a"} },
		"several files":      func(m map[string]any) { m["files"] = []any{map[string]any{"length": 1, "path": []string{"a"}}} },
		"an unknown key":     func(m map[string]any) { m["x"] = 1 },
		"another version":    func(m map[string]any) { m["meta version"] = 2 },
		"a name in utf-8":    func(m map[string]any) { m["name.utf-8"] = "x" },
		"a length too large": func(m map[string]any) { m["length"] = "100000" },
	} {
		m := good()
		change(m)
		if _, err := transport.ParseTorrent(encode(t, m)); err == nil {
			t.Errorf("%s: nil, want an error", name)
		}
	}
	file := encode(t, good())
	for name, b := range map[string][]byte{
		"nothing":        nil,
		"empty":          []byte("de"),
		"cut":            file[:len(file)-1],
		"trailing":       append(bytes.Clone(file), 'x'),
		"too large":      make([]byte, transport.MaxTorrent+1),
		"a bomb of 'l's": bytes.Repeat([]byte("l"), 1<<20),
	} {
		if _, err := transport.ParseTorrent(b); err == nil {
			t.Errorf("%s: nil, want an error", name)
		}
	}
}

func FuzzParseTorrent(f *testing.F) {
	f.Add(encode(f, good()))
	f.Add([]byte("d4:infod6:lengthi1e4:name1:x12:piece lengthi65536e6:pieces20:aaaaaaaaaaaaaaaaaaaaee"))
	f.Add([]byte("d13:announce-listll1:aee4:infodee"))
	f.Add([]byte("d4:infode5:nodesl1:a5:helloee"))
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := transport.ParseTorrent(b)
		if err != nil {
			return
		}
		last := len(info.Hashes) - 1
		if size := info.PieceSize(last); size < 1 || int64(size) > info.PieceLength {
			t.Fatalf("the last piece has %d bytes", size)
		}
		if int64(last)*info.PieceLength+int64(info.PieceSize(last)) != info.Length {
			t.Fatalf("the pieces are not the layer: %+v", info)
		}
	})
}
