package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"rookery/image/tree"
)

// excludeFlags are what a command is told to leave out.
type excludeFlags struct{ patterns, files []string }

func (x *excludeFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&x.patterns, "exclude", nil, "pattern of what stays out, as in a .gitignore; repeatable")
	cmd.Flags().StringArrayVar(&x.files, "exclude-from", nil, "file with such patterns, one a line; repeatable")
}

func (x *excludeFlags) none() bool { return len(x.patterns)+len(x.files) == 0 }

// excludesHelp is for the Long of commands with excludeFlags.
const excludesHelp = `
What stays out is said by patterns like those of a .gitignore, of which the last that
fits counts: first those built in (what is in /proc, /sys, /dev, /run and /tmp, swap,
package caches), then the files excludes and excludes.d/NAME in the directory of
--state, then --exclude-from and --exclude.`

// of is what stays out of an image, most general first.
func (x *excludeFlags) of(dir stateDir, name string) (tree.Excludes, error) {
	repo, _, _ := strings.Cut(name, ":")
	all := tree.Builtin()
	read := func(path string, optional bool) error {
		f, err := os.Open(path)
		if optional && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		more, err := tree.ParseExcludes(path, f)
		all = all.With(more)
		return err
	}
	site := filepath.Join(dir.path, "excludes")
	if err := errors.Join(read(site, true), read(filepath.Join(site+".d", repo), true)); err != nil {
		return all, err
	}
	for _, file := range x.files {
		if err := read(file, false); err != nil {
			return all, err
		}
	}
	for _, p := range x.patterns {
		more, err := tree.ParseExcludes("--exclude", strings.NewReader(p))
		if err != nil {
			return all, err
		}
		all = all.With(more)
	}
	return all, nil
}
