package store_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/image/store/storetest"
	"rookery/wire"
)

func open(t *testing.T, dir string) *store.Store {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var layer = storetest.Layer

func publish(t *testing.T, s *store.Store, name, content string) store.Version {
	t.Helper()
	v, err := s.Publish(t.Context(), name, store.Publication{Layer: layer(content), Config: store.Config{Created: imagetest.When}})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func readBlob(t *testing.T, s *store.Store, d wire.Digest) []byte {
	t.Helper()
	f, err := s.Blob(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, f.Size())
	if n, err := f.ReadAt(b, 0); n < len(b) {
		t.Fatalf("blob %s: %d of %d bytes, %v", d, n, len(b), err)
	}
	if err := d.Verify(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDirectory(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Backend { return store.DirectoryOf(open(t, t.TempDir())) })
}

func TestPublish(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	s.Torrent = func(r io.Reader, size int64, d wire.Digest) ([]byte, error) {
		b, err := io.ReadAll(r)
		if err != nil || int64(len(b)) != size || d.Verify(b) != nil {
			t.Errorf("torrent of %d bytes, %s: got %d, %v", size, d, len(b), err)
		}
		return []byte("torrent of " + d), nil
	}
	v := publish(t, s, "debian12:1", "one")
	if v.Name != "debian12:1" || !v.Created.Equal(imagetest.When.Truncate(time.Second)) || len(v.Layers) != 1 || v.Size != v.Layers[0].Size {
		t.Fatalf("%+v", v)
	}
	l := v.Layers[0]
	if got := string(readBlob(t, s, l.Torrent)); got != "torrent of "+string(l.Digest) {
		t.Fatalf("torrent is %q", got)
	}
	blob := readBlob(t, s, l.Digest)
	if _, err := image.ReadIndex(bytes.NewReader(blob), l.Descriptor); err != nil {
		t.Fatal(err)
	}

	// What the agent reads is what the store has, but for the diff ID.
	_, layers, err := oci.ParseManifest(readBlob(t, s, v.Manifest))
	if err != nil {
		t.Fatal(err)
	}
	l.DiffID = ""
	if len(layers) != 1 || layers[0] != l {
		t.Fatalf("ParseManifest: %+v, want %+v", layers, l)
	}

	// And what an OCI tool reads.
	var index struct {
		SchemaVersion int
		Manifests     []struct {
			MediaType   string
			Digest      wire.Digest
			Size        int64
			Annotations map[string]string
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &index); err != nil {
		t.Fatal(err)
	}
	if index.SchemaVersion != 2 || len(index.Manifests) != 2 {
		t.Fatalf("index.json: %s", b)
	}
	for i, name := range []string{"debian12:1", "debian12:latest"} {
		m := index.Manifests[i]
		if m.Digest != v.Manifest || m.Annotations["org.opencontainers.image.ref.name"] != name || m.MediaType != "application/vnd.oci.image.manifest.v1+json" ||
			m.Size != int64(len(readBlob(t, s, m.Digest))) {
			t.Fatalf("index.json: %+v", m)
		}
	}
	var m struct {
		Config struct{ Digest wire.Digest }
		Layers []struct{ MediaType string }
	}
	if err := json.Unmarshal(readBlob(t, s, v.Manifest), &m); err != nil {
		t.Fatal(err)
	}
	if m.Layers[0].MediaType != "application/vnd.oci.image.layer.v1.tar+zstd" {
		t.Fatalf("%+v", m)
	}
	if cfg := string(readBlob(t, s, m.Config.Digest)); !strings.Contains(cfg, `"diff_ids":["`+string(v.Layers[0].DiffID)) || !strings.Contains(cfg, `"os":"linux"`) {
		t.Fatalf("config: %s", cfg)
	}

	// The same tree in another store, at the same time: the same digest.
	other := open(t, t.TempDir())
	other.Torrent = func(_ io.Reader, _ int64, d wire.Digest) ([]byte, error) { return []byte("torrent of " + d), nil }
	if w := publish(t, other, "debian12:1", "one"); w.Manifest != v.Manifest {
		t.Fatalf("manifest is %s and %s", v.Manifest, w.Manifest)
	}
}

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	publish(t, s, "a:1", "one")
	publish(t, s, "b:1", "other")
	publish(t, s, "a:2", "two")
	s = open(t, dir) // and it lasts
	for name, want := range map[string]string{"a": "a:2", "a:latest": "a:2", "a:1": "a:1", "a:2": "a:2", "b": "b:1"} {
		if v, err := s.Resolve(t.Context(), name); err != nil || v.Name != want {
			t.Errorf("Resolve(%q): %q, %v, want %q", name, v.Name, err, want)
		}
	}
	for _, name := range []string{"c", "a:3", "c:latest", "", ":", "a:", ":1", "../a:1"} {
		if v, err := s.Resolve(t.Context(), name); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("Resolve(%q): %q, %v", name, v.Name, err)
		}
	}
	var names []string
	versions, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range versions {
		names = append(names, v.Name)
	}
	if got := strings.Join(names, " "); got != "a:1 b:1 a:2" {
		t.Errorf("List: %s", got)
	}
	for _, d := range []wire.Digest{"", "sha256:../../../etc/passwd", "sha256:" + wire.Digest(strings.Repeat("../", 21)+"x"), "md5:x"} {
		if _, err := s.Blob(t.Context(), d); err == nil {
			t.Errorf("Blob(%q) opened something", d)
		}
	}
	if _, err := s.Blob(t.Context(), wire.DigestOf(nil)); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Blob: %v", err)
	}
}

func files(t *testing.T, dir string) string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if !strings.HasPrefix(filepath.Base(path), ".lock") {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(names, "\n")
}

func TestVersionsNeverChange(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first := publish(t, s, "a:1", "one")
	before := files(t, dir)
	if _, err := s.Publish(t.Context(), "a:1", store.Publication{Layer: layer("two")}); !errors.Is(err, store.ErrExists) {
		t.Fatalf("other content: %v", err)
	}
	again, err := s.Publish(t.Context(), "a:1", store.Publication{Layer: layer("one"), Config: store.Config{Created: imagetest.When.Add(time.Hour)}})
	if err != nil || again.Manifest != first.Manifest {
		t.Fatalf("same content: %+v, %v", again, err)
	}
	if after := files(t, dir); after != before {
		t.Fatalf("files changed:\n%s\n\nwere\n%s", after, before)
	}
	for _, name := range []string{"a", "a:latest", "A:1", "a:", "a:1:2", "a/b:1", "../a:1", "a b:1", ":1", "a:.x", strings.Repeat("a", 129) + ":1"} {
		if _, err := s.Publish(t.Context(), name, store.Publication{Layer: layer("one")}); err == nil {
			t.Errorf("published %q", name)
		}
	}
}

func TestFailedPublish(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	before := files(t, dir)
	broken := errors.New("broken")
	_, err := s.Publish(t.Context(), "a:1", store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) {
		io.WriteString(w, "half")
		return image.Descriptor{}, broken
	}})
	if !errors.Is(err, broken) {
		t.Fatal(err)
	}
	_, err = s.Publish(t.Context(), "a:1", store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) {
		d, err := layer("one")(w)
		d.Size++
		return d, err
	}})
	if err == nil || !strings.Contains(err.Error(), "layer says") {
		t.Fatal(err)
	}
	if after := files(t, dir); after != before {
		t.Fatalf("left behind:\n%s\n\nwere\n%s", after, before)
	}
	s.Torrent = func(io.Reader, int64, wire.Digest) ([]byte, error) { return nil, broken }
	if _, err := s.Publish(t.Context(), "a:1", store.Publication{Layer: layer("one")}); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if _, err := s.Resolve(t.Context(), "a:1"); !errors.Is(err, store.ErrNotFound) {
		t.Fatalf("half a version is there: %v", err)
	}
}

