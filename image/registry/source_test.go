package registry_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"rookery/image/imagetest"
	"rookery/image/registry"
	"rookery/image/registry/registrytest"
)

// foreign makes an image of somebody else: one layer gzipped, one zstd, one
// plain, each with one file; and what its plain layers are.
func foreign(t *testing.T, arch string) (v1.Image, [][]byte) {
	t.Helper()
	var plain [][]byte
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		Architecture: arch, OS: "linux", Created: v1.Time{Time: imagetest.When},
		Config: v1.Config{Labels: map[string]string{"from": "elsewhere"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, mediaType := range []types.MediaType{types.DockerLayer, types.OCILayerZStd, types.OCIUncompressedLayer} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		content := imagetest.Noise(uint64(i), 100<<10)
		h := &tar.Header{Name: arch + string(mediaType[len(mediaType)-4:]), Mode: 0o644, Size: int64(len(content))}
		if err := errors.Join(w.WriteHeader(h), write(w, content), w.Close()); err != nil {
			t.Fatal(err)
		}
		plain = append(plain, b.Bytes())
		opener := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }
		layer, err := tarball.LayerFromOpener(opener)
		switch mediaType {
		case types.OCILayerZStd:
			enc, _ := zstd.NewWriter(nil)
			layer = zipped{static.NewLayer(enc.EncodeAll(b.Bytes(), nil), mediaType), layer}
		case types.OCIUncompressedLayer:
			layer = static.NewLayer(b.Bytes(), mediaType)
		}
		if err == nil {
			img, err = mutate.AppendLayers(img, layer)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return img, plain
}

// zipped is a static layer that knows its diff ID.
type zipped struct {
	v1.Layer
	plain v1.Layer
}

func (z zipped) DiffID() (v1.Hash, error) { return z.plain.DiffID() }

func write(w io.Writer, b []byte) error { _, err := w.Write(b); return err }

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// layers reads all layers of a source to their ends.
func layers(ctx context.Context, s *registry.Source) (plain [][]byte, err error) {
	for _, l := range s.Layers {
		r, err := l.Open(ctx)
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(r)
		if err := errors.Join(err, r.Close()); err != nil {
			return nil, err
		}
		plain = append(plain, b)
	}
	return plain, nil
}

// Every way to name an image leads to the same layers.
func TestSources(t *testing.T) {
	amd, wantAMD := foreign(t, "amd64")
	arm, wantARM := foreign(t, "arm64")
	both := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
		mutate.IndexAddendum{Add: empty.Image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}})
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }

	one, err := layout.Write(in("one"), empty.Index)
	must(t, err, one.AppendImage(amd))
	multi, err := layout.Write(in("multi:with colon"), empty.Index)
	must(t, err, multi.AppendIndex(both, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "os:12"})),
		multi.AppendImage(arm, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "arm"})))
	_, err = layout.Write(in("bare"), both)
	must(t, err)
	run(t, "tar", "-C", in("one"), "-cf", in("one.tar"), ".")
	run(t, "tar", "-C", in("multi:with colon"), "-czf", in("multi.tar.gz"), "oci-layout", "index.json", "blobs")
	tag, _ := name.NewTag("example.org/os:12")
	must(t, tarball.WriteToFile(in("docker.tar"), tag, amd))
	r := registrytest.Start(t, registrytest.Options{})
	remoteTag, _ := name.NewTag(r.Host + "/deep/os:12")
	must(t, remote.WriteIndex(remoteTag, both))
	digest, _ := both.Digest()
	amdDigest, _ := amd.Digest()

	for _, tt := range []struct {
		source, arch string
		want         [][]byte
		err          string
	}{
		{"oci:" + in("one"), "", wantAMD, ""},
		{"oci:" + in("one"), "arm64", nil, "is for amd64, not for arm64"},
		{"oci:" + in("one") + ":nix", "", nil, `no image "nix"`},
		{"oci:" + in("none"), "", nil, "no such file"},
		{"oci:" + in("multi:with colon") + ":os:12", "arm64", wantARM, ""},
		{"oci:" + in("multi:with colon") + ":os:12", "amd64", wantAMD, ""},
		{"oci:" + in("multi:with colon") + ":os:12", "riscv64", nil, `nothing for linux/riscv64: there are ["linux/amd64" "linux/arm64"]`},
		{"oci:" + in("multi:with colon") + ":arm", "", wantARM, ""},
		{"oci:" + in("multi:with colon"), "", nil, `holds 2 images: say which after a colon, of ["os:12" "arm"]`},
		{"oci:" + in("bare"), "arm64", wantARM, ""},
		{"oci-archive:" + in("one.tar"), "", wantAMD, ""},
		{"oci-archive:" + in("multi.tar.gz") + ":os:12", "arm64", wantARM, ""},
		{"oci-archive:" + in("docker.tar"), "", nil, `"index.json" is not in it`},
		{"docker-archive:" + in("docker.tar"), "", wantAMD, ""},
		{"docker-archive:" + in("docker.tar") + ":os:12", "", wantAMD, ""},
		{"docker-archive:" + in("docker.tar") + ":os:13", "", nil, `holds 0 images "os:13"`},
		{"docker-archive:" + in("one.tar"), "", nil, `"manifest.json" is not in it`},
		{"docker://" + r.Host + "/deep/os:12", "arm64", wantARM, ""},
		{r.Host + "/deep/os:12", "amd64", wantAMD, ""},
		{r.Host + "/deep/os@" + digest.String(), "amd64", wantAMD, ""},
		{r.Host + "/deep/os@" + amdDigest.String(), "", wantAMD, ""},
		{r.Host + "/deep/os:13", "", nil, "HTTP 404"},
		{r.Host + "/deep/os:12", "mips", nil, "nothing for linux/mips"},
		{"docker://" + r.Host + "/UPPER", "", nil, "could not parse reference"},
	} {
		t.Run(strings.ReplaceAll(strings.TrimPrefix(tt.source, dir), "/", "_")+" "+tt.arch, func(t *testing.T) {
			if !registry.IsSource(tt.source) {
				t.Error("IsSource: false")
			}
			s, err := registry.Open(t.Context(), tt.source, tt.arch, registry.Options{})
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("Open: %v, want %s", err, tt.err)
				}
				return
			}
			must(t, err)
			defer s.Close()
			got, err := layers(t.Context(), s)
			if err != nil || !slices.EqualFunc(got, tt.want, bytes.Equal) {
				t.Errorf("%d layers, %v, want %d", len(got), err, len(tt.want))
			}
			if s.Labels["from"] != "elsewhere" || s.Architecture == "" || !s.Created.Equal(imagetest.When) {
				t.Errorf("labels %v, architecture %q, created %v", s.Labels, s.Architecture, s.Created)
			}
			if _, v, err := s.Own(t.Context()); err != nil || v.Name != "" {
				t.Errorf("Own: %q, %v", v.Name, err)
			}
		})
	}
}

