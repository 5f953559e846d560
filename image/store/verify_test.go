package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/image/store/storetest"
	"rookery/wire"
)

// twoLayers is a store with a:1 and, of one more layer in which two files share
// a frame, a:2.
func twoLayers(t *testing.T) (dir string, one, two store.Version) {
	t.Helper()
	dir = t.TempDir()
	s := open(t, dir)
	s.Torrent = func(_ io.Reader, _ int64, d wire.Digest) ([]byte, error) { return []byte("torrent of " + d), nil }
	one = storetest.Publish(t, s, "a:1", "one", 1)
	tree := imagetest.New().Dir("usr", "usr/bin").File("usr/bin/x", imagetest.Noise(1, 5000)).File("usr/bin/y", imagetest.Noise(2, 5000))
	two, err := s.Publish(t.Context(), "a:2", store.Publication{Lower: one.Layers, Layer: func(w io.Writer) (image.Descriptor, error) {
		return image.Write(w, tree.Entries, tree.Open)
	}})
	if err != nil {
		t.Fatal(err)
	}
	return dir, one, two
}

// flip changes one bit of a file.
func flip(t *testing.T, path string, bit int) (mend func()) {
	t.Helper()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b := bytes.Clone(whole)
	b[bit/8] ^= 1 << (bit % 8)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return func() { os.WriteFile(path, whole, 0o644) }
}

// verifyAll is what Verify says of all that a store lists.
func verifyAll(t *testing.T, dir string) []store.Damage {
	t.Helper()
	s := open(t, dir)
	versions, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	damages, err := s.Verify(t.Context(), nil, versions...)
	if err != nil {
		t.Fatal(err)
	}
	return damages
}

func TestVerify(t *testing.T) {
	dir, one, two := twoLayers(t)
	if damages := verifyAll(t, dir); len(damages) > 0 {
		t.Fatal(damages)
	}
	s := open(t, dir)
	config := func(v store.Version) wire.Digest {
		m, _, err := oci.ParseManifest(readBlob(t, s, v.Manifest))
		if err != nil {
			t.Fatal(err)
		}
		return m.Config.Digest
	}
	top := two.Layers[1]
	for _, tt := range []struct {
		name   string
		of     wire.Digest
		at     int64 // byte; -1 removes the file
		images string
		want   string // %s is the digest
	}{
		{"a frame", top.Digest, 100, "a:2", "layer 1 %s: frame 0 at 0+"},
		{"a frame's files", top.Digest, 100, "a:2", ": usr/bin/x, usr/bin/y"},
		{"the index", top.Digest, top.IndexOffset + 20, "a:2", fmt.Sprintf("layer 1 %%s: index at %d+%d: ", top.IndexOffset, top.IndexSize)},
		{"the seek table", top.Digest, top.Size - 3, "a:2", "layer 1 %s: seek table at "},
		{"a layer of two", one.Layers[0].Digest, 10, "a:1 a:2", "layer 0 %s: frame 0 at "},
		{"no layer", one.Layers[0].Digest, -1, "a:1 a:2", "layer 0 %s: not found"},
		{"the torrent", top.Torrent, 3, "a:2", "torrent of layer 1 %s: digest is "},
		{"no torrent", top.Torrent, -1, "a:2", "torrent of layer 1 %s: not found"},
		{"the config", config(two), 50, "a:2", "config %s: digest is "},
		{"no config", config(one), -1, "a:1", "config %s: not found"},
		{"the manifest", two.Manifest, 50, "a:2", "manifest %s: digest is "},
		{"no manifest", two.Manifest, -1, "a:2", "manifest %s: not found"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mend := flip(t, s.Path(tt.of), 8*int(max(tt.at, 0)))
			defer mend()
			if tt.at < 0 {
				if err := os.Remove(s.Path(tt.of)); err != nil {
					t.Fatal(err)
				}
			}
			damages := verifyAll(t, dir)
			want := strings.Replace(tt.want, "%s", string(tt.of), 1)
			if len(damages) != 1 || !strings.Contains(damages[0].String(), want) {
				t.Fatalf("%v, want %q", damages, want)
			}
			if got := strings.Join(damages[0].Images, " "); got != tt.images {
				t.Errorf("damaged: %s, want %s", got, tt.images)
			}
		})
	}
}

