package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/registry/registrytest"
	"rookery/transport"
	httpsource "rookery/transport/http"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// rootfs is a directory with a small tree in it: some MiB that do not pack, so
// that sizes say something.
func rootfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for path, content := range map[string]string{
		"etc/hostname":     "golden\n",
		"etc/motd":         "Welcome.\n",
		"bin/sh":           string(imagetest.Noise(1, 1<<19)),
		"usr/lib/big":      string(imagetest.Noise(2, 2<<20)),
		"var/log/syslog":   "noise\n",
		"var/log/README":   "logs\n",
		"tmp/left":         "behind\n",
		"root/disk.iso":    "iso\n",
		"home/someone/etc": "private\n",
	} {
		put(t, filepath.Join(dir, path), content)
	}
	if err := errors.Join(os.Symlink("sh", filepath.Join(dir, "bin/bash")), os.Chmod(filepath.Join(dir, "bin/sh"), 0o755)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func put(t testing.TB, path, content string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func showImage(t testing.TB, state, name string, flags ...string) (v imageView) {
	t.Helper()
	out := must(t, state, append([]string{"image", "show", name, "-o", "json"}, flags...)...)
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return v
}

func digests(v imageView) (d []string) {
	for _, l := range v.Layers {
		d = append(d, string(l.Digest))
	}
	return d
}

// What is in the end of a sentence differs: sizes, seconds.
func begins(t testing.TB, what, got, want string) {
	t.Helper()
	if !strings.HasPrefix(got, want) {
		t.Errorf("%s:\n%swant %s", what, got, want)
	}
}

func TestCheckoutChangePublish(t *testing.T) {
	imagetest.Root(t)
	state := filepath.Join(t.TempDir(), "state")
	begins(t, "import", must(t, state, "image", "import", "debian12", rootfs(t)), "debian12:1: 20 files, 2.5 MiB of content; layer 2.5 MiB, in ")

	begins(t, "checkout", must(t, state, "image", "checkout", "debian12"), "debian12:1: is in "+state+"/trees/debian12: ")
	if _, err := run(t, state, "image", "checkout", "debian12"); err == nil || !strings.Contains(err.Error(), "is there already, checked out from or published as debian12:1: publish") {
		t.Errorf("second checkout: %v", err)
	}
	in := filepath.Join(state, "trees/debian12")
	put(t, filepath.Join(in, "etc/motd"), "Goodbye.\n")
	put(t, filepath.Join(in, "etc/new"), "new\n")
	if err := os.Remove(filepath.Join(in, "etc/hostname")); err != nil {
		t.Fatal(err)
	}

	want := "~ etc           0 B  time\n- etc/hostname  7 B\n~ etc/motd      9 B  content, time\n+ etc/new       4 B\n1 files added, 2 changed, 1 removed\n"
	if out := must(t, state, "image", "diff", in); out != want {
		t.Errorf("diff:\n%swant\n%s", out, want)
	}
	begins(t, "publish --dry-run", must(t, state, "image", "publish", "debian12", "debian12", "--dry-run"),
		"debian12 would have: 1 files added, 2 changed, 1 removed; a layer with 13 B of content on 2.5 MiB\n")
	out := must(t, state, "image", "publish", "debian12", "debian12")
	begins(t, "publish", out, "debian12:2: 1 files added, 2 changed, 1 removed; layer ")
	if !strings.Contains(out, " B on 2.5 MiB shared, in ") {
		t.Errorf("publish: %s", out)
	}
	begins(t, "publish again", must(t, state, "image", "publish", "debian12", "debian12"), "debian12:3: unchanged since debian12:2, the same layers, in ")
	begins(t, "publish --squash", must(t, state, "image", "publish", "debian12", "debian12:whole", "--squash"), "debian12:whole: 0 files added, 0 changed, 0 removed; layer 2.5 MiB with everything (--squash)")

	one, two, three, whole := showImage(t, state, "debian12:1"), showImage(t, state, "debian12:2"), showImage(t, state, "debian12:3"), showImage(t, state, "debian12")
	if !slices.Equal(digests(two)[:1], digests(one)) || len(two.Layers) != 2 || !slices.Equal(digests(two), digests(three)) || len(whole.Layers) != 1 {
		t.Errorf("layers:\n%q\n%q\n%q\n%q", digests(one), digests(two), digests(three), digests(whole))
	}
	if two.Parent != "debian12:1" || whole.Parent != "debian12:3" || two.Source != one.Source || !slices.Equal(whole.Tags, []string{"debian12:latest"}) {
		t.Errorf("parents %q, %q, source %q, tags %q", two.Parent, whole.Parent, two.Source, whole.Tags)
	}
	if one.Own != 0 || two.Own != 0 || whole.Own != whole.Size {
		t.Errorf("own: %d, %d, %d", one.Own, two.Own, whole.Own)
	}
	if out := must(t, state, "image", "diff", "debian12:2", "debian12:whole"); out != "0 files added, 0 changed, 0 removed\n" {
		t.Errorf("diff of the same in two ways:\n%s", out)
	}
	begins(t, "diff of versions", must(t, state, "image", "diff", "debian12:1", "debian12:3", "-o", "json"), "{\n  \"added\": {\n    \"names\": 1,")

	// A file of another content, with the size and the time of the old one.
	motd := filepath.Join(in, "etc/motd")
	st, err := os.Stat(motd)
	if err != nil {
		t.Fatal(err)
	}
	put(t, motd, "Goodbye!\n")
	if err := os.Chtimes(motd, st.ModTime(), st.ModTime()); err != nil {
		t.Fatal(err)
	}
	for _, flag := range []string{"", "--checksum"} {
		args := []string{"image", "diff", in}
		want := "0 files added, 0 changed, 0 removed\n"
		if flag != "" {
			args, want = append(args, flag), "~ etc/motd  9 B  content\n0 files added, 1 changed, 0 removed\n"
		}
		if out := must(t, state, args...); out != want {
			t.Errorf("diff %s:\n%s", flag, out)
		}
	}
	begins(t, "publish --checksum", must(t, state, "image", "publish", "debian12", "debian12:sum", "--checksum"), "debian12:sum: 0 files added, 1 changed, 0 removed; layer ")

	// A tree that was never an image.
	anew := rootfs(t)
	t.Chdir(filepath.Dir(anew))
	begins(t, "publish anew", must(t, state, "image", "publish", "./"+filepath.Base(anew), "other"), "other:1: 20 files added, 0 changed, 0 removed; layer 2.5 MiB with everything (no parent is known)")
	if got := showImage(t, state, "other").Source; got != anew {
		t.Errorf("source %q, want %q", got, anew)
	}
	// A parent that is gone.
	must(t, state, "image", "rm", "debian12:sum")
	begins(t, "publish without parent", must(t, state, "image", "publish", "debian12", "debian12:alone"), "debian12:alone: 20 files added, 0 changed, 0 removed; layer 2.5 MiB with everything (its parent debian12:sum is gone)")

	// Somebody works on the tree.
	lock, err := os.Open(in)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, state, "image", "publish", "debian12", "debian12"); err == nil || !strings.Contains(err.Error(), "is in use") {
		t.Errorf("publish of a tree in use: %v", err)
	}
}

func TestTagsAndRollback(t *testing.T) {
	state := published(t)
	must(t, state, "image", "import", "debian12", filepath.Dir(file(t, "other", "other\n")))
	tag := func(args ...string) string { t.Helper(); return must(t, state, append([]string{"image"}, args...)...) }
	if out := tag("tag", "debian12:1", "debian12:stable"); out != "debian12:stable is debian12:1\n" {
		t.Error(out)
	}
	for _, want := range []string{"debian12:1", "debian12:2"} {
		tag("tag", want, "debian12:stable")
		tag("tag", want, "debian12:latest")
		for _, name := range []string{"debian12", "debian12:latest", "debian12:stable"} {
			if v := showImage(t, state, name); v.Name != want {
				t.Errorf("%s is %s, want %s", name, v.Name, want)
			}
		}
	}
	if out := tag("list", "debian12"); strings.Count(out, "\n") != 3 || !strings.Contains(out, "debian12:stable") {
		t.Errorf("list:\n%s", out)
	}
	if out := tag("untag", "debian12:stable"); out != "debian12:stable: untagged\n" {
		t.Error(out)
	}
}

func TestRemoveAndPruneKeepWhatIsNeeded(t *testing.T) {
	state := published(t)
	for n := range 4 {
		must(t, state, "image", "import", "debian12", filepath.Dir(file(t, "n", fmt.Sprint(n))))
	}
	must(t, state, "apply", "-f", file(t, "n.yaml", strings.Replace(nodeYAML, "image: debian12", "image: debian12:2", 1)))
	must(t, state, "image", "tag", "debian12:3", "debian12:stable")
	for name, want := range map[string]string{
		"debian12:2": "debian12:2: node n1",
		"debian12:3": "debian12:3: is tagged debian12:stable",
		"debian12:9": `remove debian12:9: not found`,
	} {
		if _, err := run(t, state, "image", "rm", "debian12:1", name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("rm %s: %v, want %s", name, err, want)
		}
	}
	var dry, done pruneView
	for i, view := range []*pruneView{&dry, &done} {
		args := []string{"image", "prune", "--keep", "1", "-o", "json", "--dry-run"}
		if err := json.Unmarshal([]byte(must(t, state, args[:7-i]...)), view); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"debian12:1", "debian12:4"}; !slices.Equal(done.Removed, want) || !slices.Equal(dry.Removed, want) || dry.Bytes != done.Bytes || done.Bytes == 0 {
		t.Errorf("pruned %+v\ndry %+v, want %q", done, dry, want)
	}
	if done.Kept["debian12:2"] != "node n1" || len(done.Kept) != 3 {
		t.Errorf("kept: %v", done.Kept)
	}
	if out := must(t, state, "image", "prune", "--older-than", "1d"); !strings.HasSuffix(out, "0 versions and 0 blobs removed: 0 B\n") {
		t.Errorf("prune of what is new:\n%s", out)
	}
	must(t, state, "image", "rm", "debian12:2", "--force")
	if _, err := run(t, state, "image", "show", "debian12:2"); err == nil {
		t.Error("debian12:2 is still there")
	}
}

// Every way out is a way in, and the layer stays the same one where it can.
func TestExportImport(t *testing.T) {
	imagetest.Root(t)
	state, out := filepath.Join(t.TempDir(), "state"), t.TempDir()
	must(t, state, "image", "import", "debian12", rootfs(t))
	want := showImage(t, state, "debian12")
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	remote := strings.TrimPrefix(server.URL, "http://") + "/somewhere/debian12:7"
	for _, tt := range []struct {
		to, from string
		same     bool // the very layer
	}{
		{"oci:" + out + "/layout", "oci:" + out + "/layout", true},
		{"oci-archive:" + out + "/layout.tar", "oci-archive:" + out + "/layout.tar", true},
		{"docker://" + remote, remote, true},
		{"docker-archive:" + out + "/docker.tar", "docker-archive:" + out + "/docker.tar", false},
		{"tar:" + out + "/plain.tar", "tar:" + out + "/plain.tar", false},
		{"tar:" + out + "/plain.tar.zst", out + "/plain.tar.zst", false},
		{"tar:" + out + "/plain.tar.gz", out + "/plain.tar.gz", false},
	} {
		t.Run(tt.to, func(t *testing.T) {
			if said := must(t, state, "image", "export", "debian12:1", tt.to); !strings.Contains(said, "written to "+tt.to) {
				t.Errorf("export says %q", said)
			}
			if scheme, source, ok := strings.Cut(tt.from, ":/"); ok && scheme != "tar" {
				if _, err := run(t, state, "image", "import", "again", "/"+source); err == nil || !strings.HasSuffix(err.Error(), " holds a container image, which is "+scheme+":/"+source) {
					t.Errorf("import of /%s: %v", source, err)
				}
			}
			must(t, state, "image", "import", "again", tt.from)
			got := showImage(t, state, "again")
			// Without what one layer knows of the other, the trees are the same.
			if diff := must(t, state, "image", "diff", "debian12", "again"); diff != "0 files added, 0 changed, 0 removed\n" {
				t.Errorf("diff:\n%s", diff)
			}
			if same := slices.Equal(digests(got), digests(want)); same != tt.same && tt.same {
				t.Errorf("layers %q, were %q", digests(got), digests(want))
			}
		})
	}
	if said, err := run(t, state, "image", "export", "debian12:1", out); err == nil || !strings.Contains(err.Error(), "want oci:DIR") || said != "" {
		t.Errorf("export to a directory: %q, %v", said, err)
	}
	var stdout bytes.Buffer
	cmd := root()
	cmd.SetOut(&stdout)
	cmd.SetErr(io.Discard)
	cmd.SetArgs([]string{"--state", state, "image", "export", "debian12", "tar:-"})
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	tar := exec.Command("tar", "-xO", "etc/hostname")
	tar.Stdin = &stdout
	if b, err := tar.CombinedOutput(); err != nil || string(b) != "golden\n" {
		t.Errorf("tar: %v: %s", err, b)
	}
}

func TestCopyBetweenStores(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	remote := "registry:" + strings.TrimPrefix(server.URL, "http://") + "/site"
	state, other := published(t), filepath.Join(t.TempDir(), "other")
	want := showImage(t, state, "debian12:1")
	layer := size(want.Size)
	begins(t, "copy out", must(t, state, "image", "copy", "--to", other, "debian12"), "debian12:1: "+layer+" copied, 0 B shared, in ")
	begins(t, "copy again", must(t, state, "image", "copy", "--to", other, "debian12:1"), "debian12:1: 0 B copied, "+layer+" shared, in ")
	must(t, state, "image", "copy", "--to", remote, "debian12:1")
	must(t, state, "image", "copy", "--from", remote, "debian12:1", "lab")
	begins(t, "copy to a name", must(t, state, "image", "copy", "debian12:1", "debian12"), "debian12:2: 0 B copied, "+layer+" shared, in ")
	for _, got := range []imageView{
		showImage(t, state, "lab:1"), showImage(t, state, "debian12:2"), showImage(t, state, "debian12:1", "--images", other), showImage(t, state, "debian12:1", "--images", remote),
	} {
		if !slices.Equal(digests(got), digests(want)) {
			t.Errorf("%s: layers %q, want %q", got.Name, digests(got), digests(want))
		}
	}
	if v := showImage(t, state, "debian12", "--images", remote); v.Layers[0].Blob != "" {
		t.Errorf("a registry's layer has the path %q", v.Layers[0].Blob)
	}
	must(t, state, "image", "import", "else", filepath.Dir(file(t, "else", "else\n")))
	if _, err := run(t, state, "image", "copy", "debian12:1", "else:1"); err == nil || !strings.HasPrefix(err.Error(), "copy debian12:1 to else:1: layer 0 is ") {
		t.Errorf("copy to a name that is taken: %v", err)
	}
	// A server whose images are in a registry, from the first command on.
	fresh := filepath.Join(t.TempDir(), "fresh")
	t.Setenv("ROOKERY_IMAGES", remote)
	must(t, fresh, "image", "import", "debian12", filepath.Dir(file(t, "new", "new\n")))
	if out := must(t, fresh, "image", "list"); !strings.Contains(out, "debian12:2 ") {
		t.Errorf("list:\n%s", out)
	}
	if _, err := os.Stat(filepath.Join(fresh, "images")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a directory of images, too: %v", err)
	}
}

// A registry to which an image was copied is a mirror of its layers.
func TestACopyInARegistryIsAMirror(t *testing.T) {
	host := registrytest.Start(t, registrytest.Options{}).Host
	state := published(t)
	must(t, state, "image", "copy", "--to", "registry+http:"+host+"/site", "debian12:1")
	layer := showImage(t, state, "debian12:1").Layers[0]
	content, err := os.ReadFile(layer.Blob)
	if err != nil {
		t.Fatal(err)
	}
	torrent, err := transport.NewTorrent(bytes.NewReader(content), int64(len(content)), wire.DigestOf(content))
	if err != nil {
		t.Fatal(err)
	}
	info, err := transport.ParseTorrent(torrent)
	if err != nil {
		t.Fatal(err)
	}
	mirror := httpsource.Source{URLs: []string{"http://" + host + "/v2/site/debian12/blobs/"}, Client: http.DefaultClient}
	got := transporttest.NewMemory(nil)
	if err := mirror.Fetch(t.Context(), transport.NewPieces(info, got)); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("%d of %d bytes, %v", len(got.Bytes()), len(content), err)
	}
}

