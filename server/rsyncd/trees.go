package rsyncd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/store"
	"rookery/wire"
)

// A tree is a version as files.
type tree struct {
	ready bool
	name  string       // of the version
	alias string       // of its module, for people; the digits where another version has that name
	asked time.Time    // for the last time
	read  atomic.Int64 // bytes of layers, while it is being made
	total int64
	err   error // why it could not be made
}

// Places below Dir. A tree is in a directory of its own, whose time says when it
// was asked for: that of the tree is the image's.
const (
	configFile = "rsyncd.conf"
	treeDir    = "tree"
	nameFile   = "name"  // of the version
	unfinished = ".new-" // and then the digits
	unneeded   = ".old-" // the same
)

func (s *Server) config() string { return filepath.Join(s.Dir, configFile) }

func (s *Server) path(d wire.Digest) string { return filepath.Join(s.Dir, d.Hex()) }

// open finds the trees that an earlier server made, and what it did not finish.
func (s *Server) open() error {
	// Trees have programs that run as root; no user of this machine is to reach them.
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(s.Dir, 0o700); err != nil {
		return err
	}
	names, err := os.ReadDir(s.Dir)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begin()
	for _, n := range names {
		d := wire.Digest("sha256:" + n.Name())
		switch {
		case strings.HasPrefix(n.Name(), unfinished), strings.HasPrefix(n.Name(), unneeded):
			if err := os.RemoveAll(filepath.Join(s.Dir, n.Name())); err != nil {
				return err
			}
		case d.Check() == nil:
			info, err := n.Info()
			if err != nil {
				return err
			}
			name, err := os.ReadFile(filepath.Join(s.path(d), nameFile))
			if errors.Is(err, os.ErrNotExist) { // somebody removed it, or the disk lost it
				if err := os.RemoveAll(s.path(d)); err != nil {
					return err
				}
				continue
			}
			if err != nil {
				return err
			}
			s.trees[d] = &tree{ready: true, name: string(name), asked: info.ModTime()}
		}
	}
	return s.configure()
}

// begin is for who comes first, with mu held.
func (s *Server) begin() {
	if s.trees == nil {
		s.trees, s.wake = map[wire.Digest]*tree{}, make(chan struct{}, 1)
	}
}

// configure writes the daemon's configuration, with mu held.
func (s *Server) configure() error {
	var modules []module
	names := map[string]bool{}
	var digests []wire.Digest
	for d, t := range s.trees {
		if t.ready {
			digests = append(digests, d)
		}
	}
	slices.Sort(digests)
	for _, d := range digests {
		path := filepath.Join(s.path(d), treeDir)
		modules = append(modules, module{d.Hex(), path})
		t := s.trees[d]
		t.alias = d.Hex()
		if name := moduleName(t.name); !names[name] { // a-1:2 has the same as a:1-2
			names[name] = true
			t.alias = name
			modules = append(modules, module{name, path})
		}
	}
	beside := s.config() + ".new"
	if err := os.WriteFile(beside, []byte(configuration(s.Dir, modules)), 0o600); err != nil {
		return err
	}
	return os.Rename(beside, s.config())
}

// moduleName is a version's name as that of a module: "debian12-4".
func moduleName(version string) string { return strings.Replace(version, ":", "-", 1) }

// Tree says where the files of a version are, and has them made when they are not
// there. ErrNotFound of the image store when there is no such version.
func (s *Server) Tree(ctx context.Context, manifest wire.Digest) (wire.Tree, error) {
	v, err := s.version(ctx, manifest)
	if err != nil {
		return wire.Tree{}, err
	}
	answer := wire.Tree{Address: s.Address.String(), Port: port(s.Plain), TLSPort: port(s.TLS), SSHPort: port(s.SSH), Total: v.Size}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begin()
	t := s.trees[manifest]
	switch {
	case t == nil:
		s.trees[manifest] = &tree{name: v.Name, asked: time.Now(), total: v.Size}
		select {
		case s.wake <- struct{}{}:
		default:
		}
		return answer, nil
	case t.err != nil:
		delete(s.trees, manifest) // who asks again has it tried again
		return wire.Tree{}, fmt.Errorf("rsync: tree of %s: %w", v.Name, t.err)
	case !t.ready:
		answer.Done = t.read.Load()
		return answer, nil
	}
	t.asked = time.Now()
	if err := os.Chtimes(s.path(manifest), t.asked, t.asked); err != nil {
		return wire.Tree{}, err
	}
	answer.Module, answer.Name, answer.Done = manifest.Hex(), t.alias, v.Size
	return answer, nil
}

func port(ln net.Listener) int {
	if ln == nil {
		return 0
	}
	return ln.Addr().(*net.TCPAddr).Port
}

func (s *Server) version(ctx context.Context, manifest wire.Digest) (store.Version, error) {
	versions, err := s.Store.List(ctx)
	if err != nil {
		return store.Version{}, err
	}
	for _, v := range versions {
		if v.Manifest == manifest {
			return v, v.Err
		}
	}
	return store.Version{}, fmt.Errorf("image with manifest %s: %w", manifest, store.ErrNotFound)
}

