// Package installtest has fakes of what an installation is made of: a machine
// that is a directory, a network that is a store, a reporter that remembers.
package installtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"rookery/agent/install"
	"rookery/disklayout"
	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/transport"
	"rookery/transport/rsync"
	"rookery/transport/rsync/rsynctest"
	"rookery/wire"
)

// Files is the content of the image that Publish makes. It looks as if it had a
// kernel and GRUB for BIOS, of which the program does not run.
var Files = map[string]string{
	"boot/vmlinuz-6.1":                "kernel\n",
	"usr/lib/grub/i386-pc/modinfo.sh": "modules\n",
	"usr/sbin/grub-install":           "no program\n",
	"etc/hostname":                    "golden\n",
	"etc/motd":                        strings.Repeat("welcome to the rookery\n", 40_000),
	"bin/true":                        "\x7fELF" + strings.Repeat("\x00\x01\x02\x03", 60_000),
}

// Publish makes a store in dir with an image of Files, named "tiny:1".
func Publish(t testing.TB, dir string) (*store.Store, store.Version) {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.Torrent = transport.NewTorrent
	entries := []image.Entry{{Path: ".", Type: image.Dir, Mode: 0o755, MTime: imagetest.When}}
	for _, name := range []string{"etc", "bin", "boot", "usr", "usr/lib", "usr/lib/grub", "usr/lib/grub/i386-pc", "usr/sbin", "var"} {
		entries = append(entries, image.Entry{Path: name, Type: image.Dir, Mode: 0o755, MTime: imagetest.When})
	}
	// Not compressible: a layer of several pieces.
	noise := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise) // never fails
	content := map[string]string{"bin/noise": string(noise)}
	for name, text := range Files {
		content[name] = text
	}
	for name, text := range content {
		entries = append(entries, image.Entry{Path: name, Type: image.Regular, Mode: 0o644, Size: int64(len(text)),
			MTime: imagetest.When, UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
	}
	version, err := s.Publish(t.Context(), "tiny:1", store.Publication{Layer: func(w io.Writer) (image.Descriptor, error) {
		return image.Write(w, entries, func(e image.Entry) (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(content[e.Path])), nil
		})
	}})
	if err != nil {
		t.Fatal(err)
	}
	return s, version
}

// Stack makes a store in dir with versions "tiny:1" to "tiny:4", each of one
// layer more than the one before: "tiny:3" needs a third of the lowest layer,
// "tiny:4" nothing of the second one.
func Stack(t testing.TB, dir string) (*store.Store, []store.Version) {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.Torrent = transport.NewTorrent
	const frame = 7 << 20 // nothing else gets into its frame
	var versions []store.Version
	var lower []oci.Layer
	for i, tree := range []*imagetest.Tree{
		imagetest.New().Dir("etc", "old", "usr").
			File("etc/motd", []byte("one\n")).Link("etc/motd.link", "etc/motd").File("etc/issue", []byte("issue\n")).
			File("old/b", imagetest.Noise(2, frame)).
			File("usr/a", imagetest.Noise(1, frame)).File("usr/c", imagetest.Noise(3, frame)),
		imagetest.New().Dir("etc", "usr").
			File("etc/motd", []byte("two\n")).Link("etc/motd.link", "etc/motd").Whiteout("etc/issue").
			Whiteout("old").File("usr/d", imagetest.Noise(4, 500_000)),
		imagetest.New().Dir("etc", "usr").
			Whiteout("etc/motd").File("usr/a", []byte("three\n")).Link("usr/e", "usr/a"),
		imagetest.New().Dir("etc", "usr").
			File("etc/motd.link", []byte("four\n")).File("usr/d", imagetest.Noise(5, 300_000)),
	} {
		v, err := s.Publish(t.Context(), fmt.Sprintf("tiny:%d", i+1), store.Publication{Lower: lower, Layer: func(w io.Writer) (image.Descriptor, error) {
			return image.Write(w, tree.Entries, tree.Open)
		}})
		if err != nil {
			t.Fatal(err)
		}
		versions, lower = append(versions, v), v.Layers
	}
	return s, versions
}

