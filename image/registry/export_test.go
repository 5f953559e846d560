package registry_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/oci"
	"rookery/image/registry"
	"rookery/image/registry/registrytest"
	"rookery/image/store"
)

// shared is what TestMain removes.
var shared struct {
	sync.Once
	dir   string
	store *store.Store
	top   store.Version
}

func TestMain(m *testing.M) {
	code := m.Run()
	os.RemoveAll(shared.dir)
	os.Exit(code)
}

// stacked is a version of three layers in a directory, in which something is
// removed, replaced, linked anew and put into what was removed. All tests have
// the same.
func stacked(t *testing.T) (*store.Store, store.Version) {
	t.Helper()
	shared.Do(func() {
		var err error
		shared.dir, err = os.MkdirTemp("", "rookery-")
		must(t, err)
		shared.store, err = store.Open(shared.dir)
		must(t, err)
		shared.top = stack(t, shared.store)
	})
	if shared.top.Name == "" {
		t.Fatal("an earlier test could not make the version")
	}
	return shared.store, shared.top
}

func stack(t *testing.T, s *store.Store) store.Version {
	t.Helper()
	lower := imagetest.Nasty()
	v := publish(t, s, "debian12:1", nil, lower)
	middle := imagetest.New().Dir("etc", "etc/ssl", "a").Whiteout("many").Whiteout("etc/ssl/certs").
		File("a/linked", imagetest.Noise(7, 1<<20)).Link("a/linked too", "a/linked").
		Add(image.Entry{Path: "b", Type: image.Symlink, Mode: 0o777, Link: "a"})
	v = publish(t, s, "debian12:2", v.Layers, middle)
	upper := imagetest.New().Dir("many", "a").File("many/again", []byte("back")).Whiteout("a/sudo").
		File("a/linked", []byte("no longer")).File("empty/file", nil).Dir("empty")
	return publish(t, s, "debian12:3", v.Layers, upper)
}

func extracted(t *testing.T, s *store.Store, v store.Version) []string {
	t.Helper()
	layers, closeAll, err := s.Layers(t.Context(), v)
	must(t, err)
	defer closeAll()
	dir := t.TempDir()
	_, err = image.Extract(t.Context(), dir, image.Options{}, layers...)
	must(t, err)
	return imagetest.Snapshot(t, dir)
}

func export(t *testing.T, s *store.Store, v store.Version, dest string) {
	t.Helper()
	must(t, registry.Export(t.Context(), s, v, dest, nil, registry.Options{}))
}

// What is exported is the same image to us, with its very layers wherever they
// are kept packed.
func TestExportAndBack(t *testing.T) {
	imagetest.Root(t)
	s, v := stacked(t)
	want := extracted(t, s, v)
	dir := t.TempDir()
	r := registrytest.Start(t, registrytest.Options{})
	for _, place := range []string{
		"oci:" + dir + "/layout", "oci:" + dir + "/layout2:os:12", "oci-archive:" + dir + "/layout.tar", "docker://" + r.Host + "/deep/os:12",
	} {
		t.Run(place, func(t *testing.T) {
			export(t, s, v, place)
			src, err := registry.Open(t.Context(), place, "", registry.Options{})
			must(t, err)
			defer src.Close()
			if src.Manifest != v.Manifest || src.Labels[oci.LabelHost] != "golden" {
				t.Errorf("manifest %s, want %s; labels %v", src.Manifest, v.Manifest, src.Labels)
			}
			from, own, err := src.Own(t.Context())
			must(t, err)
			if from == nil {
				t.Fatal("Own: somebody else's")
			}
			to, err := store.Open(filepath.Join(t.TempDir(), "images"))
			must(t, err)
			back, err := to.Copy(t.Context(), from, own, "back:1")
			must(t, err)
			for i, l := range back.Layers {
				if l.Digest != v.Layers[i].Digest || l.Descriptor != v.Layers[i].Descriptor {
					t.Errorf("layer %d: %+v, want %+v", i, l, v.Layers[i])
				}
			}
			imagetest.Same(t, extracted(t, to, back), want)
		})
	}
	t.Run("docker archive", func(t *testing.T) {
		export(t, s, v, "docker-archive:"+dir+"/docker.tar")
		src, err := registry.Open(t.Context(), "docker-archive:"+dir+"/docker.tar:debian12:3", "", registry.Options{})
		must(t, err)
		defer src.Close()
		plain, err := layers(t.Context(), src)
		if err != nil || len(plain) != 3 {
			t.Errorf("%d layers, %v", len(plain), err)
		}
		if from, _, err := src.Own(t.Context()); from != nil || err != nil {
			t.Errorf("Own: %v, %v: its layers are not the blobs any more", from, err)
		}
	})
}

