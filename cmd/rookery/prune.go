package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"rookery/image/store"
	"rookery/server/httpd"
	"rookery/wire"
)

func imageRemove(dir func() stateDir) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm NAME:TAG...",
		Short: "Remove versions, and what only they need",
		Long: `Remove versions, and what only they need.

A version that a node's record asks for, that an installation is fetching, or that a
tag other than latest names is left alone, unless --force is given. Nothing is removed
when one of those named is needed.`,
		Example:           "  rookery image rm debian12:1 debian12:2",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeImages(dir),
		RunE: func(cmd *cobra.Command, names []string) error {
			ctx := cmd.Context()
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			all, err := images.List(ctx)
			if err != nil {
				return err
			}
			if err := refuseUnknown(all, names); err != nil {
				return err
			}
			if !force {
				needed, err := neededBy(ctx, dir())
				if err != nil {
					return err
				}
				if err := refuseNeeded(all, names, needed); err != nil {
					return err
				}
			}
			for _, name := range names {
				p, err := images.Remove(ctx, name)
				if err != nil {
					return err
				}
				freed := ""
				if len(p.Blobs) > 0 { // a registry collects its garbage by itself
					freed = ", " + size(p.Bytes) + " are free"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: removed%s\n", name, freed)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also what is needed; nodes that need it will not install")
	return cmd
}

// refuseUnknown says which of the names is no version's own.
func refuseUnknown(all []store.Version, names []string) error {
	for _, name := range names {
		i := slices.IndexFunc(all, func(v store.Version) bool { return v.Name == name || slices.Contains(v.Tags, name) })
		switch {
		case !strings.Contains(name, ":"):
			return fmt.Errorf("remove %s: want NAME:TAG: nothing is removed", name)
		case i < 0:
			return fmt.Errorf("remove %s: %w: nothing is removed", name, store.ErrNotFound)
		case all[i].Name != name:
			return fmt.Errorf("remove %s: is a tag of %s: nothing is removed", name, all[i].Name)
		}
	}
	return nil
}

// refuseNeeded says who needs one of the versions that are named.
func refuseNeeded(all []store.Version, names []string, needed func(store.Version) string) error {
	var errs []error
	for _, name := range names {
		for _, v := range all {
			if v.Name != name {
				continue
			}
			if why := needed(v); why != "" {
				errs = append(errs, fmt.Errorf("%s: %s", name, why))
			}
			for _, tag := range v.Tags {
				if !strings.HasSuffix(tag, ":latest") {
					errs = append(errs, fmt.Errorf("%s: is tagged %s", name, tag))
				}
			}
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w: nothing is removed, --force does it all the same", errors.Join(errs...))
	}
	return nil
}

func imagePrune(dir func() stateDir) *cobra.Command {
	var keep int
	var older, format string
	var dry bool
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove old versions, and everything that no version needs",
		Long: `Remove old versions, and everything that no version needs.

With --keep the newest versions of each image stay, with --older-than those made since;
with both, what either keeps. With neither all versions stay, and only what nothing
needs is removed: leftovers of publications that were killed. What a tag names (latest
too), what a node's record asks for and what an installation is fetching always stays.`,
		Example: "  rookery image prune --keep 3 --dry-run\n  rookery image prune --keep 3 --older-than 90d",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if keep < 0 {
				return fmt.Errorf("--keep: %d, want at least 0", keep)
			}
			k := store.Keep{Newest: keep}
			if older != "" {
				age, err := parseAge(older)
				if err != nil {
					return fmt.Errorf("--older-than: %w", err)
				}
				k.Since = time.Now().Add(-age)
			}
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			if k.Needed, err = neededBy(ctx, dir()); err != nil {
				return err
			}
			p, err := images.Prune(ctx, k, dry)
			if err != nil {
				return err
			}
			view := pruneView{Bytes: p.Bytes, Blobs: len(p.Blobs), Removed: []string{}, Kept: map[string]string{}, Dry: dry}
			for _, v := range p.Versions {
				view.Removed = append(view.Removed, v.Name)
			}
			for _, k := range p.Kept {
				view.Kept[k.Name] = k.Why
			}
			return show(cmd.OutOrStdout(), format, view, func(w io.Writer) {
				for _, k := range p.Kept {
					fmt.Fprintf(w, "%s\tkept: %s\n", k.Name, k.Why)
				}
				did := "removed"
				if dry {
					did = "would be removed"
				}
				for _, name := range view.Removed {
					fmt.Fprintf(w, "%s\t%s\n", name, did)
				}
				fmt.Fprintf(w, "%d versions and %d blobs %s: %s\n", len(view.Removed), view.Blobs, did, size(view.Bytes))
			})
		},
	}
	cmd.Flags().IntVar(&keep, "keep", 0, "how many of the newest versions of each image stay")
	cmd.Flags().StringVar(&older, "older-than", "", "only versions older than this go: 90d, 12h")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would be done")
	outputFlag(cmd, &format)
	return cmd
}

type pruneView struct {
	Removed []string          `json:"removed"`
	Kept    map[string]string `json:"kept"` // version to reason
	Blobs   int               `json:"blobs"`
	Bytes   int64             `json:"bytes"`
	Dry     bool              `json:"dryRun"`
}

// parseAge reads a duration, which may also be in days.
func parseAge(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return 0, fmt.Errorf("%q: want a number of days such as 90d", s)
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	age, err := time.ParseDuration(s)
	if err != nil || age < 0 {
		return 0, fmt.Errorf("%q: want an age such as 90d or 12h", s)
	}
	return age, nil
}

// neededBy says who needs a version: nodes' records, and installations that run.
func neededBy(ctx context.Context, dir stateDir) (func(store.Version) string, error) {
	who := map[wire.Digest][]string{}
	needed := func(v store.Version) string { return strings.Join(who[v.Manifest], ", ") }
	if _, err := os.Stat(dir.records()); errors.Is(err, fs.ErrNotExist) {
		return needed, nil // there never was a node
	}
	return needed, withClient(ctx, dir, func(c *httpd.Client) error {
		all, err := c.Needed(ctx)
		for _, n := range all {
			who[n.Manifest] = append(who[n.Manifest], n.Why)
		}
		return err
	})
}