// Needed is how much of each layer of version an installation fetches: the
// pieces that the frames which are to be seen touch, and those of the index.
func Needed(t testing.TB, s *store.Store, version store.Version) (sizes []int64) {
	t.Helper()
	layers, done, err := s.Layers(t.Context(), version)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	view, err := image.ReadView(layers...)
	if err != nil {
		t.Fatal(err)
	}
	for at, l := range version.Layers {
		torrent, err := os.ReadFile(s.Path(l.Torrent))
		if err != nil {
			t.Fatal(err)
		}
		info, err := transport.ParseTorrent(torrent)
		if err != nil {
			t.Fatal(err)
		}
		frames, needed := view.Layers[at].Frames, view.Needed(at)
		touched, size := map[int64]bool{}, int64(0)
		touch := func(off, n int64) {
			for p := off / info.PieceLength; p <= (off+n-1)/info.PieceLength; p++ {
				if !touched[p] {
					touched[p] = true
					size += int64(info.PieceSize(int(p)))
				}
			}
		}
		touch(l.IndexOffset, l.IndexSize)
		for _, n := range needed {
			touch(frames[n].Offset, frames[n].Size)
		}
		if len(needed) == len(frames) {
			touch(0, l.Size)
		}
		sizes = append(sizes, size)
	}
	return sizes
}

// Script installs version and ends with reboot, or with a shell.
func Script(version store.Version) wire.Script {
	return wire.Script{
		Version: 1, ID: strings.Repeat("ab", 16), Node: "n1",
		Image:      wire.Image{Name: version.Name, Manifest: version.Manifest},
		Transports: []string{"bittorrent", "http"},
		Layout:     disklayout.Default(),
		Identity:   wire.Identity{Hostname: "n1", MachineID: strings.Repeat("cd", 16)},
		SeedFor:    60, Ending: wire.Reboot, OnFailure: wire.Shell,
	}
}

// A Machine installs into Root. Fail says what a step is to fail with.
type Machine struct {
	Root  string
	Room  install.Room
	Fail  map[string]error // "plan", "check", "partition", "fixup", "loader", "release"
	Panic string           // the step that panics
	Keeps bool             // its disk has the plan already, from an earlier start

	Calls []string
}

func (m *Machine) call(step string) error {
	m.Calls = append(m.Calls, step)
	if m.Panic == step {
		panic("machine: " + step)
	}
	return m.Fail[step]
}

// Plan plans a disk with Room, all of it root.
func (m *Machine) Plan(context.Context, wire.Script) (disklayout.Plan, install.Room, error) {
	return disklayout.Plan{}, m.Room, m.call("plan")
}

// Check does nothing.
func (m *Machine) Check(*image.View) error { return m.call("check") }

// Partition empties Root, as mkfs does, unless the machine Keeps it.
func (m *Machine) Partition(context.Context, disklayout.Plan) (string, error) {
	err := m.call("partition")
	if err == nil && !m.Keeps {
		err = errors.Join(os.RemoveAll(m.Root), os.MkdirAll(m.Root, 0o755))
	}
	return m.Root, err
}

// Fixup does nothing.
func (m *Machine) Fixup(context.Context, string, disklayout.Plan, wire.Identity) ([]string, error) {
	return []string{"hostname: n1"}, m.call("fixup")
}

// Loader does nothing.
func (m *Machine) Loader(context.Context, string, disklayout.Plan, wire.Identity) error {
	return m.call("loader")
}

// Release does nothing.
func (m *Machine) Release() error { return m.call("release") }

// A Network serves a store. It is its own source and its own swarm.
type Network struct {
	Store *store.Store
	Alter func(path string, b []byte) ([]byte, error) // what becomes of a file; nil: nothing
	Pass  func(layer wire.Digest, piece int) error    // asked before each piece; nil: all pass
	Alone time.Time                                   // until then somebody else is fetching
	Rsync *rsynctest.Daemon                           // has the files; nil: nobody has
	Sends bool                                        // files to a group, of which Alter is told the path /group/

	mu   sync.Mutex
	left bool
}

