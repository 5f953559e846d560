package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"rookery/image"
	"rookery/image/tree"
)

// image measures layers: their size, how fast they are written and extracted, and
// what publishing a tree again costs. main and upgraded are tarballs of one tree
// before and after an upgrade, small is of another.
func (r *runner) image(main, upgraded, small string) ([]row, error) {
	if runtime.NumCPU() < 2 {
		return nil, errors.New("needs two cores")
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	for _, tarball := range []string{main, upgraded, small} {
		dir := r.path(base(tarball))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		if err := r.run("tar", "-xpf", tarball, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", dir); err != nil {
			return nil, err
		}
	}
	dir := r.path(base(main))
	layer, tarzst := r.path("layer"), r.path("tar.zst")
	wrote, _, err := r.time(self, "child", "write", dir, layer)
	if err != nil {
		return nil, err
	}
	packed, _, err := r.time("tar", "--zstd", "--numeric-owner", "--xattrs", "-cf", tarzst, "-C", dir, ".")
	if err != nil {
		return nil, err
	}
	x, d, err := openLayer(layer)
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("%d names, %s", len(x.Entries), megabytes(x.PlainSize()))
	rows := []row{{what: "time to write a layer / `tar --zstd -c`", value: ratio(wrote, packed),
		detail: fmt.Sprintf("%.1f s, %.1f s; %s", wrote.Seconds(), packed.Seconds(), what)}}

	for _, cores := range []struct {
		name, list string
		least      float64
	}{{"two cores", "0,1", 2}, {"one core", "0", 1.2}} {
		on := []string{"taskset", "-c", cores.list}
		t, err := r.race(
			append(on, "tar", "--zstd", "-xf", tarzst, "--numeric-owner", "-C"),
			append(on, self, "child", "extract", layer))
		if err != nil {
			return nil, err
		}
		rows = append(rows, row{what: "`tar --zstd -x` / extraction, " + cores.name, value: ratio(t[0], t[1]), op: atLeast, asked: cores.least,
			detail: fmt.Sprintf("%.2f s, %.2f s", t[0].Seconds(), t[1].Seconds())})
	}
	t, err := r.race([]string{self, "child", "frames", layer}, []string{self, "child", "shuffled", layer})
	if err != nil {
		return nil, err
	}
	rows = append(rows, row{what: "frames in random order / in order", value: ratio(t[1], t[0]), op: atMost, asked: 1.1,
		detail: fmt.Sprintf("%.2f s, %.2f s; %d frames", t[1].Seconds(), t[0].Seconds(), len(x.Frames))})

	// Size.
	smallLayer := r.path("small")
	if err := r.run(self, "child", "write", r.path(base(small)), smallLayer); err != nil {
		return nil, err
	}
	_, sd, err := openLayer(smallLayer)
	if err != nil {
		return nil, err
	}
	for _, s := range []struct {
		tarball string
		size    int64
		tools   [][]string
	}{
		{main, d.Size, [][]string{{"zstd", "-9"}, {"tar", "--zstd"}}},
		{small, sd.Size, [][]string{{"zstd", "-9"}, {"zstd", "-3"}}},
	} {
		for _, tool := range s.tools {
			n := int64(0)
			if tool[0] == "tar" {
				st, err := os.Stat(tarzst)
				if err != nil {
					return nil, err
				}
				n = st.Size()
			} else if n, err = r.compressed(s.tarball, tool...); err != nil {
				return nil, err
			}
			size := row{what: fmt.Sprintf("size of a layer / `%s` of the whole tar", strings.Join(tool, " ")), value: float64(s.size) / float64(n),
				detail: fmt.Sprintf("%s: %d, %d bytes", filepath.Base(s.tarball), s.size, n)}
			if tool[len(tool)-1] == "-9" {
				size.op, size.asked = atMost, 1.05
			}
			rows = append(rows, size)
		}
	}

	parent, err := image.Flatten(x)
	if err != nil {
		return nil, err
	}
	again, err := r.unchanged(dir, parent)
	if err != nil {
		return nil, err
	}
	up, err := r.upgrade(r.path(base(upgraded)), parent)
	return append(append(rows, again...), up...), err
}

// unchanged is what it costs to publish a tree in which nothing changed.
func (r *runner) unchanged(dir string, parent *image.View) ([]row, error) {
	var times []time.Duration
	compare := func() error {
		start := time.Now()
		t, err := tree.FromDir(dir, tree.Excludes{})
		if err != nil {
			return err
		}
		defer t.Close()
		delta, err := tree.Changes(r.ctx, parent, t, false)
		if err != nil {
			return err
		}
		if !delta.Unchanged {
			return fmt.Errorf("%s: has changed: %+v", dir, delta.Summary)
		}
		times = append(times, time.Since(start))
		return nil
	}
	opened, err := opens(dir, compare)
	if err != nil {
		return nil, err
	}
	times = nil // the kernel counted along
	for range r.rounds {
		if err := compare(); err != nil {
			return nil, err
		}
	}
	took := median(times)
	names := len(parent.Entries)
	return []row{
		{what: "comparing an unchanged tree, for 100,000 names", value: took.Seconds() * 1e5 / float64(names), unit: "s", op: atMost, asked: 2,
			detail: fmt.Sprintf("%.3f s for %d", took.Seconds(), names)},
		{what: "opened for that", value: float64(opened), unit: "files", op: atMost, asked: 0, detail: "counted by fanotify"},
	}, nil
}

// upgrade is how much the layer of an upgrade takes.
func (r *runner) upgrade(dir string, parent *image.View) ([]row, error) {
	t, err := tree.FromDir(dir, tree.Excludes{})
	if err != nil {
		return nil, err
	}
	defer t.Close()
	delta, err := tree.Changes(r.ctx, parent, t, false)
	if err != nil {
		return nil, err
	}
	layer := r.path("upgrade")
	f, err := os.Create(layer)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d, err := image.Write(f, delta.Entries, t.Open)
	if err != nil {
		return nil, err
	}
	x, err := image.ReadIndex(f, d)
	if err != nil {
		return nil, err
	}
	before := make(map[string][32]byte)
	for _, e := range parent.Entries {
		before[e.Path] = e.SHA256
	}
	var files, contents []string
	for _, e := range x.Entries {
		if e.Size == 0 {
			continue
		}
		files = append(files, e.Path)
		if before[e.Path] != e.SHA256 {
			contents = append(contents, e.Path)
		}
	}
	var rows []row
	for _, set := range []struct {
		name  string
		files []string
		row   row
	}{
		{"changed", files, row{what: "layer of an `apt upgrade` / `zstd -9` of the changed files", op: atMost, asked: 1.3}},
		{"contents", contents, row{what: "the same / `zstd -9` of the files with new contents"}},
	} {
		list, tarball := r.path(set.name), r.path(set.name+".tar")
		if err := os.WriteFile(list, []byte(strings.Join(set.files, "\x00")+"\x00"), 0o644); err != nil {
			return nil, err
		}
		if err := r.run("tar", "--no-recursion", "--null", "-cf", tarball, "-C", dir, "-T", list); err != nil {
			return nil, err
		}
		n, err := r.compressed(tarball, "zstd", "-9")
		if err != nil {
			return nil, err
		}
		set.row.value = float64(d.Size) / float64(n)
		set.row.detail = fmt.Sprintf("%d, %d bytes; %d files", d.Size, n, len(set.files))
		rows = append(rows, set.row)
	}
	return rows, nil
}

// compressed is how small a tool makes a file.
func (r *runner) compressed(file string, tool ...string) (int64, error) {
	_, out, err := r.time("sh", "-c", strings.Join(tool, " ")+` -qc "$0" | wc -c`, file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(out), 10, 64)
}

// child does one thing that the bench above it times.
func child(ctx context.Context, args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("child: %q", args)
	}
	what, from, to := args[0], args[1], args[2]
	if what == "write" {
		return writeLayer(from, to)
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	d, err := descriptor(from)
	if err != nil {
		return err
	}
	layer := image.Layer{Descriptor: d, Bytes: f}
	if what == "extract" {
		cores := runtime.GOMAXPROCS(0)
		runtime.GOMAXPROCS(2 * cores) // as the command does
		_, err = image.Extract(ctx, to, image.Options{Workers: cores}, layer)
		return err
	}
	return frames(layer, to, what == "shuffled")
}

func writeLayer(dir, layer string) (err error) {
	t, err := tree.FromDir(dir, tree.Excludes{})
	if err != nil {
		return err
	}
	defer t.Close()
	f, err := os.Create(layer)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	d, err := image.Write(f, t.Entries, t.Open)
	if err != nil {
		return err
	}
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return os.WriteFile(layer+".json", b, 0o644)
}

// frames extracts as a node does: frame by frame, as they come.
func frames(layer image.Layer, dir string, shuffled bool) error {
	view, err := image.ReadView(layer)
	if err != nil {
		return err
	}
	x, err := image.NewExtractor(dir, view, image.Options{})
	if err != nil {
		return err
	}
	defer x.Close()
	order := view.Needed(0)
	if shuffled {
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	}
	var next atomic.Int64
	var workers sync.WaitGroup
	errs := make([]error, runtime.GOMAXPROCS(0))
	for w := range errs {
		workers.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= len(order) {
					return
				}
				f := view.Layers[0].Frames[order[i]]
				b := make([]byte, f.Size)
				if _, err := layer.Bytes.ReadAt(b, f.Offset); err != nil && err != io.EOF {
					errs[w] = err
					return
				}
				errs[w] = x.Frame(0, order[i], b)
			}
		})
	}
	workers.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return x.Finish()
}

func openLayer(file string) (*image.Index, image.Descriptor, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, image.Descriptor{}, err
	}
	defer f.Close()
	d, err := descriptor(file)
	if err != nil {
		return nil, d, err
	}
	x, err := image.ReadIndex(f, d)
	return x, d, err
}

// descriptor reads what writeLayer left beside a layer.
func descriptor(layer string) (d image.Descriptor, err error) {
	b, err := os.ReadFile(layer + ".json")
	if err != nil {
		return d, err
	}
	return d, json.Unmarshal(b, &d)
}

func base(file string) string { return strings.TrimSuffix(filepath.Base(file), ".tar") }

func ratio(a, b time.Duration) float64 { return a.Seconds() / b.Seconds() }

func megabytes(n int64) string { return fmt.Sprintf("%.0f MB", float64(n)/1e6) }