// A layout takes more images, and an older one of the same name goes.
func TestExportIntoALayout(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "images"))
	must(t, err)
	one, two := publish(t, s, "os:1", nil, small()), publish(t, s, "os:2", nil, small().File("x", nil))
	dir := filepath.Join(t.TempDir(), "layout")
	must(t, os.Mkdir(dir, 0o755))
	for _, e := range []struct {
		v   store.Version
		ref string
	}{{one, ""}, {two, ""}, {one, ":latest"}, {two, ":latest"}} {
		export(t, s, e.v, "oci:"+dir+e.ref)
	}
	p, err := layout.FromPath(dir)
	must(t, err)
	x, err := p.ImageIndex()
	must(t, err, validate.Index(x, validate.Fast))
	m, err := x.IndexManifest()
	must(t, err)
	var got []string
	for _, d := range m.Manifests {
		got = append(got, d.Annotations[oci.KeyRefName]+"="+d.Digest.String())
	}
	want := []string{"os:1=" + string(one.Manifest), "os:2=" + string(two.Manifest), "latest=" + string(two.Manifest)}
	if !slices.Equal(got, want) {
		t.Errorf("names %q, want %q", got, want)
	}
}

// A damaged layer leaves no file, directory or tag behind.
func TestExportOfDamage(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "images"))
	must(t, err)
	v := publish(t, s, "os:1", nil, imagetest.New().File("big", imagetest.Noise(1, 1<<20)))
	file := s.Path(v.Layers[0].Digest)
	b, err := os.ReadFile(file)
	must(t, err)
	b[1000] ^= 1
	must(t, os.WriteFile(file, b, 0o644))
	r := registrytest.Start(t, registrytest.Options{})
	dir := t.TempDir()
	for _, dest := range []string{"oci:" + dir + "/o", "oci-archive:" + dir + "/oa", "docker-archive:" + dir + "/da", "tar:" + dir + "/t", "tar:" + dir + "/t.gz", "docker://" + r.Host + "/os:1"} {
		err := registry.Export(t.Context(), s, v, dest, nil, registry.Options{})
		if err == nil || !strings.Contains(err.Error(), "os:1 to "+dest) {
			t.Errorf("%s: %v", dest, err)
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%s: left %v", dest, left)
		}
	}
	if _, err := registry.Open(t.Context(), r.Host+"/os:1", "", registry.Options{}); err == nil || !strings.Contains(err.Error(), "HTTP 404") {
		t.Errorf("after a push that failed: %v", err)
	}
}

func TestExportRefuses(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "images"))
	must(t, err)
	v := publish(t, s, "os:1", nil, small())
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/full", 0o755), os.WriteFile(dir+"/full/x", nil, 0o644))
	for dest, want := range map[string]string{
		dir + "/x":             "want oci:DIR",
		"tar:" + dir:           "no regular file",
		"tar:" + dir + "/a/b":  "no such file",
		"oci:" + dir + "/full": "not empty",
		"tar:/dev/null":        "no regular file",
		"tar:" + dir + "/a.xz": "plain or packed as .gz or .zst, not as .xz",
		"tar:":                 "no place to write to",
		"oci:":                 "no place to write to",
		"oci::1":               "no place to write to",
		"docker://" + "localhost/x@" + string(v.Manifest): "want a tag",
	} {
		if err := registry.Export(t.Context(), s, v, dest, nil, registry.Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", dest, err, want)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// GNU tar makes of every flattened tarball what we extract.
func TestExportTar(t *testing.T) {
	imagetest.Root(t)
	s, v := stacked(t)
	want := extracted(t, s, v)
	for _, name := range []string{"x.tar", "x.tar.gz", "x.tar.zst", "-"} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), name)
			if name == "-" {
				var out bytes.Buffer
				must(t, registry.Export(t.Context(), s, v, "tar:-", &out, registry.Options{}), os.WriteFile(file, out.Bytes(), 0o644))
			} else {
				export(t, s, v, "tar:"+file)
			}
			dir := t.TempDir()
			run(t, "tar", "-xpf", file, "-C", dir, "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "--warning=no-timestamp")
			imagetest.Same(t, imagetest.Snapshot(t, dir), want)
		})
	}
}