// Get reads a blob.
func (n *Network) Get(ctx context.Context, path string, limit int64) ([]byte, error) {
	digest, _, _ := strings.Cut(path[strings.LastIndexByte(path, '/')+1:], "?")
	f, err := n.Store.Blob(ctx, wire.Digest(digest))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > limit {
		return nil, fmt.Errorf("%d bytes, limit %d", f.Size(), limit)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
	if err == nil && n.Alter != nil {
		return n.Alter(path, b)
	}
	return b, err
}

// Hear is Get, where files are sent.
func (n *Network) Hear(ctx context.Context, file wire.Digest, limit int64) ([]byte, error) {
	if !n.Sends {
		return nil, errors.New("nothing is sent here")
	}
	return n.Get(ctx, "/group/"+string(file), limit)
}

// Join gives the network itself, as a source that is asked again.
func (n *Network) Join(_ *transport.Pieces, _ []string, patience time.Duration) (transport.Source, install.Swarm, error) {
	return &transport.Policy{Patience: patience, Steps: []transport.Step{{Name: "fake", Source: n, From: []transport.Origin{transport.FromPeer}}}}, n, nil
}

// Files fetches them from n's daemon, whatever the manifest.
func (n *Network) Files(ctx context.Context, _ wire.Digest, job rsync.Job) error {
	if n.Rsync == nil {
		return errors.New("no files here")
	}
	job.Dial, job.Module = n.Rsync.Dial, rsynctest.Module
	return rsync.Run(ctx, job)
}

func (n *Network) String() string { return "fake" }

// Peers is 1.
func (n *Network) Peers() int { return 1 }

// Incomplete is 1 until Alone.
func (n *Network) Incomplete() int {
	if time.Now().Before(n.Alone) {
		return 1
	}
	return 0
}

// Leave is remembered.
func (n *Network) Leave() { n.mu.Lock(); defer n.mu.Unlock(); n.left = true }

// Left says whether the swarm was left.
func (n *Network) Left() bool { n.mu.Lock(); defer n.mu.Unlock(); return n.left }

// Fetch reads the layer off the store, from its last piece on.
func (n *Network) Fetch(ctx context.Context, p *transport.Pieces) error {
	f, err := n.Store.Blob(ctx, p.Info().Layer)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		_, more := p.Since(0)
		piece, ok := p.Claim(func(i int) (int64, bool) { return int64(-i), true })
		if !ok {
			select {
			case <-p.Done():
				return nil
			case <-more:
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		b := make([]byte, p.Info().PieceSize(piece))
		_, err := f.ReadAt(b, int64(piece)*p.Info().PieceLength)
		if n.Pass != nil && err == nil {
			err = n.Pass(p.Info().Layer, piece)
		}
		if err == nil {
			err = p.Put(piece, b, transport.FromPeer)
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			p.Release(piece)
			return err
		}
	}
}

// A Reporter remembers.
type Reporter struct {
	mu      sync.Mutex
	events  []string
	Last    *wire.Transfer
	flushed int
}

func (r *Reporter) add(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, fmt.Sprintf(format, args...))
}

// Start remembers.
func (r *Reporter) Start(phase wire.Phase, _ string) { r.add("%s started", phase) }

// Progress is not remembered.
func (r *Reporter) Progress(wire.Phase, string, *wire.Transfer) {}

// Switch remembers.
func (r *Reporter) Switch(text string) { r.add("switched: %s", text) }

// Finish remembers.
func (r *Reporter) Finish(phase wire.Phase, _ string, t *wire.Transfer, err error) {
	if err != nil {
		r.add("%s failed: %v", phase, err)
		return
	}
	r.add("%s finished", phase)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Last = t
}

// LogText is the events.
func (r *Reporter) LogText() []byte {
	return []byte(strings.Join(r.Events(), "\n") + "\n")
}

// Flush remembers how many events there were.
func (r *Reporter) Flush(context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flushed = len(r.events)
	return nil
}

// Events are "phase state" lines.
func (r *Reporter) Events() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.events...)
}

// Told says whether Flush came after the last event.
func (r *Reporter) Told() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.flushed == len(r.events)
}

// Flip gives b with one bit of it changed.
func Flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)/2] ^= 1
	return b
}
