package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"rookery/server/httpd"
	"rookery/server/site"
	"rookery/wire"
)

func imageRsync(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "rsync NAME[:TAG]",
		Short: "Have the server offer a version's files by rsync, and say how to fetch them",
		Long: `Have the server offer a version's files by rsync, and say how to fetch them.

The server writes the files of the version into its state directory, which takes their
place and some time, and offers them to any rsync. They stay there while a node with
the transport rsync is to get that version, and for a day after they were last asked for.`,
		Example:           "  rookery image rsync debian12:4",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeImages(dir),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			v, err := images.Resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			t, err := waitForTree(cmd, httpd.Dial(dir().admin()), v.Manifest)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
				err = fmt.Errorf("no server runs on %s: start it with 'rookery serve'", dir().path)
			}
			if err != nil {
				return fmt.Errorf("rsync %s: %w", v.Name, err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s:\n", v.Name)
			if t.Port != 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "  rsync -aHAX --numeric-ids %s DIR\n", address(t, t.Port, 873))
			}
			if t.TLSPort != 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "  RSYNC_SSL_CA_CERT=%s RSYNC_SSL_SKIP_HOSTNAME_CHECK=1 rsync-ssl -aHAX --numeric-ids %s DIR\n",
					site.CAFile(dir().site()), address(t, t.TLSPort, 874))
			}
			if t.SSHPort != 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "  rsync -aHAX --numeric-ids -e \"ssh -p %d -o HostKeyAlias=%s -o UserKnownHostsFile=%s\" %s::%s/ DIR\n",
					t.SSHPort, wire.ServerName, site.KnownHostsFile(dir().site()), t.Address, t.Name)
			}
			return nil
		},
	}
}

// address is where a tree is, for people.
func address(t wire.Tree, port, usual int) string {
	if port == usual {
		return fmt.Sprintf("rsync://%s/%s/", t.Address, t.Name)
	}
	return fmt.Sprintf("rsync://%s:%d/%s/", t.Address, port, t.Name)
}

// waitForTree asks the server until it has made the files.
func waitForTree(cmd *cobra.Command, server *httpd.Client, manifest wire.Digest) (wire.Tree, error) {
	ctx := cmd.Context()
	m := startMeter(cmd, "rsync", 0)
	defer m.stop()
	for {
		t, err := server.Tree(ctx, manifest)
		if err != nil || t.Module != "" {
			return t, err
		}
		m.set(t.Done, t.Total)
		select {
		case <-time.After(time.Second / 5):
		case <-ctx.Done():
			return t, context.Cause(ctx)
		}
	}
}