// One flipped bit anywhere is noticed, and told of the blob that it is in.
func TestEveryFlippedBit(t *testing.T) {
	dir, _, _ := twoLayers(t)
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil || len(blobs) != 8 { // 2 manifests, 2 configs, 2 layers, 2 torrents
		t.Fatal(blobs, err)
	}
	for _, path := range blobs {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		bits := int(info.Size()) * 8
		for bit := 0; bit < bits; bit += 1 + bits/67 {
			mend := flip(t, path, bit)
			damages := verifyAll(t, dir)
			if len(damages) != 1 || !strings.Contains(damages[0].String(), filepath.Base(path)) {
				t.Errorf("bit %d of %s: %v", bit, path, damages)
			}
			mend()
		}
	}
}

// index.json has no digest. What a flipped bit makes of it is refused, or is
// other names for what is there, or the very same (keys of any case).
func TestEveryFlippedBitOfTheIndex(t *testing.T) {
	dir, _, _ := twoLayers(t)
	names := storetest.Names(t, open(t, dir))
	path := filepath.Join(dir, "index.json")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	refused, told, renamed, same := 0, 0, 0, 0
	for bit := range int(info.Size()) * 8 {
		mend := flip(t, path, bit)
		s, err := store.Open(dir)
		switch {
		case err != nil:
			if want := "image store " + dir + ": index.json: "; !strings.HasPrefix(err.Error(), want) || strings.Count(err.Error(), "image store") > 1 {
				t.Errorf("bit %d: %v, want it to begin with %s", bit, err, want)
			}
			refused++
		case len(verifyAll(t, dir)) > 0:
			told++
		default:
			if now := storetest.Names(t, s); now != names {
				if !strings.Contains(now, "a:1=") || !strings.Contains(now, "a:2=") {
					t.Errorf("bit %d: the store has %s", bit, now)
				}
				renamed++
			} else if _, err := open(t, dir).Resolve(t.Context(), "a:latest"); err != nil { // s remembers what it read
				t.Errorf("bit %d: nothing is told, but %v", bit, err)
			} else {
				same++
			}
		}
		mend()
	}
	t.Logf("%d refused, %d told by Verify, %d renamed a tag, %d changed nothing", refused, told, renamed, same)
	if refused < 1000 || told < 100 || same > refused/5 {
		t.Errorf("%d refused, %d told by Verify, %d changed nothing", refused, told, same)
	}
}

// What cannot be read is listed, can be removed, and until then keeps blobs from
// being swept of which nobody knows whose they are.
func TestDamagedVersion(t *testing.T) {
	dir, one, two := twoLayers(t)
	flip(t, open(t, dir).Path(two.Manifest), 1000)
	s := open(t, dir)
	versions, err := s.List(t.Context())
	if err != nil || len(versions) != 2 {
		t.Fatal(versions, err)
	}
	bad := versions[0] // nobody knows of when it is
	if bad.Name != "a:2" || bad.Err == nil || strings.Join(bad.Tags, " ") != "a:latest" || bad.Manifest != two.Manifest {
		t.Errorf("%+v", bad)
	}
	if _, err := s.Resolve(t.Context(), "a:2"); err == nil || errors.Is(err, store.ErrNotFound) || !strings.Contains(err.Error(), string(two.Manifest)) {
		t.Errorf("Resolve: %v", err)
	}
	if _, err := s.Publish(t.Context(), "a:2", store.Publication{Lower: two.Layers}); err == nil || !strings.Contains(err.Error(), "remove it first") {
		t.Errorf("Publish: %v", err)
	}
	if err := s.Tag(t.Context(), "a:1", "a:2"); !errors.Is(err, store.ErrExists) {
		t.Errorf("Tag: %v", err)
	}
	if p, err := s.Prune(t.Context(), store.Keep{Newest: 1}, false); err == nil || len(p.Blobs) > 0 || !strings.Contains(err.Error(), "nobody knows which blobs a:2 needs") {
		t.Errorf("Prune: %+v, %v", p, err)
	}
	p, err := s.Remove(t.Context(), "a:2")
	if err != nil || len(p.Blobs) != 4 { // manifest, config, layer and torrent
		t.Errorf("Remove: %+v, %v", p, err)
	}
	if got := storetest.Names(t, s); got != "a:1=a:latest" {
		t.Errorf("the store has %s", got)
	}
	if damages, err := s.Verify(t.Context(), nil, one); err != nil || len(damages) > 0 {
		t.Errorf("Verify: %v, %v", damages, err)
	}
}