func TestALayerStops(t *testing.T) {
	img, _ := foreign(t, "amd64")
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	must(t, err, p.AppendImage(img))
	s, err := registry.Open(t.Context(), "oci:"+dir, "", registry.Options{})
	must(t, err)
	defer s.Close()
	for _, l := range s.Layers {
		ctx, stop := context.WithCancel(t.Context())
		r, err := l.Open(ctx)
		must(t, err)
		stop()
		if _, err = io.Copy(io.Discard, r); !errors.Is(err, context.Canceled) {
			t.Errorf("layer %v: %v", l, err)
		}
		r.Close()
	}
}

func TestIsSource(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, os.MkdirAll("host.with.dots/os", 0o755))
	for source, want := range map[string]bool{
		"oci:x": true, "oci-archive:x": true, "docker-archive:x": true, "docker://debian:12": true,
		"localhost/os": true, "example.org/os:12": true, "host:5000/os": true, "[::1]:5000/os": true,
		"/srv/tree": false, "./tree": false, "../tree/x": false, "dir/tree": false, "debian.tar": false, "debian12": false,
		"host.with.dots/os": false,
	} {
		if got := registry.IsSource(source); got != want {
			t.Errorf("%s: %v", source, got)
		}
	}
}

// What was damaged is named, with both digests, whatever it was packed with.
func TestDamage(t *testing.T) {
	img, _ := foreign(t, "amd64")
	dir := t.TempDir()
	one, err := layout.Write(dir, empty.Index)
	must(t, err, one.AppendImage(img))
	m, err := img.Manifest()
	must(t, err)
	read := func() error {
		s, err := registry.Open(t.Context(), "oci:"+dir, "", registry.Options{})
		if err != nil {
			return err
		}
		defer s.Close()
		_, err = layers(t.Context(), s)
		return err
	}
	must(t, read())
	damage := func(d v1.Hash, do func([]byte) []byte, want ...string) {
		t.Helper()
		file := filepath.Join(dir, "blobs", d.Algorithm, d.Hex)
		good, err := os.ReadFile(file)
		must(t, err, os.WriteFile(file, do(bytes.Clone(good)), 0o644))
		err = read()
		for _, part := range want {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %v, want %s", d, err, part)
			}
		}
		must(t, os.WriteFile(file, good, 0o644))
	}
	for _, l := range m.Layers {
		for _, at := range []int64{0, 3, 12, l.Size / 2, l.Size - 1} {
			damage(l.Digest, func(b []byte) []byte { b[at] ^= 16; return b }, "digest is sha256:", "want "+l.Digest.String())
		}
		damage(l.Digest, func(b []byte) []byte { return b[:len(b)-1] }, "ends after")
		damage(l.Digest, func(b []byte) []byte { return append(b, 0) }, "has more than its")
		damage(l.Digest, func(b []byte) []byte { return nil }, "ends after 0 bytes")
	}
	damage(m.Config.Digest, func(b []byte) []byte { b[9] ^= 1; return b }, "config "+m.Config.Digest.String())
	digest, _ := img.Digest()
	damage(digest, func(b []byte) []byte { b[9] ^= 1; return b }, "manifest "+digest.String())
	must(t, read())
}

