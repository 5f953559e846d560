package registry

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/wire"
)

const schemeTar = "tar:"

// Export writes a version to one of these:
//
//	oci:DIR[:REF]              an OCI layout; an image more where there is one
//	oci-archive:FILE[:REF]     a tar file of a layout
//	docker-archive:FILE[:REF]  for docker load and podman load
//	tar:FILE                   the tree as one tarball; .gz and .zst are packed
//	docker://HOST[:PORT]/REPO[:TAG]  a registry
//
// REF is by default v's name. FILE may be "-", which is stdout. Files and
// directories appear complete or not at all.
func Export(ctx context.Context, from *store.Store, v store.Version, dest string, stdout io.Writer, opts Options) error {
	e, err := newExport(ctx, from, v)
	if err == nil {
		err = e.to(ctx, dest, stdout, opts)
		err = errors.Join(err, e.close())
	}
	if err != nil {
		return fmt.Errorf("export %s to %s: %w", v.Name, dest, err)
	}
	return nil
}

// An export is a version with all its blobs open.
type export struct {
	name             string
	manifest, config part
	layers           []image.Layer
	close            func() error
}

// A part is a document of an export.
type part struct {
	digest wire.Digest
	bytes  []byte
}

func newExport(ctx context.Context, from *store.Store, v store.Version) (e *export, err error) {
	e = &export{name: v.Name}
	fetch := func(d wire.Digest) (part, error) {
		b, err := from.Blob(ctx, d)
		if err != nil {
			return part{}, err
		}
		doc, err := read(b)
		if err == nil {
			err = d.Verify(doc)
		}
		if err != nil {
			return part{}, fmt.Errorf("blob %s: %w", d, err)
		}
		return part{d, doc}, nil
	}
	if e.manifest, err = fetch(v.Manifest); err != nil {
		return nil, err
	}
	m, _, err := oci.ParseManifest(e.manifest.bytes)
	if err != nil {
		return nil, err
	}
	if e.config, err = fetch(m.Config.Digest); err != nil {
		return nil, err
	}
	e.layers, e.close, err = from.Layers(ctx, v)
	return e, err
}

func (e *export) to(ctx context.Context, dest string, stdout io.Writer, opts Options) error {
	// A file that does not exist yet has no colons in its name.
	if rest, ok := strings.CutPrefix(dest, schemeLayout); ok {
		dir, ref := splitRef(rest)
		return e.toLayout(ctx, dir, e.ref(ref))
	}
	if rest, ok := strings.CutPrefix(dest, schemeArchive); ok {
		file, ref := splitRef(rest)
		return whole(file, stdout, func(w io.Writer) error { return e.toArchive(ctx, w, e.ref(ref)) })
	}
	if rest, ok := strings.CutPrefix(dest, schemeDockerArchive); ok {
		file, ref := splitRef(rest)
		return whole(file, stdout, func(w io.Writer) error { return e.toDockerArchive(ctx, w, e.ref(ref)) })
	}
	if file, ok := strings.CutPrefix(dest, schemeTar); ok {
		return whole(file, stdout, func(w io.Writer) error { return e.toTar(ctx, w, file) })
	}
	if ref, ok := strings.CutPrefix(dest, schemeDocker); ok {
		return e.push(ctx, ref, opts)
	}
	return fmt.Errorf("want %sDIR, %sFILE, %sFILE, %sFILE or %sREF", schemeLayout, schemeArchive, schemeDockerArchive, schemeTar, schemeDocker)
}

func (e *export) ref(ref string) string {
	if ref == "" {
		return e.name
	}
	return ref
}

// A stoppable is a Writer until ctx ends.
type stoppable struct {
	ctx context.Context
	w   io.Writer
}

func (s stoppable) Write(b []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.w.Write(b)
}

var errNoPlace = errors.New("says no place to write to")

