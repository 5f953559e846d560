// Package storetest says what every backend of an image store promises, by
// itself and under a store.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/wire"
)

// Layer is a layer of one file of that content. It is made once only: compressing
// is slow to begin, and not what is tested.
func Layer(content string) func(io.Writer) (image.Descriptor, error) {
	type layer struct {
		bytes bytes.Buffer
		image.Descriptor
	}
	return func(w io.Writer) (image.Descriptor, error) {
		made, ok := layers.Load(content)
		if !ok {
			l, err := new(layer), error(nil)
			tree := imagetest.New().File("f", []byte(content))
			if l.Descriptor, err = image.Write(&l.bytes, tree.Entries, tree.Open); err != nil {
				return l.Descriptor, err
			}
			made, _ = layers.LoadOrStore(content, l)
		}
		l := made.(*layer)
		_, err := w.Write(l.bytes.Bytes())
		return l.Descriptor, err
	}
}

var layers sync.Map

// Publish publishes a version with a layer of that content above lower. It is
// made that many hours after imagetest.When.
func Publish(t testing.TB, s *store.Store, name, content string, hours int, lower ...oci.Layer) store.Version {
	t.Helper()
	v, err := s.Publish(t.Context(), name, store.Publication{
		Lower: lower, Layer: Layer(content),
		Config: store.Config{
			Created: imagetest.When.Add(time.Duration(hours) * time.Hour), Architecture: "amd64", Comment: "from " + content,
			Labels: map[string]string{oci.LabelSource: content},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// Names are the versions that s lists, each with its tags: "a:1=a:latest b:1=".
func Names(t testing.TB, s *store.Store) string {
	t.Helper()
	versions, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, v := range versions {
		if v.Err != nil {
			t.Errorf("%s: %v", v.Name, v.Err)
		}
		slices.Sort(v.Tags)
		all = append(all, v.Name+"="+strings.Join(v.Tags, ","))
	}
	return strings.Join(all, " ")
}

func wantNames(t *testing.T, s *store.Store, want string) {
	t.Helper()
	if got := Names(t, s); got != want {
		t.Fatalf("the store has\n%s, want\n%s", got, want)
	}
}

func verify(t *testing.T, s *store.Store) {
	t.Helper()
	versions, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var done, total int64
	damages, err := s.Verify(t.Context(), func(d, all int64) {
		if d < done {
			t.Errorf("Verify: %d bytes are done, and were %d", d, done)
		}
		done, total = d, all
	}, versions...)
	if err != nil || len(damages) > 0 {
		t.Fatalf("Verify: %v, %v", damages, err)
	}
	if done != total || len(versions) > 0 && total == 0 {
		t.Errorf("Verify: %d of %d bytes", done, total)
	}
}

func read(t *testing.T, b store.Blob, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	all := make([]byte, b.Size())
	if n, err := b.ReadAt(all, 0); n < len(all) {
		t.Fatalf("read %d of %d bytes: %v", n, len(all), err)
	}
	return string(all)
}

func torrent(_ io.Reader, _ int64, d wire.Digest) ([]byte, error) {
	return []byte("torrent of " + d), nil
}

// Run tests the backends that open returns. Each must be empty, and take images
// of any name.
func Run(t *testing.T, open func(*testing.T) store.Backend) {
	t.Run("blobs", func(t *testing.T) { blobs(t, open(t)) })
	t.Run("names", func(t *testing.T) { names(t, open(t)) })
	for name, test := range map[string]func(*testing.T, *store.Store, store.Backend){
		"a version is what was published": published, "versions never change": immutable, "tags": tags, "layers are shared": shared,
		"removal": removal, "prune": prune, "copy": copies, "half a publication": half, "publishers": publishers, "an end to waiting": cancelled,
	} {
		t.Run(name, func(t *testing.T) {
			b := open(t)
			s := store.New(b)
			s.Torrent = torrent
			wantNames(t, s, "")
			test(t, s, b)
			verify(t, s)
		})
	}
}

func add(t *testing.T, b store.Backend, repo string, content []byte) wire.Digest {
	t.Helper()
	d := wire.DigestOf(content)
	err := b.Write(t.Context(), func(w store.Writer) error {
		return w.Add(t.Context(), repo, func(f *os.File) (wire.Digest, error) {
			if _, err := f.Write(content); err != nil {
				return "", err
			}
			again := make([]byte, len(content))
			if _, err := f.ReadAt(again, 0); err != nil || !bytes.Equal(again, content) {
				return "", fmt.Errorf("what was written cannot be read: %v", err)
			}
			return d, nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func blobs(t *testing.T, b store.Backend) {
	content := imagetest.Noise(1, 3<<20)
	r := store.Ref{Repo: "a", Digest: add(t, b, "a", content)}
	for range 2 { // once more is no harm
		blob, err := b.Open(t.Context(), r)
		if got := read(t, blob, err); got != string(content) {
			t.Fatal("the blob is another")
		}
		add(t, b, "a", content)
	}
	blob, err := b.Open(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	for _, tt := range []struct{ off, size, want int }{
		{0, 10, 10}, {10, 100000, 100000}, {5, 1, 1}, {2 << 20, 1 << 20, 1 << 20}, {3<<20 - 7, 7, 7}, {3<<20 - 7, 8, 7}, {3 << 20, 1, 0}, {4 << 20, 1, 0},
	} {
		p := make([]byte, tt.size)
		n, err := blob.ReadAt(p, int64(tt.off))
		if n != tt.want || n < tt.size && err != io.EOF || n > 0 && !bytes.Equal(p[:n], content[tt.off:tt.off+n]) {
			t.Errorf("ReadAt %d+%d: %d bytes, %v", tt.off, tt.size, n, err)
		}
	}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			p := make([]byte, 1000)
			if _, err := blob.ReadAt(p, int64(i*100000)); err != nil || !bytes.Equal(p, content[i*100000:i*100000+1000]) {
				t.Errorf("ReadAt beside others: %v", err)
			}
		})
	}
	all.Wait()

	for _, r := range []store.Ref{{Repo: "a", Digest: wire.DigestOf(nil)}, {Repo: "b", Digest: wire.DigestOf(nil)}, {Digest: wire.DigestOf(nil)}, {Repo: "a", Digest: wire.DigestOf(nil), Manifest: true}} {
		if _, err := b.Open(t.Context(), r); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("Open %+v: %v", r, err)
		}
	}
	for _, d := range []wire.Digest{"", "sha256:../../../etc/passwd", "md5:x"} {
		if _, err := b.Open(t.Context(), store.Ref{Repo: "a", Digest: d}); err == nil {
			t.Errorf("Open %q opened something", d)
		}
	}
	broken := errors.New("broken")
	half := []byte("half a layer")
	err = b.Write(t.Context(), func(w store.Writer) error {
		return w.Add(t.Context(), "a", func(f *os.File) (wire.Digest, error) {
			f.Write(half)
			return wire.DigestOf(half), broken
		})
	})
	if !errors.Is(err, broken) {
		t.Errorf("Add: %v", err)
	}
	if _, err := b.Open(t.Context(), store.Ref{Repo: "a", Digest: wire.DigestOf(half)}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Open of what was not finished: %v", err)
	}
}

func names(t *testing.T, b store.Backend) {
	set := func(change func([]store.Name) ([]store.Name, error)) error {
		return b.Write(t.Context(), func(w store.Writer) error { return w.SetNames(t.Context(), change) })
	}
	want := func(want ...store.Name) {
		t.Helper()
		got, err := b.Names(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for i := range want {
			want[i].Bytes = nil
		}
		less := func(a, b store.Name) int { return strings.Compare(a.Name, b.Name) }
		slices.SortFunc(got, less)
		slices.SortFunc(want, less)
		if len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
			t.Fatalf("Names: %v, want %v", got, want)
		}
	}
	name := func(name, config string) store.Name {
		repo, _, _ := strings.Cut(name, ":")
		m := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[]}`,
			oci.TypeManifest, oci.TypeConfig, add(t, b, repo, []byte(config)), len(config))
		return store.Name{Name: name, Manifest: wire.DigestOf(m), Size: int64(len(m)), Bytes: m}
	}
	want()
	a1, a2, b1 := name("a:1", `{"a":1}`), name("a:2", `{"a":2}`), name("b:1", `{"b":1}`)
	tag := a1
	tag.Name = "a:tag"
	for _, tt := range []struct {
		what  string
		names []store.Name
	}{
		{"new names", []store.Name{a1, b1}},
		{"another name of one", []store.Name{a1, b1, tag}},
		{"one that moves", []store.Name{a1, b1, a2, {Name: "a:tag", Manifest: a2.Manifest, Size: a2.Size, Bytes: a2.Bytes}}},
		{"one of two names of one", []store.Name{a1, b1, a2}},
		{"all names of one", []store.Name{a1, b1}},
		{"and again", []store.Name{a2, a1, b1}},
		{"none", nil},
	} {
		err := set(func(old []store.Name) ([]store.Name, error) { return tt.names, nil })
		if err != nil {
			t.Fatalf("%s: %v", tt.what, err)
		}
		for _, n := range tt.names {
			repo, _, _ := strings.Cut(n.Name, ":")
			blob, err := b.Open(t.Context(), store.Ref{Repo: repo, Digest: n.Manifest, Manifest: true})
			if got := read(t, blob, err); wire.DigestOf([]byte(got)) != n.Manifest {
				t.Fatalf("%s: the manifest of %s is another", tt.what, n.Name)
			}
		}
		want(slices.Clone(tt.names)...)
	}
	broken := errors.New("broken")
	if err := set(func([]store.Name) ([]store.Name, error) { return []store.Name{a1}, broken }); !errors.Is(err, broken) {
		t.Errorf("SetNames: %v", err)
	}
	want()
}

func published(t *testing.T, s *store.Store, b store.Backend) {
	v := Publish(t, s, "debian12:1", "one", 1)
	l := v.Layers[0]
	if v.Name != "debian12:1" || !v.Created.Equal(imagetest.When.Add(time.Hour).Truncate(time.Second)) || v.Size != l.Size ||
		v.Architecture != "amd64" || v.Comment != "from one" || v.Labels[oci.LabelSource] != "one" {
		t.Fatalf("%+v", v)
	}
	for _, s := range []*store.Store{s, store.New(b)} { // the other has seen nothing of it
		for d, want := range map[wire.Digest]string{l.Torrent: "torrent of " + string(l.Digest), v.Manifest: "", l.Digest: ""} {
			blob, err := s.Blob(t.Context(), d)
			if got := read(t, blob, err); wire.DigestOf([]byte(got)) != d || want != "" && got != want {
				t.Errorf("blob %s is %.100q", d, got)
			}
		}
		if _, err := s.Blob(t.Context(), wire.DigestOf(nil)); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("Blob: %v", err)
		}
		for _, name := range []string{"debian12", "debian12:latest", "debian12:1"} {
			if got, err := s.Resolve(t.Context(), name); err != nil || !reflect.DeepEqual(got, v) {
				t.Errorf("Resolve %s: %+v, %v, want %+v", name, got, err, v)
			}
		}
		for _, name := range []string{"c", "debian12:3", "c:latest", "", ":", "debian12:", ":1", "../a:1"} {
			if v, err := s.Resolve(t.Context(), name); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("Resolve %q: %q, %v", name, v.Name, err)
			}
		}
		layers, closeAll, err := s.Layers(t.Context(), v)
		if err != nil {
			t.Fatal(err)
		}
		view, err := image.ReadView(layers...)
		if _, ok := view.Find("f"); err != nil || !ok {
			t.Errorf("ReadView: %v, f is there: %v", err, ok)
		}
		if err := closeAll(); err != nil {
			t.Error(err)
		}
	}
	for repo, want := range map[string]string{"debian12": "debian12:2", "debian13": "debian13:1"} {
		if got, err := s.Next(t.Context(), repo); err != nil || got != want {
			t.Errorf("Next(%s): %s, %v", repo, got, err)
		}
	}
	Publish(t, s, "debian12:9", "two", 2)
	Publish(t, s, "debian12:test", "three", 3)
	Publish(t, s, "debian12:10", "four", 4)
	if got, err := s.Next(t.Context(), "debian12"); err != nil || got != "debian12:11" {
		t.Errorf("Next: %s, %v", got, err)
	}
	Publish(t, s, "a.b-c__d_e:_X.y-Z", "five", 0)
	wantNames(t, s, "a.b-c__d_e:_X.y-Z=a.b-c__d_e:latest debian12:1= debian12:9= debian12:test= debian12:10=debian12:latest")
}

func immutable(t *testing.T, s *store.Store, _ store.Backend) {
	first := Publish(t, s, "a:1", "one", 1)
	p := store.Publication{Layer: Layer("two")}
	if _, err := s.Publish(t.Context(), "a:1", p); !errors.Is(err, store.ErrExists) || !strings.Contains(err.Error(), string(first.Layers[0].Digest)) {
		t.Errorf("another layer: %v", err)
	}
	p = store.Publication{Lower: first.Layers, Layer: Layer("two")}
	if _, err := s.Publish(t.Context(), "a:1", p); !errors.Is(err, store.ErrExists) {
		t.Errorf("one more layer: %v", err)
	}
	if again := Publish(t, s, "a:1", "one", 5); !reflect.DeepEqual(again, first) {
		t.Errorf("the same layer: %+v, want %+v", again, first)
	}
	if err := s.Tag(t.Context(), "a:1", "a:tag"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Publish(t.Context(), "a:tag", store.Publication{Layer: Layer("one")}); !errors.Is(err, store.ErrExists) {
		t.Errorf("the name of a tag: %v", err)
	}
	for _, name := range []string{"a", "a:latest", "A:1", "a:", "a:1:2", "a/b:1", "../a:1", "a b:1", ":1", "a:.x", "a..b:1", "a-:1", strings.Repeat("a", 129) + ":1"} {
		if _, err := s.Publish(t.Context(), name, store.Publication{Layer: Layer("one")}); err == nil {
			t.Errorf("published %q", name)
		}
	}
	if _, err := s.Publish(t.Context(), "a:2", store.Publication{}); err == nil {
		t.Error("published nothing")
	}
	wantNames(t, s, "a:1=a:latest,a:tag")
}

func tags(t *testing.T, s *store.Store, b store.Backend) {
	Publish(t, s, "a:1", "one", 1)
	Publish(t, s, "a:2", "two", 2)
	Publish(t, s, "b:1", "other", 3)
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	do(s.Tag(t.Context(), "a:1", "a:good"))
	do(s.Tag(t.Context(), "a:1", "a:good"))
	wantNames(t, s, "a:1=a:good a:2=a:latest b:1=b:latest")
	do(s.Tag(t.Context(), "a", "a:good"))
	wantNames(t, store.New(b), "a:1= a:2=a:good,a:latest b:1=b:latest")
	do(s.Tag(t.Context(), "a:1", "a:latest")) // a rollback
	if v, err := s.Resolve(t.Context(), "a"); err != nil || v.Name != "a:1" {
		t.Errorf("Resolve: %s, %v", v.Name, err)
	}
	do(s.Untag(t.Context(), "a:latest")) // and its end
	wantNames(t, s, "a:1= a:2=a:good,a:latest b:1=b:latest")
	do(s.Tag(t.Context(), "a:1", "a:latest"))
	Publish(t, s, "a:3", "three", 4)
	do(s.Untag(t.Context(), "a:good"))
	wantNames(t, s, "a:1= a:2= b:1=b:latest a:3=a:latest")

	for _, tt := range []struct {
		name string
		err  error
		want string
	}{
		{"what is not there", s.Tag(t.Context(), "a:9", "a:x"), `tag a:x: image "a:9": not found`},
		{"a version", s.Tag(t.Context(), "a:1", "a:2"), "tag a:2: is a version"},
		{"another image", s.Tag(t.Context(), "a:1", "b:x"), `tag b:x: a tag of a:1 has to begin with "a:"`},
		{"no name", s.Tag(t.Context(), "a:1", "a:x y"), "want NAME:TAG"},
		{"no tag", s.Untag(t.Context(), "a:x"), "untag a:x: not found"},
		{"a version", s.Untag(t.Context(), "a:1"), "untag a:1: is a version"},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, tt.err, tt.want)
		}
	}
	wantNames(t, s, "a:1= a:2= b:1=b:latest a:3=a:latest")
}

func shared(t *testing.T, s *store.Store, _ store.Backend) {
	base := Publish(t, s, "a:1", "base", 1)
	two := Publish(t, s, "a:2", "above", 2, base.Layers...)
	if len(two.Layers) != 2 || two.Layers[0] != base.Layers[0] || two.Size != two.Layers[0].Size+two.Layers[1].Size {
		t.Fatalf("%+v, want the layers %+v and one more", two, base.Layers)
	}
	same, err := s.Publish(t.Context(), "a:3", store.Publication{Lower: two.Layers, Config: store.Config{Created: imagetest.When.Add(3 * time.Hour), Comment: "nothing changed"}})
	if err != nil || !reflect.DeepEqual(same.Layers, two.Layers) || same.Manifest == two.Manifest || same.Comment != "nothing changed" {
		t.Fatalf("%+v, %v, want the layers %+v", same, err, two.Layers)
	}
	other := Publish(t, s, "b:1", "of another image", 4, base.Layers...) // a registry has to have them in two repositories
	wantNames(t, s, "a:1= a:2= a:3=a:latest b:1=b:latest")
	for _, name := range []string{"a:2", "a:1", "a:3"} {
		if _, err := s.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		verify(t, s)
		blob, err := s.Blob(t.Context(), base.Layers[0].Digest) // in whichever repository
		if got := read(t, blob, err); wire.DigestOf([]byte(got)) != base.Layers[0].Digest {
			t.Error("the lowest layer is another")
		}
	}
	if v, err := s.Resolve(t.Context(), "b"); err != nil || !reflect.DeepEqual(v, other) {
		t.Fatalf("%+v, %v, want %+v", v, err, other)
	}

	gone := base.Layers[0]
	gone.Digest = wire.DigestOf(nil)
	if _, err := s.Publish(t.Context(), "b:2", store.Publication{Lower: []oci.Layer{gone}}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a lower layer that is not there: %v", err)
	}
	many := slices.Repeat(other.Layers[:1], oci.MaxLayers+1)
	if _, err := s.Publish(t.Context(), "b:2", store.Publication{Lower: many}); err == nil || !strings.Contains(err.Error(), "129 layers") {
		t.Errorf("too many layers: %v", err)
	}
}

func removal(t *testing.T, s *store.Store, b store.Backend) {
	one := Publish(t, s, "a:1", "one", 1)
	two := Publish(t, s, "a:2", "two", 2, one.Layers...)
	if err := s.Tag(t.Context(), "a:2", "a:good"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"a:good": "is a tag of a:2", "a:latest": "is a tag of a:2", "a:9": "remove a:9: not found", "a": "not found"} {
		if _, err := s.Remove(t.Context(), name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Remove %s: %v, want %q", name, err, want)
		}
	}
	p, err := s.Remove(t.Context(), "a:2")
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Versions) != 1 || p.Versions[0].Name != "a:2" || len(p.Versions[0].Tags) != 2 {
		t.Errorf("removed %+v", p.Versions)
	}
	wantFreed(t, p, two.Layers[1:], one.Layers)
	wantNames(t, s, "a:1=a:latest")
	wantNames(t, store.New(b), "a:1=a:latest")
	verify(t, s)
	// The name is free again, and nothing of what had it is in the way.
	Publish(t, s, "a:2", "other", 3)
	for _, name := range []string{"a:1", "a:2"} {
		if _, err := s.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	wantNames(t, s, "")
	Publish(t, s, "a:1", "one", 1)
	wantNames(t, s, "a:1=a:latest")
}

// wantFreed looks whether the layers in free were freed and those in kept were
// not. A registry tells nothing.
func wantFreed(t *testing.T, p store.Pruned, free, kept []oci.Layer) {
	t.Helper()
	if p.Blobs == nil {
		return
	}
	size, sum := map[wire.Digest]int64{}, int64(0)
	for _, b := range p.Blobs {
		size[b.Digest] = b.Size
		sum += b.Size
	}
	for _, l := range free {
		if size[l.Digest] != l.Size || size[l.Torrent] == 0 {
			t.Errorf("freed %v, and not %s and its torrent", p.Blobs, l.Digest)
		}
	}
	for _, l := range kept {
		if _, ok := size[l.Digest]; ok {
			t.Errorf("freed %s", l.Digest)
		}
	}
	if sum != p.Bytes {
		t.Errorf("freed %d bytes, says %d", sum, p.Bytes)
	}
}

func prune(t *testing.T, s *store.Store, _ store.Backend) {
	one := Publish(t, s, "a:1", "one", 1)
	two := Publish(t, s, "a:2", "two", 2, one.Layers...)
	Publish(t, s, "a:3", "three", 3, one.Layers...)
	four := Publish(t, s, "a:4", "four", 4)
	Publish(t, s, "a:5", "five", 5)
	Publish(t, s, "a:6", "six", 6)
	Publish(t, s, "a:7", "seven", 7)
	Publish(t, s, "b:1", "b", 1)
	if err := s.Tag(t.Context(), "a:3", "a:good"); err != nil {
		t.Fatal(err)
	}
	if err := s.Tag(t.Context(), "a:6", "a:latest"); err != nil {
		t.Fatal(err)
	}
	all := "a:1= b:1=b:latest a:2= a:3=a:good a:4= a:5= a:6=a:latest a:7="
	for range 2 {
		p, err := s.Prune(t.Context(), store.Keep{}, false)
		if err != nil || len(p.Versions)+len(p.Blobs) != 0 || len(p.Kept) != 8 {
			t.Fatalf("Prune without a policy: %+v, %v", p, err)
		}
		wantNames(t, s, all)
	}
	keep := store.Keep{Newest: 1, Since: imagetest.When.Add(4*time.Hour + 30*time.Minute), Needed: func(v store.Version) string {
		if v.Name == "a:1" {
			return "node n1"
		}
		return ""
	}}
	for _, dry := range []bool{true, false} {
		p, err := s.Prune(t.Context(), keep, dry)
		if err != nil {
			t.Fatal(err)
		}
		var gone []string
		for _, v := range p.Versions {
			gone = append(gone, v.Name)
		}
		if got := strings.Join(gone, " "); got != "a:2 a:4" {
			t.Errorf("prune removes %s", got)
		}
		want := []store.Kept{
			{Name: "a:1", Why: "node n1"}, {Name: "b:1", Why: "tagged b:latest"}, {Name: "a:3", Why: "tagged a:good"},
			{Name: "a:5", Why: "newer than 2023-11-15T02:43:20Z"}, {Name: "a:6", Why: "tagged a:latest"}, {Name: "a:7", Why: "one of the newest 1"},
		}
		if !reflect.DeepEqual(p.Kept, want) {
			t.Errorf("prune keeps %+v", p.Kept)
		}
		wantFreed(t, p, append(two.Layers[1:], four.Layers...), one.Layers)
		if dry {
			wantNames(t, s, all)
			verify(t, s)
		}
	}
	wantNames(t, s, "a:1= b:1=b:latest a:3=a:good a:5= a:6=a:latest a:7=")
}

func copies(t *testing.T, s *store.Store, _ store.Backend) {
	dir, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	copyOf := func(to, from *store.Store, v store.Version, name string) store.Version {
		t.Helper()
		c, err := to.Copy(t.Context(), from, v, name)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	bare := Publish(t, dir, "a:1", "one", 1) // without a torrent
	two := Publish(t, dir, "a:2", "two", 2, bare.Layers...)

	// With torrents, where they are made.
	c := copyOf(s, dir, two, "a:2")
	if c.Layers[1].Torrent == "" || c.Layers[0].Torrent == "" || c.Manifest == two.Manifest || c.Layers[1].Digest != two.Layers[1].Digest ||
		!c.Created.Equal(two.Created) || !reflect.DeepEqual(c.Labels, two.Labels) || c.Comment != two.Comment {
		t.Fatalf("copy is %+v, of %+v", c, two)
	}
	// Which is the same version, wherever it goes from there.
	back, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if again := copyOf(back, s, c, "a:2"); !reflect.DeepEqual(again, c) {
		t.Errorf("copy is %+v, of %+v", again, c)
	}
	verify(t, back)
	if again := copyOf(s, back, c, "a:2"); !reflect.DeepEqual(again, c) {
		t.Errorf("copy of what is there is %+v, of %+v", again, c)
	}
	// An older one does not become the latest.
	copyOf(s, dir, bare, "a:1")
	wantNames(t, s, "a:1= a:2=a:latest")
	// Another name, in the same store or from elsewhere.
	renamed := copyOf(s, s, c, "stable:1")
	if renamed.Name != "stable:1" || renamed.Manifest == c.Manifest || !reflect.DeepEqual(renamed.Layers, c.Layers) {
		t.Errorf("copy is %+v, of %+v", renamed, c)
	}
	if again := copyOf(s, dir, two, "stable:1"); !reflect.DeepEqual(again, renamed) {
		t.Errorf("copied again it is %+v, of %+v", again, renamed)
	}
	wantNames(t, s, "a:1= a:2=a:latest stable:1=stable:latest")
	if _, err := s.Copy(t.Context(), dir, bare, "a:2"); !errors.Is(err, store.ErrExists) {
		t.Errorf("copy over another: %v", err)
	}
	// What is damaged goes nowhere.
	b, err := os.ReadFile(back.Path(c.Layers[1].Digest))
	if err != nil {
		t.Fatal(err)
	}
	b[20] ^= 1
	if err := os.WriteFile(back.Path(c.Layers[1].Digest), b, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(t.Context(), "stable:1"); err != nil {
		t.Fatal(err)
	}
	other, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Copy(t.Context(), back, c, "a:2"); err == nil || !strings.Contains(err.Error(), "copy a:2 to a:2: layer 1: blob "+string(c.Layers[1].Digest)+": digest is") {
		t.Errorf("copy of what is damaged: %v", err)
	}
	wantNames(t, other, "")
	// And is mended from where it is whole.
	copyOf(back, s, c, "a:2")
	verify(t, back)
}

// Where names cannot be set at once, one may be killed between two of them.
func half(t *testing.T, s *store.Store, _ store.Backend) {
	Publish(t, s, "a:1", "one", 1)
	two := Publish(t, s, "a:2", "two", 2)
	if err := s.Tag(t.Context(), "a:1", "a:latest"); err != nil {
		t.Fatal(err)
	}
	again := Publish(t, s, "a:2", "two", 2)
	if !reflect.DeepEqual(again, two) {
		t.Errorf("published again it is %+v, was %+v", again, two)
	}
	Publish(t, s, "a:1", "one", 1) // which is older
	wantNames(t, s, "a:1= a:2=a:latest")
}

func publishers(t *testing.T, _ *store.Store, b store.Backend) {
	var all sync.WaitGroup
	var want []string
	for i := range 6 {
		name := fmt.Sprintf("%c:%d", 'a'+i/2, i)
		want = append(want, name)
		all.Go(func() {
			_, err := store.New(b).Publish(t.Context(), name, store.Publication{Layer: Layer(name)})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	versions, err := store.New(b).List(t.Context())
	var got []string
	for _, v := range versions {
		got = append(got, v.Name)
	}
	slices.Sort(got)
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("%v, %v, want %v", got, err, want)
	}
}

func cancelled(t *testing.T, s *store.Store, _ store.Backend) {
	v := Publish(t, s, "a:1", "one", 1)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Publish(ctx, "a:2", store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) {
		cancel()
		d, err := Layer("two")(w)
		return d, err
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Publish: %v", err)
	}
	if _, err := s.Verify(ctx, nil, v); !errors.Is(err, context.Canceled) {
		t.Errorf("Verify: %v", err)
	}
	if _, err := s.List(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("List: %v", err)
	}
	wantNames(t, s, "a:1=a:latest")
}
