package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"rookery/image/capture"
	"rookery/image/oci"
	"rookery/image/store"
	"rookery/image/tree"
)

func imageBuild(dir func() stateDir) *cobra.Command {
	var b capture.Build
	var excludes excludeFlags
	cmd := &cobra.Command{
		Use:   "build NAME[:TAG] --suite SUITE",
		Short: "Make a version of a distribution's packages",
		Long: `Make a version of a distribution's packages, with mmdebstrap where it is installed,
else with debootstrap. Both know Debian and what is like it.

Without --include it gets what a machine needs that is to be installed: a kernel, an
init, the network, and the loaders of GRUB. With it, it gets these packages and no more
than the variant has.
` + excludesHelp,
		Example: `  rookery image build debian12 --suite bookworm
  rookery image build tiny --suite bookworm --include busybox --variant essential
  rookery image build lab --suite bookworm --include openssh-server,linux-image-amd64 --mirror http://deb.example.org/debian`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: words(completeImages(dir)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			if err := checkNewName(name); err != nil {
				return err
			}
			if !cmd.Flags().Changed("include") {
				b.Include = capture.Bootable(b.Arch)
			}
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			x, err := excludes.of(dir(), name)
			if err != nil {
				return err
			}
			temp, err := dir().temp()
			if err != nil {
				return err
			}
			b.Log = cmd.ErrOrStderr()
			began := time.Now()
			err = b.Run(cmd.Context(), temp, func(path string, b capture.Build) error {
				t, err := builtTree(cmd.Context(), path, temp, x)
				if err != nil {
					return err
				}
				defer t.Close()
				v, err := publishEntries(cmd, images, name, t, t.Entries, nil, store.Config{
					Comment: "built by " + b.Tool, Architecture: b.GoArch(), Labels: map[string]string{oci.LabelSource: b.String()},
				})
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %d files, %s of content; layer %s, in %.1f s\n",
					v.Name, len(t.Entries), size(contentOf(t.Entries)), size(v.Size), time.Since(began).Seconds())
				return nil
			})
			if err != nil {
				return fmt.Errorf("build %s: %w", name, err)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&b.Suite, "suite", "", "release of the distribution, bookworm")
	f.StringSliceVar(&b.Include, "include", nil, "packages (default what a machine needs to start)")
	f.StringVar(&b.Variant, "variant", "minbase", "how much there is besides, in the tool's words")
	f.StringSliceVar(&b.Mirrors, "mirror", nil, "where packages come from (default the distribution's)")
	f.StringVar(&b.Arch, "arch", "", "architecture in the distribution's words, amd64 (default this machine's)")
	f.StringVar(&b.Tool, "tool", "", "mmdebstrap or debootstrap (default the first that is installed)")
	excludes.add(cmd)
	cmd.MarkFlagRequired("suite")
	cmd.RegisterFlagCompletionFunc("tool", cobra.FixedCompletions([]string{"mmdebstrap", "debootstrap"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// builtTree lists what the tool made: a directory or a tarball.
func builtTree(ctx context.Context, path, temp string, x tree.Excludes) (*tree.Tree, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return tree.FromDir(path, x)
	}
	return tree.FromTar(ctx, path, temp, x, nil)
}
