package main

import (
	"fmt"
	"io"
	"os"
	"sort"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"rookery/image"
	"rookery/image/store"
)

func imageExtract(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "extract NAME[:TAG] DIR",
		Short: "Write the files of a version below a directory",
		Long: `Write the files of a version below a directory, which is empty or not there yet.

Every byte is checked before it is written. An extraction that was interrupted goes on
where it stopped when the same is extracted again. Only root can give files their owners,
make devices and set capabilities; what had to be left out is said.`,
		Example:           "  rookery image extract debian12:4 /mnt/new",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: words(completeImages(dir), completeDirs),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			v, err := images.Resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			sum, err := extract(cmd, images, v, args[1])
			if err != nil {
				return fmt.Errorf("extract %s to %s: %w", v.Name, args[1], err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", v.Name, sum)
			return nil
		},
	}
}

// extract writes the files of v below dir and says how many.
func extract(cmd *cobra.Command, images *store.Store, v store.Version, dir string) (summary string, err error) {
	ctx, began := cmd.Context(), time.Now()
	layers, closeAll, err := images.Layers(ctx, v)
	if err != nil {
		return "", err
	}
	defer closeAll()
	view, err := image.ReadView(layers...)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := empty(dir); err != nil {
		return "", err
	}
	if err := room(dir, spaceOf(view)); err != nil {
		return "", err
	}
	var total int64
	for n, x := range view.Layers {
		for _, f := range view.Needed(n) {
			total += x.Frames[f].Size
		}
	}
	m := startMeter(cmd, "extract "+v.Name, total)
	defer m.stop()
	for n := range layers {
		layers[n].Bytes = meteredReaderAt{layers[n].Bytes, m}
	}
	skipped, err := image.Extract(ctx, dir, image.Options{Unprivileged: os.Geteuid() != 0}, layers...)
	if err != nil {
		return "", err
	}
	summary = fmt.Sprintf("%d files, %s of content, in %.1f s", len(view.Entries), size(view.Size()), time.Since(began).Seconds())
	if skipped != (image.Skipped{}) {
		summary += fmt.Sprintf("; without root %d owners, %d devices and %d attributes are left out", skipped.Owners, skipped.Devices, skipped.Xattrs)
	}
	return summary, nil
}

type meteredReaderAt struct {
	io.ReaderAt
	meter *meter
}

func (r meteredReaderAt) ReadAt(b []byte, off int64) (int, error) {
	n, err := r.ReaderAt.ReadAt(b, off)
	r.meter.add(int64(n))
	return n, err
}

// empty says what is in a directory that is to be empty.
func empty(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	names, err := f.Readdirnames(1)
	if err == io.EOF {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("is not empty: %s is there", names[0])
}

// A space is what a tree takes at least.
type space struct{ bytes, files int64 }

const (
	block     = 4096 // in which nearly every filesystem gives room to files
	mostHoles = 1000 // to one: only zeros are packed so small, and they become holes
)

func spaceOf(v *image.View) (need space) {
	for i := range v.Entries {
		e := &v.Entries[i]
		if e.Type != image.Hardlink {
			need.files++
			need.bytes += (written(e, v.Layers[e.Layer].Frames) + block - 1) / block * block
		}
	}
	return need
}

// written is how much of a file is written: all of it or, where a frame is a hole,
// no less than what the frames hold.
func written(e *image.Entry, frames []image.Frame) (least int64) {
	if e.Size == 0 {
		return 0
	}
	sparse := false
	first := sort.Search(len(frames), func(n int) bool { return frames[n].Plain+frames[n].PlainSize > e.Offset })
	for _, f := range frames[first:] {
		if f.Plain >= e.Offset+e.Size {
			break
		}
		hole := f.Size*mostHoles < f.PlainSize
		sparse = sparse || hole
		if !hole {
			least += min(f.Size, min(e.Offset+e.Size, f.Plain+f.PlainSize)-max(e.Offset, f.Plain))
		}
	}
	if sparse {
		return least
	}
	return e.Size
}

// room says whether the filesystem of dir has room.
func room(dir string, need space) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need.bytes {
		return fmt.Errorf("%s has %d bytes free, %d are needed: %w", dir, free, need.bytes, unix.ENOSPC)
	}
	if st.Files > 0 && int64(st.Ffree) < need.files { // some filesystems do not count them
		return fmt.Errorf("%s has room for %d files, %d are needed: %w", dir, st.Ffree, need.files, unix.ENOSPC)
	}
	return nil
}
