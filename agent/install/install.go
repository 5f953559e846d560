// Package install carries out one install script on one machine: the whole
// story, from the plan to the ending, as a list of steps.
package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"rookery/disklayout"
	"rookery/image"
	"rookery/image/oci"
	"rookery/transport"
	"rookery/transport/rsync"
	"rookery/wire"
)

// A Machine is what the story happens to. Before Partition nothing is changed.
type Machine interface {
	// Plan fits the script's layout to the disks, checks that what the plan
	// needs is here, and says what the root filesystem will hold.
	Plan(ctx context.Context, s wire.Script) (disklayout.Plan, Room, error)
	// Check says what an image lacks for this machine.
	Check(view *image.View) error
	// Partition carries the plan out and mounts it: the root to install into.
	Partition(ctx context.Context, plan disklayout.Plan) (root string, err error)
	// Fixup makes the copy a machine of its own: a line for each thing done.
	Fixup(ctx context.Context, root string, plan disklayout.Plan, id wire.Identity) ([]string, error)
	// Loader makes the root bootable.
	Loader(ctx context.Context, root string, plan disklayout.Plan, id wire.Identity) error
	// Release unmounts what Partition mounted, if anything.
	Release() error
}

// Room is what a filesystem holds. No Inodes means any number.
type Room struct{ Bytes, Inodes int64 }

// ErrElsewhere is when something else than the server has not given what the server
// says it does: a node, or a group.
var ErrElsewhere = errors.New("not from the server itself")

// A Network is where the image comes from. Nothing it gives is believed.
type Network interface {
	// Get fetches a file of the server, at most limit bytes. The error is ErrElsewhere when
	// the server named a node for it and that did not give it.
	Get(ctx context.Context, path string, limit int64) ([]byte, error)
	// Hear fetches a file that the server sends to all who want it now. The error is
	// ErrElsewhere when the server says so and nothing comes.
	Hear(ctx context.Context, file wire.Digest, limit int64) ([]byte, error)
	// Join gives the ways to fill in pieces, and the swarm, or nil when there
	// is none. With rsync alone they are for the index. The source gives up
	// after patience without a new byte; 0 is its default.
	Join(p *transport.Pieces, transports []string, patience time.Duration) (transport.Source, Swarm, error)
	// Files makes a directory equal to the image of a manifest, by rsync. The
	// job has all that is not the network's to know.
	Files(ctx context.Context, manifest wire.Digest, job rsync.Job) error
}

// A Swarm is the others who exchange the pieces of a layer.
type Swarm interface {
	Peers() int      // connected
	Incomplete() int // that still fetch
	Leave()
}

// A Reporter hears what happens. It never holds the story up but in Flush,
// which returns when the server has everything.
type Reporter interface {
	Start(phase wire.Phase, text string)
	Progress(phase wire.Phase, text string, t *wire.Transfer)
	Switch(text string) // says how the phase goes on, and why
	Finish(phase wire.Phase, text string, t *wire.Transfer, err error)
	LogText() []byte
	Flush(ctx context.Context) error
}

// An Install is one script, one machine and what connects them.
type Install struct {
	Script  wire.Script // verified
	Machine Machine
	Network Network
	Report  Reporter
	Log     *slog.Logger

	Extract image.Options
	Workers int           // that extract; 0: one for each processor, up to maxWorkers
	Memory  int64         // bytes of pieces kept before there is a filesystem; 0: 64 MiB
	Flush   time.Duration // to wait for the server's receipt at the end; 0: 10 minutes
}

// maxWorkers bounds memory: an Extractor writes no more frames of 8 MiB than that
// at a time, and each worker holds one that is compressed.
const maxWorkers = 4

// StagingDir is the directory of the new root that holds pieces while the
// installation goes on.
const StagingDir = ".rookery"

// LogFile is where the installed system finds the log of its installation.
const LogFile = "var/log/rookery/install.log"

// run is the state of one installation.
type run struct {
	*Install
	plan   disklayout.Plan
	room   Room
	root   string
	stack  []*layer // lowest first
	layers []*layer // each once
	view   *image.View
	meter  meter
	failed []string // ways in which torrent files do not come

	turns
	fetching sync.WaitGroup
	hope     context.Context // ends with the fetching of any layer that fails
	stop     context.CancelCauseFunc
}