// A manifest that is damaged is mended, too, where the same one comes.
func TestCopyMendsAManifest(t *testing.T) {
	dir, _, two := twoLayers(t)
	good := open(t, t.TempDir())
	if _, err := good.Copy(t.Context(), open(t, dir), two, "a:2"); err != nil {
		t.Fatal(err)
	}
	flip(t, open(t, dir).Path(two.Manifest), 1000)
	flip(t, open(t, dir).Path(two.Layers[0].Digest), 1000)
	if _, err := open(t, dir).Copy(t.Context(), good, two, "a:2"); err != nil {
		t.Fatal(err)
	}
	if damages := verifyAll(t, dir); len(damages) > 0 {
		t.Error(damages)
	}
	if got := storetest.Names(t, open(t, dir)); got != "a:1= a:2=a:latest" {
		t.Errorf("the store has %s", got)
	}
}

// A torrent that is lost is made again for whoever shares the layer.
func TestLostTorrent(t *testing.T) {
	dir, one, _ := twoLayers(t)
	s := open(t, dir)
	if err := os.Remove(s.Path(one.Layers[0].Torrent)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Publish(t.Context(), "a:3", store.Publication{Lower: one.Layers}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Publish without a way to make it: %v", err)
	}
	s.Torrent = func(_ io.Reader, _ int64, d wire.Digest) ([]byte, error) { return []byte("torrent of " + d), nil }
	if _, err := s.Publish(t.Context(), "a:3", store.Publication{Lower: one.Layers}); err != nil {
		t.Error(err)
	}
	if damages := verifyAll(t, dir); len(damages) > 0 {
		t.Error(damages)
	}
}

// Sweeping waits until nobody publishes, but for no longer than it may.
func TestLocks(t *testing.T) {
	dir, one, _ := twoLayers(t)
	s, begun, goOn, done := open(t, dir), make(chan bool), make(chan bool), make(chan error)
	go func() {
		_, err := s.Publish(t.Context(), "a:3", store.Publication{Lower: one.Layers, Layer: func(w io.Writer) (image.Descriptor, error) {
			close(begun)
			<-goOn
			return layer("three")(w)
		}})
		done <- err
	}()
	<-begun
	other := open(t, dir)
	if err := other.Tag(t.Context(), "a:1", "a:good"); err != nil { // names do not wait
		t.Error(err)
	}
	publish(t, other, "b:1", "four") // nor do others
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := other.Prune(ctx, store.Keep{}, false); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "prune: image store "+dir+": .lock: somebody else has it") {
		t.Errorf("Prune: %v", err)
	}
	// The layer that is below a:3 by now, though nobody knows, loses its version.
	removed := make(chan error)
	go func() {
		_, err := other.Remove(t.Context(), "a:2")
		if err == nil {
			_, err = other.Remove(t.Context(), "b:1")
		}
		removed <- err
	}()
	close(goOn)
	if err := errors.Join(<-done, <-removed); err != nil {
		t.Fatal(err)
	}
	if damages := verifyAll(t, dir); len(damages) > 0 {
		t.Error(damages)
	}
	if got := storetest.Names(t, open(t, dir)); got != "a:1=a:good a:3=a:latest" {
		t.Errorf("the store has %s", got)
	}
}

// thousand is a store of a thousand versions.
func thousand(t testing.TB) string {
	dir := t.TempDir()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	v := storetest.Publish(t, s, "a:0", "one", 1)
	b, err := os.ReadFile(s.Path(v.Manifest))
	if err != nil {
		t.Fatal(err)
	}
	err = store.DirectoryOf(s).Write(t.Context(), func(w store.Writer) error {
		return w.SetNames(t.Context(), func(names []store.Name) ([]store.Name, error) {
			for i := 1; i < 1000; i++ {
				b := bytes.Replace(b, []byte(`"a:0"`), fmt.Appendf(nil, `"a:%d"`, i), 1)
				names = append(names, store.Name{Name: fmt.Sprintf("a:%d", i), Manifest: wire.DigestOf(b), Size: int64(len(b)), Bytes: b})
			}
			return names, nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestManyVersions(t *testing.T) {
	s := open(t, thousand(t))
	versions, err := s.List(t.Context())
	if err != nil || len(versions) != 1000 {
		t.Fatalf("%d versions, %v", len(versions), err)
	}
	p, err := s.Prune(t.Context(), store.Keep{Newest: 10}, false)
	if err != nil || len(p.Versions) != 989 { // and the one that is the latest
		t.Fatalf("%d removed, %v", len(p.Versions), err)
	}
}

func BenchmarkListOfAThousand(b *testing.B) {
	dir := thousand(b)
	for b.Loop() {
		s, err := store.Open(dir)
		if err == nil {
			_, err = s.List(b.Context())
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
