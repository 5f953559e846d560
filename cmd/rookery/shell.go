package main

import (
	"github.com/spf13/cobra"

	"rookery/image/chroot"
)

func imageShell(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "shell TREE [-- COMMAND...]",
		Short: "Run a shell or a command in a tree, as if it were the machine",
		Long: `Run a shell or a command in a tree, as if it were the machine.

The command has processes and mounts of its own, the server's network and its
resolv.conf, and a /dev without the server's disks. Services that packages want to
start are not started. What is still running when the command ends is ended, and
nothing but its own changes remains in the tree. Its exit status is this program's.`,
		Example: `  rookery image shell debian12
  rookery image shell debian12 -- apt-get install -y htop`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return chroot.Command{
				Tree: dir().tree(args[0]), Args: args[1:],
				Stdin: cmd.InOrStdin(), Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(),
			}.Run(cmd.Context())
		},
	}
}