// Run carries the script out and returns how the machine is to end: the
// script's Ending, or its OnFailure with the error that led to it. It returns
// when the server knows.
func (in *Install) Run(ctx context.Context) (wire.Ending, error) {
	r := &run{Install: in}
	err := r.story(ctx)
	if err != nil {
		r.giveUp()
	}
	// The receipt is awaited even when ctx ended: somebody is to know.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), orDefault(in.Flush, 10*time.Minute))
	defer cancel()
	if e := in.Report.Flush(ctx); e != nil {
		in.Log.Warn("end: the server was not told", "err", e)
	}
	if err != nil {
		return in.Script.OnFailure, err
	}
	return in.Script.Ending, nil
}

func (r *run) story(ctx context.Context) error {
	for _, step := range []struct {
		phase wire.Phase
		do    func(context.Context) (done string, err error)
	}{
		{wire.PhasePlan, r.preparation},
		{wire.PhasePartition, r.partition},
		{wire.PhaseFetch, r.fetch},
		{wire.PhaseFixup, r.fixup},
		{wire.PhaseLoader, r.loader},
		{wire.PhaseLinger, r.linger},
		{wire.PhaseEnd, r.end},
	} {
		r.Report.Start(step.phase, "")
		done, err := r.watched(ctx, step.phase, step.do)
		r.Report.Finish(step.phase, done, r.meter.read(), err)
		switch prefix := string(step.phase) + ": "; {
		case err == nil:
		case strings.HasPrefix(err.Error(), prefix): // fixup and loader name themselves
			return err
		default:
			return fmt.Errorf("%s%w", prefix, err)
		}
	}
	return nil
}

// watched runs one step, reports the transfer meanwhile, and takes a panic
// for a failure: a machine has to end in a known state.
func (r *run) watched(ctx context.Context, phase wire.Phase, do func(context.Context) (string, error)) (done string, err error) {
	ended := make(chan struct{})
	var ticker sync.WaitGroup
	ticker.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if t := r.meter.read(); t != nil {
					r.Report.Progress(phase, "", t)
				}
			case <-ended:
				return
			}
		}
	})
	defer ticker.Wait()
	defer close(ended)
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
			r.Log.Error("panic", "phase", phase, "stack", string(debug.Stack()))
		}
	}()
	if err := ctx.Err(); err != nil {
		return "", context.Cause(ctx)
	}
	return do(ctx)
}

// preparation is everything that can be known before a disk is touched: what
// the image is and who has it, what the disks are, and that one fits the other.
func (r *run) preparation(ctx context.Context) (string, error) {
	plan, room, err := r.Machine.Plan(ctx, r.Script)
	if err != nil {
		return "", err
	}
	r.plan, r.room = plan, room
	if plan.Disk.Path != "" {
		for _, line := range plan.Describe() {
			r.Log.Info("plan: " + line)
		}
	}
	if err := r.order(); err != nil {
		return "", err
	}
	if err := r.image(ctx); err != nil {
		return "", fmt.Errorf("image %s: %w", r.Script.Image.Name, err)
	}
	if err := r.join(ctx); err != nil {
		return "", err
	}
	err = r.untilDone(ctx, func() (err error) { r.view, err = r.readIndexes(ctx); return err })
	if err != nil {
		return "", fmt.Errorf("image %s: %w", r.Script.Image.Name, err)
	}
	staged := int64(0)
	if r.pieces() {
		for _, l := range r.layers {
			l.want(r.view)
		}
		staged = r.meter.read().Total
	}
	if r.files() {
		r.stop(nil) // that was for the index
	}
	err = fits(r.view, staged, r.room)
	if err == nil && slices.Contains(r.view.Names("."), StagingDir) {
		err = fmt.Errorf("it has an entry %s, which is where pieces are kept and goes at the end", StagingDir)
	}
	if err == nil {
		err = r.Machine.Check(r.view)
	}
	if err != nil {
		return "", fmt.Errorf("image %s: %w", r.Script.Image.Name, err)
	}
	where := "a directory"
	if plan.Disk.Path != "" {
		where = fmt.Sprintf("%s (%d bytes)", plan.Disk.Path, plan.Disk.Size)
	}
	return fmt.Sprintf("%s, %d bytes in %d entries and %d layers, on %s",
		r.Script.Image.Name, r.view.Size(), len(r.view.Entries), len(r.stack), where), nil
}

const (
	ourInodes = 256  // of the staging, the fixups and the log
	blockSize = 4096 // of what mke2fs makes, but for small ones
)