// make makes trees that were asked for, one at a time, until ctx ends.
func (s *Server) make(ctx context.Context) {
	for {
		d, t := s.next()
		if t == nil {
			select {
			case <-ctx.Done():
				return
			case <-s.wake:
			}
			continue
		}
		began := time.Now()
		err := s.checkout(ctx, d, t)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		if err == nil {
			t.ready = true
			if err = s.configure(); err != nil {
				t.ready = false
			}
		}
		t.err = err
		s.mu.Unlock()
		if err != nil {
			s.Log.Error("rsync: tree not made", "image", t.name, "err", err)
			continue
		}
		s.Log.Info("rsync: tree made", "image", t.name, "seconds", time.Since(began).Seconds())
	}
}

// next is a tree that is to be made, or nil.
func (s *Server) next() (wire.Digest, *tree) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, t := range s.trees {
		if !t.ready && t.err == nil {
			return d, t
		}
	}
	return "", nil
}

const (
	blockSize = 4096
	// spare is what trees leave free, in bytes: the server's records and its
	// images are mostly on the same filesystem.
	spare = 256 << 20
)

// checkout writes a version's files beside, and puts them into place when all
// are on the disk.
func (s *Server) checkout(ctx context.Context, d wire.Digest, t *tree) error {
	v, err := s.version(ctx, d)
	if err != nil {
		return err
	}
	layers, closeAll, err := s.Store.Layers(ctx, v)
	if err != nil {
		return err
	}
	defer closeAll()
	view, err := image.ReadView(layers...)
	if err != nil {
		return err
	}
	// Whoever can reach this server can have its trees made.
	bytes, _ := view.Room(blockSize)
	if err := image.CheckFree(s.Dir, bytes+spare); err != nil {
		return err
	}
	for i := range layers {
		layers[i].Bytes = counted{layers[i].Bytes, &t.read}
	}
	beside := filepath.Join(s.Dir, unfinished+d.Hex())
	if err := os.RemoveAll(beside); err != nil { // of an attempt before
		return err
	}
	defer os.RemoveAll(beside)
	if err := os.MkdirAll(filepath.Join(beside, treeDir), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(beside, nameFile), []byte(v.Name), 0o600); err != nil {
		return err
	}
	if _, err := image.Extract(ctx, filepath.Join(beside, treeDir), image.Options{}, layers...); err != nil {
		return err
	}
	if err := flush(beside); err != nil {
		return err
	}
	if err := os.RemoveAll(s.path(d)); err != nil { // made before, and then the configuration could not be written
		return err
	}
	return os.Rename(beside, s.path(d))
}

// flush has the filesystem of dir write everything down.
func flush(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("%s: sync: %w", dir, err)
	}
	return nil
}

type counted struct {
	io.ReaderAt
	read *atomic.Int64
}

func (c counted) ReadAt(b []byte, off int64) (int, error) {
	n, err := c.ReaderAt.ReadAt(b, off)
	c.read.Add(int64(n))
	return n, err
}

const (
	tidyEvery = time.Minute
	inUse     = time.Hour      // since it was asked for: somebody may be fetching it
	idle      = 24 * time.Hour // the same: nobody wants it any more
)

// stays says whether a tree stays that was asked for so long ago.
func stays(published, needed bool, asked time.Duration) bool {
	return asked < inUse || published && (needed || asked < idle)
}

// tidy removes trees that nobody needs, until ctx ends.
func (s *Server) tidy(ctx context.Context) {
	tick := time.NewTicker(tidyEvery)
	defer tick.Stop()
	for {
		if err := s.remove(ctx, time.Now()); err != nil && ctx.Err() == nil {
			s.Log.Error("rsync: trees that nobody needs stay", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Server) remove(ctx context.Context, now time.Time) error {
	versions, err := s.Store.List(ctx)
	if err != nil {
		return err
	}
	needed, err := s.Needed(ctx)
	if err != nil {
		return err
	}
	published := map[wire.Digest]bool{}
	for _, v := range versions {
		published[v.Manifest] = true
	}
	var gone []wire.Digest
	s.mu.Lock()
	for d, t := range s.trees {
		if t.ready && !stays(published[d], needed[d], now.Sub(t.asked)) {
			gone = append(gone, d)
			delete(s.trees, d)
		}
	}
	if len(gone) > 0 {
		err = s.configure()
	}
	// Renamed first: what is removed in part is not found by the next server.
	for _, d := range gone {
		err = errors.Join(err, os.Rename(s.path(d), filepath.Join(s.Dir, unneeded+d.Hex())))
	}
	s.mu.Unlock()
	for _, d := range gone {
		s.Log.Info("rsync: tree removed", "manifest", d)
		err = errors.Join(err, os.RemoveAll(filepath.Join(s.Dir, unneeded+d.Hex())))
	}
	return err
}