// flip flips a bit in the middle of a layer.
func flip(t *testing.T, v imageView) {
	t.Helper()
	f, err := os.OpenFile(v.Layers[0].Blob, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	at := v.Layers[0].Size / 2
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

func TestAFlippedBitIsFoundAndMended(t *testing.T) {
	imagetest.Root(t)
	state, source := filepath.Join(t.TempDir(), "state"), rootfs(t)
	must(t, state, "image", "import", "debian12:1", source)
	if out := must(t, state, "image", "verify"); !strings.HasPrefix(out, "1 versions, 2.5 MiB: all right") {
		t.Error(out)
	}
	flip(t, showImage(t, state, "debian12"))

	out, err := run(t, state, "image", "verify", "debian12")
	if err == nil || !strings.Contains(out, "debian12:1: layer 0: frame ") || !strings.Contains(out, "\n  usr/lib/big\n") {
		t.Errorf("verify: %v\n%s", err, out)
	}
	for _, args := range [][]string{
		{"image", "extract", "debian12:1", filepath.Join(t.TempDir(), "new")},
		{"image", "checkout", "debian12:1"},
		{"image", "export", "debian12:1", "docker-archive:" + filepath.Join(t.TempDir(), "out.tar")},
		{"image", "copy", "debian12:1", "--to", filepath.Join(t.TempDir(), "copy")},
	} {
		if _, err := run(t, state, args...); err == nil || !strings.Contains(err.Error(), "layer 0") && !strings.Contains(err.Error(), "digest is") {
			t.Errorf("rookery %s: %v", strings.Join(args, " "), err)
		}
		last := strings.TrimPrefix(args[len(args)-1], "docker-archive:")
		if args[1] == "export" {
			if _, err := os.Stat(last); err == nil {
				t.Errorf("rookery %s left a file", strings.Join(args, " "))
			}
		}
	}
	if _, err := os.Stat(filepath.Join(state, "trees/debian12")); err == nil {
		t.Error("a checkout that failed left a tree")
	}
	must(t, state, "image", "import", "debian12:1", source)
	must(t, state, "image", "verify")
	must(t, state, "image", "checkout", "debian12:1") // what was left of the first is gone on with
}

func TestADamagedManifestIsListed(t *testing.T) {
	state := published(t)
	must(t, state, "image", "import", "debian12", filepath.Dir(file(t, "other", "other\n")))
	v := showImage(t, state, "debian12:1")
	manifest := filepath.Join(filepath.Dir(v.Layers[0].Blob), v.Manifest.Hex())
	if err := os.WriteFile(manifest, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := must(t, state, "image", "list"); !strings.Contains(out, "debian12:1 ") || !strings.Contains(out, "cannot be read: ") || !strings.Contains(out, "debian12:2 ") {
		t.Errorf("list:\n%s", out)
	}
	if out, err := run(t, state, "image", "verify"); err == nil || !strings.Contains(out, "debian12:1: manifest (") {
		t.Errorf("verify: %v\n%s", err, out)
	}
}

func TestExcludesOfSiteImageAndFlags(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	put(t, filepath.Join(state, "excludes"), "# logs grow\n/var/log/**\n")
	put(t, filepath.Join(state, "excludes.d/debian12"), "!/var/log/README\n")
	list := file(t, "list", "/root/*\n")
	must(t, state, "image", "import", "debian12", rootfs(t), "--exclude", "/home/*", "--exclude-from", list)
	must(t, state, "image", "import", "other", rootfs(t))
	out := must(t, state, "image", "diff", "debian12", "other", "-o", "json")
	var d diffView
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, c := range d.Changes {
		if c.Kind != "changed" {
			paths = append(paths, c.Kind+" "+c.Path)
		}
	}
	want := []string{"added home/someone", "added home/someone/etc", "added root/disk.iso", "removed var/log/README"}
	if !slices.Equal(paths, want) {
		t.Errorf("other has more, or less: %q, want %q", paths, want)
	}
	for _, tt := range []struct{ flag, value, want string }{
		{"--exclude", "/a/../b", `--exclude:1: "/a/../b": `},
		{"--exclude-from", filepath.Join(state, "none"), "no such file"},
	} {
		if _, err := run(t, state, "image", "import", "bad", rootfs(t), tt.flag, tt.value); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s %s: %v", tt.flag, tt.value, err)
		}
	}
}

func TestNoRoomIsSaidFirst(t *testing.T) {
	imagetest.Root(t)
	state, small := filepath.Join(t.TempDir(), "state"), t.TempDir()
	source := rootfs(t)
	sparse, err := os.Create(filepath.Join(source, "sparse"))
	if err == nil {
		err = errors.Join(sparse.Truncate(128<<20), sparse.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	must(t, state, "image", "import", "debian12", source)
	for _, tt := range []struct {
		options string
		want    string
	}{
		{"size=1m", ": no space: 1048576 bytes are free, the tree takes "},
		{"size=64m,nr_inodes=10", ": no space: "},
		{"size=64m", ""}, // the hole takes none
	} {
		if err := unix.Mount("tmpfs", small, "tmpfs", 0, tt.options); err != nil {
			t.Skipf("mount: %v: needs root", err)
		}
		if strings.HasPrefix(tt.options, "size=1m") {
			for _, args := range [][]string{{"copy", "debian12", "--to", small + "/images"}, {"export", "debian12", "oci:" + small + "/layout"}} {
				if _, err := run(t, state, append([]string{"image"}, args...)...); err == nil || !strings.Contains(err.Error(), " bytes are free, want ") {
					t.Errorf("%s: %v", args[0], err)
				}
			}
			if err := os.RemoveAll(small + "/images"); err != nil {
				t.Fatal(err)
			}
		}
		_, err := run(t, state, "image", "extract", "debian12", filepath.Join(small, "new"))
		left, _ := os.ReadDir(filepath.Join(small, "new"))
		if uerr := unix.Unmount(small, 0); uerr != nil {
			t.Fatal(uerr)
		}
		if tt.want == "" {
			if err != nil {
				t.Errorf("%s: %v", tt.options, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) || len(left) > 0 {
			t.Errorf("%s: %v, left %v", tt.options, err, left)
		}
	}
}

// A command is killed in the middle, and given again.
func TestKilledExtractionsGoOn(t *testing.T) {
	imagetest.Root(t)
	state, source := filepath.Join(t.TempDir(), "state"), rootfs(t)
	for n := range 5 { // frames of their own, quickly packed
		put(t, filepath.Join(source, fmt.Sprint("usr/lib/", n)), strings.Repeat(string(imagetest.Noise(uint64(n), 32<<10)), 256))
	}
	must(t, state, "image", "import", "debian12", source)
	for _, tt := range []struct{ command, at, unfinished string }{
		{"extract", filepath.Join(t.TempDir(), "new"), ""},
		{"checkout", filepath.Join(state, "trees/mine"), filepath.Join(state, "trees/.mine.checkout-*")},
	} {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "--state", state, "image", tt.command, "debian12", tt.at)
		cmd.Env = append(os.Environ(), asProgram+"=1")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		journal := ""
		for journal == "" {
			for _, found := range glob(t, filepath.Join(cmp.Or(tt.unfinished, tt.at), image.Unfinished)) {
				if st, err := os.Stat(found); err == nil && st.Size() > 80 { // head, boot, a frame
					journal = found
				}
			}
			if tt.unfinished != "" && len(glob(t, tt.at)) > 0 {
				t.Fatal("the checkout was quicker than we")
			}
		}
		cmd.Process.Kill()
		cmd.Wait() // killed
		before, err := os.Stat(journal)
		if err != nil {
			t.Fatal(err)
		}
		if tt.unfinished != "" && len(glob(t, tt.at)) > 0 {
			t.Errorf("%s: looks finished", tt.command)
		}
		flipped := glob(t, filepath.Join(filepath.Dir(journal), "usr/lib/*"))
		if len(flipped) == 0 {
			t.Fatalf("%s: a journal of %d bytes and no file", tt.command, before.Size())
		}
		tarball := filepath.Join(t.TempDir(), "half.tar")
		if out, err := exec.Command("tar", "-cf", tarball, "-C", filepath.Dir(journal), ".").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, args := range [][]string{{"import", "half", filepath.Dir(journal)}, {"import", "half", tarball}, {"publish", filepath.Dir(journal), "half"}} {
			if _, err := run(t, state, append([]string{"image"}, args...)...); err == nil || !strings.Contains(err.Error(), "is not complete: extract it again") {
				t.Errorf("%s of half a tree: %v", args[0], err)
			}
		}
		must(t, state, "image", tt.command, "debian12", tt.at)
		if diff := must(t, state, "image", "diff", "debian12", tt.at, "--checksum"); diff != "0 files added, 0 changed, 0 removed\n" {
			t.Errorf("%s: %s", tt.command, diff)
		}
	}
	if left := glob(t, filepath.Join(state, "trees/.*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestExtractRefuses(t *testing.T) {
	state := published(t)
	full := filepath.Dir(file(t, "mine", "mine\n"))
	for dir, want := range map[string]string{
		full:           `is not empty: "mine" is there`,
		full + "/mine": "not a directory",
	} {
		if _, err := run(t, state, "image", "extract", "debian12", dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("extract to %s: %v, want %s", dir, err, want)
		}
	}
}

func TestAnInterruptLeavesNothingThatLooksFinished(t *testing.T) {
	state := published(t)
	tarball := filepath.Join(t.TempDir(), "out.tar")
	for _, args := range [][]string{
		{"image", "checkout", "debian12"},
		{"image", "export", "debian12", "tar:" + tarball},
		{"image", "import", "other", filepath.Dir(file(t, "x", "x"))},
		{"image", "publish", filepath.Dir(file(t, "x", "x")), "other"},
		{"image", "copy", "debian12", "--to", filepath.Join(state, "copy")},
		{"image", "verify"},
	} {
		ctx, interrupt := context.WithCancel(t.Context())
		interrupt()
		cmd := root()
		cmd.SetOut(new(bytes.Buffer))
		cmd.SetErr(new(bytes.Buffer))
		cmd.SetArgs(append([]string{"--state", state}, args...))
		if err := cmd.ExecuteContext(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("rookery %s: %v", strings.Join(args, " "), err)
		}
	}
	for _, path := range []string{tarball, filepath.Join(state, "trees/debian12")} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is there", path)
		}
	}
	if out := must(t, state, "image", "list"); strings.Count(out, "\n") != 2 {
		t.Errorf("list:\n%s", out)
	}
}

func TestCompletion(t *testing.T) {
	imagetest.Root(t)
	state := published(t)
	must(t, state, "image", "checkout", "debian12", "mine")
	for _, tt := range []struct{ args, want string }{
		{"image show ", "debian12:1\ndebian12:latest\n"},
		{"image publish ", "mine\n"},
		{"image publish mine ", "debian12:1\ndebian12:latest\n"},
		{"image list -o ", "table\njson\nyaml\n"},
		{"image show debian12:1 ", ""},
	} {
		t.Setenv("ROOKERY_STATE", state)
		args := strings.Split(tt.args, " ")
		cmd := root()
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetErr(new(bytes.Buffer))
		cmd.SetArgs(append([]string{"__complete"}, args...))
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, _, _ := strings.Cut(out.String(), ":"+"4"); !strings.HasPrefix(out.String(), tt.want) || tt.want == "" && got != "" {
			t.Errorf("%q: %q", tt.args, out.String())
		}
	}
}

// Whoever asks for help gets an example.
func TestEveryImageCommandHasAnExample(t *testing.T) {
	cmd, _, err := root().Find([]string{"image"})
	if err != nil {
		t.Fatal(err)
	}
	for _, sub := range cmd.Commands() {
		if !strings.Contains(sub.Example, "  rookery image "+sub.Name()) || sub.Short == "" || sub.ValidArgsFunction == nil && sub.Name() != "prune" && sub.Name() != "shell" {
			t.Errorf("rookery image %s: example %q", sub.Name(), sub.Example)
		}
	}
}