// fits says whether a root filesystem holds the image and, for a while, what
// is fetched of its layers. ext4 keeps about a twentieth to itself.
func fits(view *image.View, staging int64, room Room) error {
	bytes, inodes := view.Room(blockSize)
	if usable := room.Bytes / 20 * 19; bytes+staging > usable {
		return fmt.Errorf("root filesystem has room for %d bytes, the image needs %d and %d while it is fetched: %w",
			usable, bytes, staging, disklayout.ErrTooSmall)
	}
	if inodes += ourInodes; room.Inodes > 0 && inodes > room.Inodes {
		return fmt.Errorf("root filesystem has %d inodes, the image needs %d: %w", room.Inodes, inodes, disklayout.ErrTooSmall)
	}
	return nil
}

// image follows the digests from the script to the torrents.
func (r *run) image(ctx context.Context) error {
	manifest, err := r.get(ctx, wire.PathManifests, r.Script.Image.Manifest, oci.MaxManifest)
	if err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	_, layers, err := oci.ParseManifest(manifest)
	if err != nil {
		return err
	}
	memory := &budget{}
	memory.give(orDefault(r.Memory, 64<<20))
	known := map[wire.Digest]*layer{}
	for at, of := range layers {
		l := known[of.Digest]
		if l == nil {
			l = &layer{Layer: of}
			info, err := r.torrent(ctx, of)
			if err != nil {
				return fmt.Errorf("layer %d: %w", at, err)
			}
			// The index first, into memory until there is a disk; what else is
			// needed, the indexes of all layers say together. Of a single layer
			// everything is, unless it comes as files.
			l.spool = newSpool(info.PieceLength, memory, of.IndexOffset, of.IndexSize)
			l.pieces = transport.NewPieces(info, l.spool)
			l.pieces.Prefer(of.IndexOffset, of.IndexSize)
			if len(layers) > 1 || r.mayFile() {
				l.pieces.Hold()
			}
			known[of.Digest] = l
			r.layers = append(r.layers, l)
		}
		l.at = append(l.at, at)
		r.stack = append(r.stack, l)
	}
	return nil
}

func (r *run) torrent(ctx context.Context, l oci.Layer) (transport.Info, error) {
	torrent, err := r.file(ctx, l.Torrent)
	if err != nil {
		return transport.Info{}, fmt.Errorf("torrent: %w", err)
	}
	info, err := transport.ParseTorrent(torrent)
	if err != nil {
		return transport.Info{}, err
	}
	if info.Layer != l.Digest || info.Length != l.Size {
		return transport.Info{}, fmt.Errorf("torrent is for %s of %d bytes, manifest says %s of %d bytes",
			info.Layer, info.Length, l.Digest, l.Size)
	}
	return info, nil
}

// file fetches a torrent file in the ways in which the layer's pieces come, in their
// order: from a group, and from whom the server names. What went wrong once is not tried
// again: the server gives it, too.
func (r *run) file(ctx context.Context, torrent wire.Digest) ([]byte, error) {
	if err := torrent.Check(); err != nil {
		return nil, err
	}
	ways := map[string]func() ([]byte, error){
		"multicast": func() ([]byte, error) { return r.Network.Hear(ctx, torrent, transport.MaxTorrent) },
		"bittorrent": func() ([]byte, error) {
			return r.Network.Get(ctx, wire.PathTorrents+string(torrent)+"?"+wire.FromNodes, transport.MaxTorrent)
		},
	}
	for _, name := range r.Script.Transports {
		way := ways[name]
		if way == nil {
			break
		}
		if slices.Contains(r.failed, name) {
			continue
		}
		b, err := way()
		if err == nil {
			if err = torrent.Verify(b); err == nil {
				return b, nil
			}
			err = fmt.Errorf("%w: %w", ErrElsewhere, err)
		}
		if errors.Is(err, ErrElsewhere) {
			r.failed = append(r.failed, name)
		}
		r.Log.Info("the torrent file comes in another way", "not", name, "err", err)
	}
	return r.get(ctx, wire.PathTorrents, torrent, transport.MaxTorrent)
}

// get fetches what a digest names, and nothing else. A server that is just
// being started again is asked for a while.
func (r *run) get(ctx context.Context, path string, digest wire.Digest, limit int64) ([]byte, error) {
	if err := digest.Check(); err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		b, err := r.Network.Get(ctx, path+string(digest), limit)
		if err == nil {
			err = digest.Verify(b)
		}
		if err == nil || ctx.Err() != nil || try == 10 {
			return b, err
		}
		r.Log.Warn("asking again", "path", path+string(digest), "err", err)
		select {
		case <-time.After(time.Duration(try) * time.Second):
		case <-ctx.Done():
		}
	}
}