// A diff ID that is another layer's is found, though all digests are right.
func TestWrongDiffID(t *testing.T) {
	img, _ := foreign(t, "amd64")
	c, err := img.ConfigFile()
	must(t, err)
	c = c.DeepCopy()
	c.RootFS.DiffIDs[0], c.RootFS.DiffIDs[1] = c.RootFS.DiffIDs[1], c.RootFS.DiffIDs[0]
	img, err = mutate.ConfigFile(img, c)
	must(t, err)
	dir := t.TempDir()
	one, err := layout.Write(dir, empty.Index)
	must(t, err, one.AppendImage(img))
	s, err := registry.Open(t.Context(), "oci:"+dir, "", registry.Options{})
	must(t, err)
	if _, err = layers(t.Context(), s); err == nil || !strings.Contains(err.Error(), "unpacks to sha256:") || !strings.Contains(err.Error(), "want "+c.RootFS.DiffIDs[0].String()) {
		t.Errorf("%v, want unpacks to", err)
	}
}

func run(t *testing.T, command string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), command, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", command, args, err, out)
	}
	return string(out)
}

// Whatever an archive holds, opening and reading it ends, and what is read to
// the end is what the config says.
func FuzzArchive(f *testing.F) {
	archive := func(members map[string]any) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for name, v := range members {
			doc, ok := v.([]byte)
			if !ok {
				doc, _ = json.Marshal(v)
			}
			w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(doc))})
			w.Write(doc)
		}
		w.WriteHeader(&tar.Header{Name: "link", Linkname: "link", Typeflag: tar.TypeSymlink})
		w.Close()
		return b.Bytes()
	}
	var layer bytes.Buffer
	gz := gzip.NewWriter(&layer)
	gz.Write([]byte("plain"))
	gz.Close()
	diff, _, _ := v1.SHA256(strings.NewReader("plain"))
	config, _ := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": []string{diff.String()}}})
	digest := func(b []byte) v1.Hash { h, _, _ := v1.SHA256(bytes.NewReader(b)); return h }
	blob := func(b []byte) string { return "blobs/sha256/" + digest(b).Hex }
	manifest, _ := json.Marshal(v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1,
		Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: digest(config), Size: int64(len(config))},
		Layers: []v1.Descriptor{{MediaType: types.OCILayer, Digest: digest(layer.Bytes()), Size: int64(layer.Len())}}})
	f.Add(archive(map[string]any{
		"index.json":        v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{{MediaType: types.OCIManifestSchema1, Digest: digest(manifest), Size: int64(len(manifest))}}},
		blob(manifest):      manifest,
		blob(config):        config,
		blob(layer.Bytes()): layer.Bytes(),
		"manifest.json":     []map[string]any{{"Config": blob(config), "RepoTags": []string{"a:1"}, "Layers": []string{blob(layer.Bytes())}}},
	}))
	f.Add(archive(map[string]any{"index.json": "x", "manifest.json": []map[string]any{{"Config": "link"}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		file := filepath.Join(t.TempDir(), "a")
		must(t, os.WriteFile(file, b, 0o644))
		for _, scheme := range []string{"oci-archive:", "docker-archive:"} {
			s, err := registry.Open(t.Context(), scheme+file, "", registry.Options{})
			if err != nil {
				continue
			}
			if plain, err := layers(t.Context(), s); err == nil {
				for i, p := range plain {
					if got := digest(p); got.String() != string(s.Layers[i].DiffID) {
						t.Errorf("layer %d is %s, want %s", i, got, s.Layers[i].DiffID)
					}
				}
			}
			s.Own(t.Context())
			s.Close()
		}
	})
}
