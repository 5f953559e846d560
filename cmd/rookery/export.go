package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"rookery/image/registry"
)

func imageExport(dir func() stateDir) *cobra.Command {
	var opts registry.Options
	cmd := &cobra.Command{
		Use:   "export NAME[:TAG] DEST",
		Short: "Write a version for other tools: podman, docker, skopeo, tar, a registry",
		Long: `Write a version for other tools. DEST is

  docker-archive:FILE[:REF]  for podman load and docker load
  oci:DIR[:REF]              an OCI layout; where there is one, an image more in it
  oci-archive:FILE[:REF]     the same in a tar file
  tar:FILE                   the files in one tarball; .gz and .zst are packed
  docker://HOST/REPO[:TAG]   a registry

REF is the name of the image there, by default its own. FILE may be -, the standard
output. What is written appears when it is complete.`,
		Example: `  rookery image export debian12:4 docker-archive:debian12.tar
  rookery image export debian12 tar:- | tar -t`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: words(completeImages(dir), cobra.FixedCompletions([]string{"docker-archive:", "oci:", "oci-archive:", "tar:", "docker://"}, cobra.ShellCompDirectiveNoSpace|cobra.ShellCompDirectiveNoFileComp)),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			v, err := images.Resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			began := time.Now()
			m := startMeter(cmd, "export "+v.Name, v.Size)
			defer m.stop()
			images.Read = m.read
			if err := registry.Export(cmd.Context(), images, v, args[1], cmd.OutOrStdout(), opts); err != nil {
				return err
			}
			m.stop()
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s in %d layers written to %s, in %.1f s\n", v.Name, size(v.Size), len(v.Layers), args[1], time.Since(began).Seconds())
			return nil
		},
	}
	insecureFlag(cmd, &opts)
	return cmd
}