// join makes the sources of each turn, and begins with the first. Those of
// which none can be used here have no turn.
func (r *run) join(ctx context.Context) error {
	var usable [][]string
	var errs []error
	for _, names := range r.list {
		if err := r.joinAll(names); err != nil {
			errs = append(errs, err)
			continue
		}
		usable = append(usable, names)
	}
	if len(usable) == 0 {
		return errors.Join(errs...)
	}
	for _, err := range errs {
		r.Log.Warn("plan: goes on without", "err", err)
	}
	r.list = usable
	r.meter.watch(r.layers)
	r.alive = time.Now()
	r.begin(ctx)
	return nil
}

// joinAll makes the sources of one turn, for all layers.
func (r *run) joinAll(names []string) error {
	patience := time.Duration(0)
	if len(r.list) > 1 || r.mayFile() {
		patience = stall * time.Duration(len(names)) // each has its time
	}
	for _, l := range r.layers {
		source, swarm, err := r.Network.Join(l.pieces, names, patience)
		if err != nil {
			return err
		}
		l.sources = append(l.sources, source)
		if swarm != nil {
			l.swarm = swarm
		}
	}
	return nil
}

// begin has the sources whose turn it is fetch all layers.
func (r *run) begin(ctx context.Context) {
	hope, stop := context.WithCancelCause(ctx)
	r.hope, r.stop = hope, stop
	for _, l := range r.layers {
		source := l.sources[r.at]
		r.fetching.Go(func() {
			err := source.Fetch(hope, l.pieces)
			if err == nil {
				return
			}
			err = fmt.Errorf("layer %d: %w", l.at[0], err)
			if !errors.Is(err, transport.ErrStorage) { // for which no other source helps
				err = gaveUp{err}
			}
			stop(err) // the first one counts
		})
	}
}