// A publisher that was killed leaves files that the next one removes; and a
// store that was being made when the machine stopped is made again.
func TestCrashLeftovers(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	publish(t, s, "a:1", "one")
	left := filepath.Join(dir, ".unfinished-123")
	if err := os.WriteFile(left, []byte("half a layer"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if versions, err := s.List(t.Context()); err != nil || len(versions) != 1 {
		t.Fatal(versions, err)
	}
	for _, dry := range []bool{true, false} {
		if p, err := s.Prune(t.Context(), store.Keep{}, dry); err != nil || len(p.Blobs) != 1 || p.Bytes != int64(len("half a layer")) {
			t.Errorf("prune, dry %v: %+v, %v", dry, p, err)
		}
	}
	if err := os.WriteFile(left, []byte("half a layer"), 0o600); err != nil {
		t.Fatal(err)
	}
	publish(t, s, "a:2", "two")
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("still there: %v", err)
	}

	if err := os.Remove(filepath.Join(dir, "oci-layout")); err != nil {
		t.Fatal(err)
	}
	if v, err := open(t, dir).Resolve(t.Context(), "a"); err != nil || v.Name != "a:2" {
		t.Fatal(v, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"2.0.0"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(dir); err == nil {
		t.Fatal("opened a store of another version")
	}
}

func TestConcurrentPublishers(t *testing.T) {
	dir := t.TempDir()
	var all sync.WaitGroup
	for _, tag := range []string{"1", "2", "3", "4", "5", "6"} {
		all.Go(func() {
			s, err := store.Open(dir)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := s.Publish(t.Context(), "a:"+tag, store.Publication{Layer: layer("content " + tag)}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	versions, err := open(t, dir).List(t.Context())
	if err != nil || len(versions) != 6 {
		t.Fatalf("%d versions, %v", len(versions), err)
	}
}

func TestFlippedBitInManifest(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	v := publish(t, s, "a:1", "one")
	b := readBlob(t, s, v.Manifest)
	b[len(b)/2] ^= 1
	if err := os.WriteFile(s.Path(v.Manifest), b, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, dir).Resolve(t.Context(), "a:1"); err == nil || !strings.Contains(err.Error(), "digest is") {
		t.Fatalf("Resolve: %v", err)
	}
}

func TestParseManifest(t *testing.T) {
	s := open(t, t.TempDir())
	good := string(readBlob(t, s, publish(t, s, "a:1", "one").Manifest))
	for _, tt := range []struct{ name, old, new, want string }{
		{"offset missing", "rookery.index.offset", "x", "rookery.index.offset is missing"},
		{"offset negative", `"rookery.index.offset":"`, `"rookery.index.offset":"-`, "index at -"},
		{"offset odd", `"rookery.index.offset":"`, `"rookery.index.offset":"+`, "want a number"},
		{"offset behind the end", `"rookery.index.offset":"`, `"rookery.index.offset":"9`, "layer has"},
		{"size missing", "rookery.index.size", "x", "rookery.index.size is missing"},
		{"size too large", `"rookery.index.size":"`, `"rookery.index.size":"999999999`, "index of 999999999"},
		{"digest", `"rookery.index.digest":"sha256:`, `"rookery.index.digest":"sha512:`, "want sha256"},
		{"torrent", `"rookery.index.digest"`, `"rookery.torrent":"x","rookery.index.digest"`, "rookery.torrent"},
		{"media type", "layer.v1.tar+zstd", "layer.v1.tar+gzip", "want application/vnd.oci.image.layer.v1.tar+zstd"},
		{"not a manifest", "manifest.v1+json", "index.v1+json", "manifest: is"},
		{"version", `"schemaVersion":2`, `"schemaVersion":1`, "version 1"},
		{"no layers", `"layers":[`, `"layers":[],"x":[`, "image has 0 layers, want 1 to 128"},
		{"two layers", `"layers":[`, `"layers":[{},`, "layer 0: is \"\""},
		{"no JSON", "{", "", "manifest:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bad := strings.Replace(good, tt.old, tt.new, 1)
			if _, _, err := oci.ParseManifest([]byte(bad)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("%v, want %q in\n%s", err, tt.want, bad)
			}
		})
	}
	if _, _, err := oci.ParseManifest(bytes.Repeat([]byte(" "), oci.MaxManifest+1)); err == nil {
		t.Fatal("took a manifest without bound")
	}
}

// skopeo verifies every digest that it copies.
func TestSkopeo(t *testing.T) {
	if _, err := exec.LookPath("skopeo"); err != nil {
		t.Skipf("%v: install skopeo", err)
	}
	dir := t.TempDir()
	s := open(t, dir)
	publish(t, s, "debian12:1", "one")
	one, err := s.Resolve(t.Context(), "debian12")
	if err != nil {
		t.Fatal(err)
	}
	two := storetest.Publish(t, s, "debian12:2", "two", 2, one.Layers...)
	out, err := exec.Command("skopeo", "inspect", "oci:"+dir+":debian12:2").Output()
	if err != nil {
		t.Fatal(err)
	}
	var seen struct {
		Created      time.Time
		Labels       map[string]string
		Architecture string
		Env          []string
		Layers       []wire.Digest
	}
	if err := json.Unmarshal(out, &seen); err != nil {
		t.Fatal(err)
	}
	if !seen.Created.Equal(two.Created) || seen.Labels[oci.LabelSource] != "two" || seen.Architecture != "amd64" || len(seen.Env) != 1 ||
		len(seen.Layers) != 2 || seen.Layers[0] != one.Layers[0].Digest || seen.Layers[1] != two.Layers[1].Digest {
		t.Errorf("skopeo inspect says %s", out)
	}
	for _, name := range []string{"debian12:1", "debian12:2", "debian12:latest"} {
		out, err := exec.Command("skopeo", "--insecure-policy", "copy", "oci:"+dir+":"+name, "dir:"+t.TempDir()).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}

func FuzzParseManifest(f *testing.F) {
	s, err := store.Open(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	s.Torrent = func(io.Reader, int64, wire.Digest) ([]byte, error) { return []byte("torrent"), nil }
	v, err := s.Publish(f.Context(), "a:1", store.Publication{Layer: layer("one")})
	if err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(s.Path(v.Manifest))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, layers, err := oci.ParseManifest(b)
		if err != nil {
			return
		}
		for _, l := range layers {
			if err := l.Check(); err != nil {
				t.Fatal(err)
			}
			if l.Torrent != "" && l.Torrent.Check() != nil {
				t.Fatalf("torrent %q", l.Torrent)
			}
		}
	})
}

// An image has /etc/shadow in it.
func TestNobodyElseGetsIn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "images")
	open(t, dir)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("%v, %v; want mode 0700", info.Mode(), err)
	}
}
