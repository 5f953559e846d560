package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"rookery/image/store"
	"rookery/wire"
)

// damageView is what the commands show of a damage.
type damageView struct {
	Images []string    `json:"images"`
	What   string      `json:"what"`
	Digest wire.Digest `json:"digest"`
	Place  string      `json:"place,omitempty"`
	Files  []string    `json:"files,omitempty"`
	Error  string      `json:"error"`
}

func imageVerify(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "verify [NAME[:TAG]...]",
		Short: "Read every byte of versions, by default of all, and say what is damaged",
		Long: `Read every byte of versions, by default of all, and say what is damaged: in which layer
and frame, and which files are in it. The exit code is 1 when something is.

To mend a version, import or copy it again under its name: what is right is kept.`,
		Example:           "  rookery image verify\n  rookery image verify debian12:3 -o json",
		ValidArgsFunction: completeImages(dir),
		RunE: func(cmd *cobra.Command, names []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			versions, err := named(cmd, images, names)
			if err != nil {
				return err
			}
			began := time.Now()
			m := startMeter(cmd, "verify", 0)
			defer m.stop()
			damages, err := images.Verify(cmd.Context(), m.set, versions...)
			if err != nil {
				return err
			}
			m.stop()
			views := []damageView{}
			for _, d := range damages {
				views = append(views, damageView{d.Images, d.What, d.Digest, d.Place, d.Files, d.Err.Error()})
			}
			err = show(cmd.OutOrStdout(), format, views, func(w io.Writer) {
				for _, d := range views {
					describeDamage(w, d)
				}
				if len(views) == 0 {
					fmt.Fprintf(w, "%d versions, %s: all right, in %.1f s\n", len(versions), size(m.total.Load()), time.Since(began).Seconds())
				}
			})
			if err == nil && len(views) > 0 {
				err = fmt.Errorf("verify: %d places are damaged", len(views))
			}
			return err
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

// named are the versions of these names, or all.
func named(cmd *cobra.Command, images *store.Store, names []string) ([]store.Version, error) {
	all, err := images.List(cmd.Context())
	if err != nil || len(names) == 0 {
		return all, err
	}
	var versions []store.Version
	for _, name := range names {
		if !strings.Contains(name, ":") {
			name += ":latest"
		}
		i := slices.IndexFunc(all, func(v store.Version) bool { return v.Name == name || slices.Contains(v.Tags, name) })
		if i < 0 {
			return nil, fmt.Errorf("image %q: %w", name, store.ErrNotFound)
		}
		versions = append(versions, all[i])
	}
	return versions, nil
}

// mostFiles is how many names of files are shown for one damage.
const mostFiles = 10

func describeDamage(w io.Writer, d damageView) {
	where := d.What
	if d.Place != "" {
		where += ": " + d.Place
	}
	fmt.Fprintf(w, "%s: %s (%s): %s\n", strings.Join(d.Images, ", "), where, d.Digest, printable(d.Error))
	for i, f := range d.Files {
		if i == mostFiles {
			fmt.Fprintf(w, "  and %d more files\n", len(d.Files)-i)
			break
		}
		fmt.Fprintf(w, "  %s\n", printable(f))
	}
}