// whole makes a file appear at once and for good.
func whole(file string, stdout io.Writer, write func(io.Writer) error) error {
	if file == "" {
		return errNoPlace
	}
	if file == "-" {
		b := bufio.NewWriterSize(stdout, 1<<20)
		return errors.Join(write(b), b.Flush())
	}
	if st, err := os.Stat(file); err == nil && !st.Mode().IsRegular() {
		return errors.New("is there and no regular file")
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".unfinished-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // nothing, once it is renamed
	b := bufio.NewWriterSize(f, 1<<20)
	if err = write(b); err == nil {
		err = b.Flush()
	}
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(file))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// copyLayer writes a layer as it is, and says so when it is not the right one.
func (e *export) copyLayer(ctx context.Context, w io.Writer, n int) error {
	l, h := e.layers[n], sha256.New()
	_, err := io.CopyBuffer(io.MultiWriter(stoppable{ctx, w}, h), io.NewSectionReader(l.Bytes, 0, l.Size), make([]byte, 1<<20))
	if err == nil {
		if got := sum(h); got != l.Digest {
			err = fmt.Errorf("digest is %s, want %s", got, l.Digest)
		}
	}
	if err != nil {
		return fmt.Errorf("layer %d: %w", n, err)
	}
	return nil
}

const layoutVersion = `{"imageLayoutVersion":"1.0.0"}`

// index is an index.json with e beside what old has under other names.
func (e *export) index(old []byte, ref string) ([]byte, error) {
	x := &v1.IndexManifest{SchemaVersion: 2, MediaType: oci.TypeIndex}
	if old != nil {
		var err error
		if x, err = v1.ParseIndexManifest(bytes.NewReader(old)); err != nil {
			return nil, fmt.Errorf("index.json: %w", err)
		}
	}
	x.Manifests = slices.DeleteFunc(x.Manifests, func(d v1.Descriptor) bool { return d.Annotations[oci.KeyRefName] == ref })
	h, err := v1.NewHash(string(e.manifest.digest))
	if err != nil {
		return nil, err
	}
	x.Manifests = append(x.Manifests, v1.Descriptor{
		MediaType: oci.TypeManifest, Digest: h, Size: int64(len(e.manifest.bytes)),
		Annotations: map[string]string{oci.KeyRefName: ref},
	})
	return json.Marshal(x)
}

func (e *export) toLayout(ctx context.Context, dir, ref string) (err error) {
	if dir == "" {
		return errNoPlace
	}
	old, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	index, err := e.index(old, ref)
	if err != nil {
		return err
	}
	var want int64
	for _, l := range e.layers {
		if _, err := os.Stat(filepath.Join(dir, blobPath(l.Digest))); errors.Is(err, fs.ErrNotExist) {
			want += l.Size
		}
	}
	at, in := dir, dir
	if old == nil {
		at = filepath.Dir(dir)
	}
	if err := image.CheckFree(at, want); err != nil {
		return err
	}
	if old == nil {
		if in, err = os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+".unfinished-"); err != nil {
			return err
		}
		defer os.RemoveAll(in) // nothing, once it is renamed
		if err := os.Chmod(in, 0o755); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(in, "blobs/sha256"), 0o755); err != nil {
			return err
		}
	}
	write := func(name string, fill func(io.Writer) error) {
		if err == nil {
			err = whole(filepath.Join(in, name), nil, fill)
		}
	}
	document := func(name string, b []byte) {
		write(name, func(w io.Writer) error { _, err := w.Write(b); return err })
	}
	for n, l := range e.layers {
		write(blobPath(l.Digest), func(w io.Writer) error { return e.copyLayer(ctx, w, n) })
	}
	document(blobPath(e.config.digest), e.config.bytes)
	document(blobPath(e.manifest.digest), e.manifest.bytes)
	document("oci-layout", []byte(layoutVersion))
	document("index.json", index)
	if err != nil || in == dir {
		return err
	}
	// Onto an empty directory as well, where os.Rename refuses, but onto no other.
	if err := unix.Rename(in, dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// An archiver writes the members of an archive, in which nothing has a time or
// an owner.
type archiver struct {
	*tar.Writer
	written map[string]bool
}

func newArchiver(w io.Writer) archiver { return archiver{tar.NewWriter(w), make(map[string]bool)} }

func (a archiver) add(name string, size int64, write func(io.Writer) error) error {
	if a.written[name] {
		return nil
	}
	a.written[name] = true
	if err := a.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	return write(a)
}

func (a archiver) document(name string, b []byte) error {
	return a.add(name, int64(len(b)), func(w io.Writer) error { _, err := w.Write(b); return err })
}

func (e *export) toArchive(ctx context.Context, w io.Writer, ref string) error {
	index, err := e.index(nil, ref)
	if err != nil {
		return err
	}
	a := newArchiver(w)
	err = errors.Join(
		a.document("oci-layout", []byte(layoutVersion)),
		a.document("index.json", index),
		a.document(blobPath(e.manifest.digest), e.manifest.bytes),
		a.document(blobPath(e.config.digest), e.config.bytes))
	if err != nil {
		return err
	}
	for n, l := range e.layers {
		if err := a.add(blobPath(l.Digest), l.Size, func(w io.Writer) error { return e.copyLayer(ctx, w, n) }); err != nil {
			return err
		}
	}
	return a.Close()
}

// toDockerArchive writes plain layers: docker load knows no zstd in an archive.
func (e *export) toDockerArchive(ctx context.Context, w io.Writer, ref string) error {
	a := newArchiver(w)
	var names []string
	for n, l := range e.layers {
		x, err := image.ReadIndex(l.Bytes, l.Descriptor)
		if err != nil {
			return fmt.Errorf("layer %d: %w", n, err)
		}
		name := l.DiffID.Hex() + ".tar"
		err = a.add(name, x.PlainSize(), func(w io.Writer) error { return unpackLayer(ctx, w, n, l) })
		if err != nil {
			return err
		}
		names = append(names, name)
	}
	config := e.config.digest.Hex() + ".json"
	manifest, err := json.Marshal([]saved{{Config: config, RepoTags: []string{ref}, Layers: names}})
	if err == nil {
		err = errors.Join(a.document(config, e.config.bytes), a.document("manifest.json", manifest), a.Close())
	}
	return err
}

func unpackLayer(ctx context.Context, w io.Writer, n int, l image.Layer) error {
	r, err := Layer{
		Digest: l.Digest, DiffID: l.DiffID, Size: l.Size, n: n,
		open: func(context.Context) (store.Blob, error) {
			return opened{io.NewSectionReader(l.Bytes, 0, l.Size)}, nil
		},
	}.Open(ctx)
	if err == nil {
		_, err = io.Copy(stoppable{ctx, w}, r)
		r.Close()
	}
	if err != nil {
		return fmt.Errorf("layer %d: %w", n, err)
	}
	return nil
}

func (e *export) toTar(ctx context.Context, w io.Writer, file string) error {
	view, err := image.ReadView(e.layers...)
	if err != nil {
		return err
	}
	var packed io.WriteCloser = unpacked{w}
	switch ext := path.Ext(file); ext {
	case ".gz", ".tgz":
		packed = gzip.NewWriter(w)
	case ".zst", ".tzst":
		if packed, err = zstd.NewWriter(w); err != nil {
			return err
		}
	case ".xz", ".txz", ".bz2", ".tbz2", ".lz4":
		return fmt.Errorf("a tarball is plain or packed as .gz or .zst, not as %s", ext)
	}
	return errors.Join(view.WriteTar(stoppable{ctx, packed}, e.layers...), packed.Close())
}

type unpacked struct{ io.Writer }

func (unpacked) Close() error { return nil }

func (e *export) push(ctx context.Context, ref string, opts Options) error {
	n, err := name.ParseReference(ref, opts.names()...)
	if err != nil {
		return err
	}
	if _, ok := n.(name.Tag); !ok {
		return errors.New("a digest comes by itself: want a tag")
	}
	c, err := newClient(opts)
	if err != nil {
		return err
	}
	pusher, err := remote.NewPusher(c.options()...)
	if err != nil {
		return err
	}
	uploads := []upload{{e.config.digest, bytes.NewReader(e.config.bytes), int64(len(e.config.bytes))}}
	for _, l := range e.layers {
		uploads = append(uploads, upload{l.Digest, l.Bytes, l.Size})
	}
	for _, u := range uploads {
		if err := pusher.Upload(ctx, n.Context(), u); err != nil {
			return said(n.Context(), err)
		}
	}
	return said(n.Context(), pusher.Put(ctx, n, raw{e.manifest.bytes, oci.TypeManifest}))
}