func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: run scripts/deps", p)
		}
	}
}

// crane's library finds nothing wrong with what we write, and flattens it to what
// we extract, but for times of directories and for the links to a name that a
// higher layer replaces, which it takes for links to the new file.
func TestCrane(t *testing.T) {
	imagetest.Root(t)
	s, v := stacked(t)
	comparable := func(lines []string) []string {
		return slices.DeleteFunc(lines, func(l string) bool {
			return strings.Contains(l, ") directory ") || strings.HasPrefix(l, `"a/linked`)
		})
	}
	want := comparable(extracted(t, s, v))
	dir := t.TempDir()
	export(t, s, v, "docker-archive:"+dir+"/docker.tar")
	tag, err := name.NewTag("debian12:3")
	must(t, err)
	docker, err := tarball.ImageFromPath(dir+"/docker.tar", &tag)
	must(t, err, validate.Image(docker))

	export(t, s, v, "oci:"+dir+"/layout")
	p, err := layout.FromPath(dir + "/layout")
	must(t, err)
	h, err := v1.NewHash(string(v.Manifest))
	must(t, err)
	oci, err := p.Image(h)
	must(t, err)

	r := registrytest.Start(t, registrytest.Options{})
	export(t, s, v, "docker://"+r.Host+"/os:3")
	ref, err := name.ParseReference(r.Host + "/os:3")
	must(t, err)
	pulled, err := remote.Image(ref)
	must(t, err)

	for place, img := range map[string]v1.Image{"docker archive": docker, "layout": oci, "registry": pulled} {
		t.Run(place, func(t *testing.T) {
			must(t, validate.Image(img, validate.Fast)) // all of it takes every layer for gzip
			flat := mutate.Extract(img)
			defer flat.Close()
			dir := t.TempDir()
			tar := exec.CommandContext(t.Context(), "tar", "-xpf", "-", "-C", dir, "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "--warning=no-timestamp")
			tar.Stdin = flat
			if out, err := tar.CombinedOutput(); err != nil {
				t.Fatalf("tar: %v\n%s", err, out)
			}
			imagetest.Same(t, comparable(imagetest.Snapshot(t, dir)), want)
		})
	}
}

// skopeo copies an image through a layout and a registry, and what comes back is
// still ours, layer by layer.
func TestSkopeo(t *testing.T) {
	needs(t, "skopeo")
	s, v := stacked(t)
	dir := t.TempDir()
	r := registrytest.Start(t, registrytest.Options{})
	export(t, s, v, "oci:"+dir+"/ours")
	export(t, s, v, "docker-archive:"+dir+"/ours.tar")
	var seen struct {
		Labels       map[string]string
		Architecture string
		Layers       []string
	}
	must(t, json.Unmarshal([]byte(run(t, "skopeo", "inspect", "oci:"+dir+"/ours:debian12:3")), &seen))
	if seen.Labels[oci.LabelHost] != "golden" || seen.Architecture != "amd64" || len(seen.Layers) != 3 || seen.Layers[0] != string(v.Layers[0].Digest) {
		t.Errorf("skopeo inspect: %+v", seen)
	}
	tls := []string{"--insecure-policy", "copy", "--dest-tls-verify=false", "--src-tls-verify=false"}
	for _, c := range [][2]string{
		{"oci:" + dir + "/ours:debian12:3", "docker://" + r.Host + "/copied:1"},
		{"docker://" + r.Host + "/copied:1", "oci:" + dir + "/theirs:os:1"},
		{"oci:" + dir + "/theirs:os:1", "oci-archive:" + dir + "/theirs.tar:os:1"},
		{"docker-archive:" + dir + "/ours.tar", "docker-archive:" + dir + "/docker.tar:os:1"}, // out of zstd it makes none
	} {
		run(t, "skopeo", append(tls, c[0], c[1])...)
	}
	for _, source := range []string{r.Host + "/copied:1", "oci:" + dir + "/theirs", "oci-archive:" + dir + "/theirs.tar"} {
		src, err := registry.Open(t.Context(), source, "", registry.Options{})
		must(t, err)
		defer src.Close()
		from, own, err := src.Own(t.Context())
		if err != nil || from == nil {
			t.Fatalf("%s: Own: %v, %v", source, from, err)
		}
		for i, l := range own.Layers {
			if l.Descriptor != v.Layers[i].Descriptor {
				t.Errorf("%s: layer %d: %+v, want %+v", source, i, l, v.Layers[i])
			}
		}
	}
	src, err := registry.Open(t.Context(), "docker-archive:"+dir+"/docker.tar", "", registry.Options{})
	must(t, err)
	defer src.Close()
	if plain, err := layers(t.Context(), src); err != nil || len(plain) != 3 {
		t.Errorf("docker archive of skopeo: %d layers, %v", len(plain), err)
	}
}

// podman is podman with a storage of the test's own. runc, since crun refuses the
// mixed cgroups of some machines; the limits, since setting more than its own is
// refused in some containers.
type podman struct{ dir string }

func newPodman(t *testing.T) podman {
	t.Helper()
	needs(t, "podman", "runc")
	if os.Geteuid() != 0 {
		t.Skip("podman with a storage of its own needs root: run go test as root")
	}
	p := podman{t.TempDir()}
	if out, err := exec.CommandContext(t.Context(), "podman", p.args("info")...).CombinedOutput(); err != nil {
		t.Skipf("podman stacks layers with overlayfs, which TMPDIR must be able to hold: %s", out)
	}
	t.Cleanup(func() { // its mounts go before the directory
		exec.Command("podman", p.args("image", "umount", "--all")...).Run()
		exec.Command("podman", p.args("rm", "--all", "--force")...).Run()
	})
	return p
}

func (p podman) args(args ...string) []string {
	return append([]string{"--root", p.dir + "/root", "--runroot", p.dir + "/run", "--storage-driver", "overlay",
		"--events-backend", "none", "--cgroup-manager", "cgroupfs", "--runtime", "runc"}, args...)
}

func (p podman) run(t *testing.T, args ...string) string {
	t.Helper()
	var said bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "podman", p.args(args...)...)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("podman %q: %v\n%s", args, err, said.Bytes())
	}
	return string(out)
}

