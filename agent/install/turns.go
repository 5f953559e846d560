package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"rookery/disklayout"
	"rookery/image/tree"
	"rookery/transport/rsync"
)

// byFiles is the transport that knows no pieces.
const byFiles = "rsync"

const (
	stall    = 20 * time.Second // without a new byte: it is the next one's turn
	patience = 10 * time.Minute // the same, whoever's turn it was: the end
)

// turns are the script's transports as they take turns. Those that fill in
// pieces and follow each other work together, and rsync works alone.
type turns struct {
	list  [][]string
	at    int
	said  []error   // why each gave up, when it did
	came  int64     // bytes of pieces, when it was anybody's turn for the last time
	alive time.Time // when there were new bytes, of pieces or of files
	filed bool      // rsync was at work
}

// takeTurns makes the list.
func takeTurns(transports []string) (list [][]string) {
	for i, name := range transports {
		last := len(list) - 1
		switch {
		case slices.Contains(transports[:i], name):
		case i > 0 && name != byFiles && list[last][0] != byFiles:
			list[last] = append(list[last], name)
		default:
			list = append(list, []string{name})
		}
	}
	return list
}

// files says whether it is rsync's turn.
func (t *turns) files() bool { return t.list[t.at][0] == byFiles }

// mayFile says whether it can come to that.
func (t *turns) mayFile() bool {
	return slices.ContainsFunc(t.list, func(names []string) bool { return names[0] == byFiles })
}

// pieces says whether anybody fills in pieces.
func (t *turns) pieces() bool { return len(t.list) > 1 || !t.mayFile() }

// order decides who takes turns here.
func (r *run) order() error {
	r.list = takeTurns(r.Script.Transports)
	if !r.mayFile() {
		return nil
	}
	_, err := exec.LookPath(rsync.Program)
	switch {
	case err != nil:
		err = fmt.Errorf("%w: pack it with rookery initramfs build --rsync", err)
	case r.Extract.Unprivileged:
		err = errors.New("only root can give files their owners")
	default:
		return nil
	}
	err = fmt.Errorf("transport rsync: %w", err)
	if !r.pieces() {
		return err
	}
	r.Log.Warn("plan: goes on without it", "err", err)
	r.list = takeTurns(slices.DeleteFunc(slices.Clone(r.Script.Transports), func(name string) bool { return name == byFiles }))
	return nil
}

// gaveUp is an error of sources, for which others may make up.
type gaveUp struct{ error }

func (g gaveUp) Unwrap() error { return g.error }

// untilDone does something again and again, each time when it is the next one's
// turn, until it works, nobody brings anything, or it fails for another reason.
func (r *run) untilDone(ctx context.Context, do func() error) error {
	for {
		err := do()
		if err == nil || !errors.As(err, new(gaveUp)) || ctx.Err() != nil {
			return err
		}
		if came := r.meter.pieces(); came > r.came {
			r.came, r.alive = came, time.Now()
		}
		if r.said == nil {
			r.said = make([]error, len(r.list))
		}
		r.said[r.at] = err
		if len(r.list) == 1 && !r.files() || time.Since(r.alive) >= patience {
			return errors.Join(r.said...)
		}
		before := strings.Join(r.list[r.at], ", ")
		r.stop(nil)
		r.at = (r.at + 1) % len(r.list)
		if len(r.list) > 1 {
			now := strings.Join(r.list[r.at], ", ")
			r.Report.Switch(fmt.Sprintf("%s takes over from %s: %s", now, before, strings.ReplaceAll(err.Error(), "\n", "; ")))
		}
		if !r.files() || r.view == nil {
			r.begin(ctx)
		}
	}
}

const (
	firstRest = time.Second
	longRest  = 8 * time.Second
)

// copy makes the root equal to the image by rsync, which sends no file again
// that is there, and compares it then.
func (r *run) copy(ctx context.Context) error {
	r.filed = true
	r.meter.copy(r.view.Size())
	var written atomic.Bool // a byte of a file; what a daemon says besides is nothing new
	job := rsync.Job{Dir: r.root, Work: StagingDir, Stay: stays(r.plan), Silent: stall, Received: r.meter.receive, Written: func(n int64) {
		if n > 0 {
			written.Store(true)
		}
		r.meter.write(n)
	}}
	rest, quiet := firstRest, time.Now()
	for {
		written.Store(false)
		err := r.Network.Files(ctx, r.Script.Image.Manifest, job)
		if err == nil {
			r.meter.write(r.view.Size())
			return r.compare(ctx)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err = fmt.Errorf("rsync: %w", err)
		if errors.Is(err, unix.ENOSPC) {
			return err
		}
		switch {
		case errors.Is(err, rsync.ErrBusy):
			r.alive = time.Now() // others get on
		case written.Load() && !errors.Is(err, rsync.ErrPartial):
			rest, quiet, r.alive = firstRest, time.Now(), time.Now()
		}
		if time.Since(quiet) >= stall {
			r.meter.extract()
			return gaveUp{err}
		}
		r.Log.Warn("fetch: trying on", "err", err, "pause", rest)
		select {
		case <-time.After(rest):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		rest = min(2*rest, longRest)
	}
}

// stays are the paths below the root that are there without the image: where
// filesystems are mounted, and what mkfs makes.
func stays(plan disklayout.Plan) []string {
	list := []string{lostFound}
	for _, p := range plan.Mounts() {
		if p.Mount == "/" {
			continue
		}
		point := strings.TrimPrefix(p.Mount, "/")
		list = append(list, path.Join(point, lostFound))
		for ; point != "."; point = path.Dir(point) {
			list = append(list, point)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// compare says in what the root differs from the image, which the script's
// signature stands for: rsync's daemon is not believed.
func (r *run) compare(ctx context.Context) error {
	excludes, err := tree.ParseExcludes("staging", strings.NewReader("/"+StagingDir+"\n"))
	if err != nil {
		return err
	}
	changes, err := tree.Verify(ctx, r.view, r.root, excludes)
	if err != nil {
		return fmt.Errorf("compare with the image: %w", err)
	}
	root, err := os.OpenRoot(r.root)
	if err != nil {
		return err
	}
	defer root.Close()
	changes = slices.DeleteFunc(changes, func(c tree.Change) bool {
		info, err := root.Lstat(c.Path)
		return err == nil && meant(c, info.Mode(), r.plan)
	})
	if len(changes) == 0 {
		return nil
	}
	c := changes[0]
	return fmt.Errorf("%d files are not as the image has them, the first is %q: %s", len(changes), c.Path, strings.Join(append([]string{c.Kind}, c.What...), " "))
}

// meant says whether a difference between an installed root, which has a file of
// that mode there, and its image is as it has to be. A FAT filesystem keeps names
// and contents.
func meant(c tree.Change, mode fs.FileMode, plan disklayout.Plan) bool {
	if c.Kind == "added" {
		if c.Path == LogFile { // of an earlier attempt
			return mode == mode.Perm()
		}
		return mode.IsDir() && (slices.Contains(stays(plan), c.Path) || strings.HasPrefix(LogFile, c.Path+"/"))
	}
	if c.Kind != "changed" || slices.ContainsFunc(c.What, func(w string) bool { return w == "content" || w == "type" }) {
		return false
	}
	on, kept := "", disklayout.FS("")
	for _, p := range plan.Mounts() {
		point := strings.TrimPrefix(p.Mount, "/")
		if (point == "" || c.Path == point || strings.HasPrefix(c.Path, point+"/")) && len(point) >= len(on) {
			on, kept = point, p.FS
		}
	}
	return kept == disklayout.VFAT
}