// readIndexes waits for the indexes, or for the end of all hope of one.
func (r *run) readIndexes(ctx context.Context) (*image.View, error) {
	err := r.orFetchFails(ctx, func(ctx context.Context) error {
		for _, l := range r.layers {
			if err := l.pieces.Wait(ctx, l.IndexOffset, l.IndexSize); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	layers := make([]image.Layer, len(r.stack))
	for at, l := range r.stack {
		layers[at] = image.Layer{Descriptor: l.Descriptor, Bytes: l.pieces}
	}
	return image.ReadView(layers...)
}

// orFetchFails runs wait, which waits for pieces, until the fetching fails.
func (r *run) orFetchFails(ctx context.Context, wait func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(r.hope, func() { cancel(context.Cause(r.hope)) })()
	err := wait(ctx)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (r *run) partition(ctx context.Context) (string, error) {
	root, err := r.Machine.Partition(ctx, r.plan)
	if err == nil {
		r.root = root // otherwise nothing is mounted there
	}
	return "", err
}

// fetch makes the root the image, with the sources whose turn it is.
func (r *run) fetch(ctx context.Context) (_ string, err error) {
	defer func() {
		if errors.Is(err, unix.ENOSPC) {
			err = fmt.Errorf("%w: %w", err, full(r.root))
		}
	}()
	if err := r.stage(); err != nil {
		return "", fmt.Errorf("staging: %w", err)
	}
	err = r.untilDone(ctx, func() error {
		if r.files() {
			return r.copy(ctx)
		}
		return r.extract(ctx)
	})
	if err != nil {
		return "", err
	}
	t := r.meter.read()
	return fmt.Sprintf("%s: %d bytes from the server, %d from other nodes", r.Script.Image.Name, t.FromServer, t.FromPeers), nil
}

// extract writes every frame as soon as its pieces are there.
func (r *run) extract(ctx context.Context) error {
	x, err := image.NewExtractor(r.root, r.view, r.Extract)
	if err != nil {
		return err
	}
	defer x.Close()
	workers := r.Workers
	if workers < 1 {
		workers = min(runtime.NumCPU(), maxWorkers)
	}
	err = r.orFetchFails(ctx, func(ctx context.Context) error { return extract(ctx, r.layers, x, workers) })
	if err == nil {
		err = x.Finish()
	}
	if err != nil {
		return err
	}
	if skipped := x.Skipped(); skipped != (image.Skipped{}) {
		r.Log.Warn("not as root: left out", "owners", skipped.Owners, "devices", skipped.Devices, "xattrs", skipped.Xattrs)
	}
	if r.filed { // it may have left what no frame replaces
		return r.compare(ctx)
	}
	return nil
}

// full says how full a filesystem is that has no room for more.
func full(root string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return err
	}
	return fmt.Errorf("%s has %d of %d bytes and %d of %d inodes left",
		root, int64(st.Bavail)*st.Bsize, int64(st.Blocks)*st.Bsize, st.Ffree, st.Files)
}

// stage moves the pieces from memory into files on the filesystem, which have
// the pieces that an installation before this one left there.
func (r *run) stage() error {
	dir := filepath.Join(r.root, StagingDir)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if st, err := os.Lstat(dir); err != nil {
		return err
	} else if !st.IsDir() { // a link would have us write elsewhere
		return fmt.Errorf("%s is there and no directory", dir)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, file := range left { // of another version, or of rsync
		if file.Name() == rsync.Partial {
			r.filed = true // nobody has compared what it brought
			continue
		}
		if !slices.ContainsFunc(r.layers, func(l *layer) bool { return l.Digest.Hex() == file.Name() }) {
			if err := os.RemoveAll(filepath.Join(dir, file.Name())); err != nil {
				return err
			}
		}
	}
	for _, l := range r.layers {
		f, err := os.OpenFile(filepath.Join(dir, l.Digest.Hex()), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		info := l.pieces.Info()
		kept := kept(f, info)
		if err := l.spool.attach(f); err != nil {
			return err
		}
		l.pieces.Found(kept...)
		if len(kept) > 0 {
			r.Log.Info("fetch: pieces were there already", "layer", l.at[0], "pieces", len(kept), "of", len(info.Hashes))
		}
	}
	return nil
}

func (r *run) fixup(ctx context.Context) (string, error) {
	did, err := r.Machine.Fixup(ctx, r.root, r.plan, r.Script.Identity)
	return fmt.Sprintf("%d done", len(did)), err
}

func (r *run) loader(ctx context.Context) (string, error) {
	return "", r.Machine.Loader(ctx, r.root, r.plan, r.Script.Identity)
}

// linger serves the others while there are any who still fetch.
func (r *run) linger(ctx context.Context) (string, error) {
	limit := time.NewTimer(time.Duration(r.Script.SeedFor) * time.Second)
	defer limit.Stop()
	look := time.NewTicker(500 * time.Millisecond)
	defer look.Stop()
	for {
		wanted := func(l *layer) bool { return l.swarm != nil && l.swarm.Incomplete() > 0 }
		if r.Script.SeedFor == 0 || !slices.ContainsFunc(r.layers, wanted) {
			return "nobody else is fetching", nil
		}
		select {
		case <-look.C:
		case <-limit.C:
			return fmt.Sprintf("others are still fetching after %d s, the script's limit", r.Script.SeedFor), nil
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

// end leaves the machine as it is to start: nothing of ours is on it but the
// log, and everything is on the disk.
func (r *run) end(context.Context) (string, error) {
	r.leave()
	if err := os.RemoveAll(filepath.Join(r.root, StagingDir)); err != nil {
		return "", fmt.Errorf("staging: %w", err)
	}
	if err := r.saveLog(); err != nil {
		return "", fmt.Errorf("log: %w", err)
	}
	if err := r.Machine.Release(); err != nil {
		return "", err
	}
	return string(r.Script.Ending), nil
}

// leave ends the exchange of pieces and closes where they are.
func (r *run) leave() {
	for _, l := range r.layers {
		l.spool.close() // first: who waits for room in it is let go
	}
	if r.stop != nil {
		r.stop(nil)
	}
	r.fetching.Wait()
	for _, l := range r.layers {
		if l.swarm != nil {
			l.swarm.Leave()
		}
	}
}

// giveUp is end for a story that went wrong: what can be kept is kept.
func (r *run) giveUp() {
	r.leave()
	if r.root != "" {
		if err := r.saveLog(); err != nil {
			r.Log.Warn("log not saved", "err", err)
		}
	}
	if err := r.Machine.Release(); err != nil {
		r.Log.Warn("release", "err", err)
	}
}

// saveLog writes below the root alone: the image may have a link in the way.
func (r *run) saveLog() error {
	root, err := os.OpenRoot(r.root)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.MkdirAll(filepath.Dir(LogFile), 0o755); err != nil {
		return err
	}
	return root.WriteFile(LogFile, r.Report.LogText(), 0o640)
}

func orDefault[T int64 | time.Duration](v, otherwise T) T {
	if v == 0 {
		return otherwise
	}
	return v
}
