package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/cobra"

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
	m := startMeter(cmd, "extract "+v.Name, 0)
	defer m.stop()
	images.Read = m.read
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
	journal := filepath.Join(dir, image.Unfinished)
	var total int64
	if _, err := os.Lstat(journal); errors.Is(err, fs.ErrNotExist) {
		if err := empty(dir); err != nil {
			return "", err
		}
		for n, x := range view.Layers {
			for _, f := range view.Needed(n) {
				total += x.Frames[f].Size
			}
		}
	}
	m.set(0, total)
	// A goroutine whose system call takes more than 20 µs loses its P, and threads
	// wake each other up all the time, unless there are Ps that nobody wants
	// (retake in runtime/proc.go). It is a tenth of the CPU time.
	cores := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2 * cores))
	skipped, err := image.Extract(ctx, dir, image.Options{Unprivileged: os.Geteuid() != 0, Journal: journal, Workers: cores}, layers...)
	if err != nil {
		return "", err
	}
	summary = fmt.Sprintf("%d files, %s of content, in %.1f s", len(view.Entries), size(view.Size()), time.Since(began).Seconds())
	if skipped != (image.Skipped{}) {
		summary += fmt.Sprintf("; without root %d owners, %d devices and %d attributes are left out", skipped.Owners, skipped.Devices, skipped.Xattrs)
	}
	return summary, nil
}

// empty says what is in a directory that is to be empty, but for what mkfs makes.
func empty(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, d := range names {
		if d.Name() != "lost+found" {
			return fmt.Errorf("is not empty: %q is there", d.Name())
		}
	}
	return nil
}

// finished says what is wrong with a directory that is to become an image.
func finished(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, image.Unfinished)); err == nil {
		return unfinished(dir)
	}
	return nil
}

func unfinished(what string) error {
	return fmt.Errorf("%s: what was extracted there is not complete: extract it again", what)
}