// What podman 4.3 makes otherwise, of every image: the root has its mode and time,
// no time is before 1970, no attribute is empty (Go's tar reader drops them), and
// files have got the default ACL of their directory.
var podmansOwn = []string{`"."(1) `, `"a/old"(5) `, `"a/ping"(6) `, `"setgid/file"(11) `}

// podman's tree of a stack of layers is ours.
func TestPodmanMounts(t *testing.T) {
	imagetest.Root(t)
	s, v := stacked(t)
	comparable := func(lines []string) []string {
		return slices.DeleteFunc(lines, func(l string) bool {
			return slices.ContainsFunc(podmansOwn, func(p string) bool { return strings.HasPrefix(l, p) })
		})
	}
	want := comparable(extracted(t, s, v))
	inPodman(t, s, v, func(t *testing.T, p podman, id string) {
		at := strings.TrimSpace(p.run(t, "image", "mount", id))
		imagetest.Same(t, comparable(imagetest.Snapshot(t, at)), want)
	})
}

// inPodman runs a test for each way that an export can go into podman.
func inPodman(t *testing.T, s *store.Store, v store.Version, test func(t *testing.T, p podman, image string)) {
	dir, err := os.MkdirTemp("", "rookery-") // podman makes a name of it, which is lower case
	must(t, err)
	defer os.RemoveAll(dir)
	for _, tt := range []struct {
		dest string
		load []string
	}{
		{"docker-archive:" + dir + "/docker.tar", []string{"load", "-i", dir + "/docker.tar"}},
		{"oci-archive:" + dir + "/oci.tar", []string{"load", "-i", dir + "/oci.tar"}},
		{"oci:" + dir + "/oci", []string{"pull", "oci:" + dir + "/oci:" + v.Name}},
	} {
		scheme, _, _ := strings.Cut(tt.dest, ":")
		t.Run(scheme, func(t *testing.T) {
			p := newPodman(t)
			export(t, s, v, tt.dest)
			out := p.run(t, tt.load...)
			if tt.load[0] == "load" {
				if want := "Loaded image: localhost/" + v.Name; !strings.Contains(out, want) {
					t.Errorf("podman says %q, want %q", out, want)
				}
				out = v.Name
			}
			test(t, p, strings.TrimSpace(out))
		})
	}
}

// podman runs a shell of an exported image.
func TestPodmanRuns(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "images"))
	must(t, err)
	v := publish(t, s, "shell:1", nil, shell(t))
	v = publish(t, s, "shell:2", v.Layers, imagetest.New().File("second-layer", nil).Whiteout("gone"))
	inPodman(t, s, v, func(t *testing.T, p podman, id string) {
		out := p.run(t, "run", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--rm",
			id, "sh", "-c", "echo ok; ls /")
		if !strings.HasPrefix(out, "ok\n") || !strings.Contains(out, "second-layer") || strings.Contains(out, "gone") {
			t.Errorf("podman run: %s", out)
		}
	})
}

// What podman saves, in each of its formats, is the image that it was given.
func TestPodmanSaves(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "images"))
	must(t, err)
	v := publish(t, s, "os:1", nil, small())
	v = publish(t, s, "os:2", v.Layers, imagetest.New().File("x", imagetest.Noise(1, 1<<20)).Whiteout("etc"))
	dir := t.TempDir()
	export(t, s, v, "docker-archive:"+dir+"/in.tar")
	given, err := registry.Open(t.Context(), "docker-archive:"+dir+"/in.tar", "", registry.Options{})
	must(t, err)
	defer given.Close()
	want, err := layers(t.Context(), given)
	must(t, err)
	p := newPodman(t)
	p.run(t, "load", "-i", dir+"/in.tar")
	p.run(t, "tag", "os:2", "example.org/other:3")
	p.run(t, "save", "--format", "docker-archive", "-o", dir+"/docker.tar", "os:2")
	p.run(t, "save", "--format", "docker-archive", "--multi-image-archive", "-o", dir+"/two.tar", "os:2", "example.org/other:3")
	p.run(t, "save", "--format", "oci-archive", "-o", dir+"/oci.tar", "os:2")
	p.run(t, "save", "--format", "oci-dir", "-o", dir+"/oci", "os:2")
	for _, source := range []string{
		"docker-archive:" + dir + "/docker.tar", "docker-archive:" + dir + "/docker.tar:os:2",
		"docker-archive:" + dir + "/two.tar:other:3", "oci-archive:" + dir + "/oci.tar", "oci:" + dir + "/oci",
	} {
		src, err := registry.Open(t.Context(), source, "", registry.Options{})
		must(t, err)
		defer src.Close()
		got, err := layers(t.Context(), src)
		if err != nil || !slices.EqualFunc(got, want, bytes.Equal) || src.Labels[oci.LabelHost] != "golden" {
			t.Errorf("%s: %d layers, %v, labels %v", source, len(got), err, src.Labels)
		}
	}
}

// shell is a tree with this machine's busybox and the libraries it wants.
func shell(t *testing.T) *imagetest.Tree {
	t.Helper()
	needs(t, "busybox", "ldd")
	busybox, err := exec.LookPath("busybox")
	must(t, err)
	files := []string{busybox}
	out, _ := exec.Command("ldd", busybox).Output() // none, when it is static
	for _, m := range regexp.MustCompile(`(?m)(/\S+) \(0x`).FindAllStringSubmatch(string(out), -1) {
		files = append(files, m[1])
	}
	tree := imagetest.New().File("gone", nil).Dir("bin").
		Add(image.Entry{Path: "bin/sh", Type: image.Symlink, Mode: 0o777, Link: "busybox"}).
		Add(image.Entry{Path: "bin/ls", Type: image.Symlink, Mode: 0o777, Link: "busybox"})
	have := map[string]bool{".": true, "bin": true}
	for _, file := range files {
		b, err := os.ReadFile(file)
		must(t, err)
		if file == busybox {
			file = "/bin/busybox"
		}
		var missing []string
		for d := filepath.Dir(file[1:]); !have[d]; d = filepath.Dir(d) {
			have[d] = true
			missing = append(missing, d)
		}
		slices.Reverse(missing)
		tree.Dir(missing...).FileEntry(image.Entry{Path: file[1:], Mode: 0o755}, b)
	}
	return tree
}
