// Command rookery is the server of a site and the command line of those who
// look after it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"rookery/image/chroot"
)

func main() {
	chroot.Child()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends what does not heed the first
	if err := root().ExecuteContext(ctx); err != nil {
		var exit chroot.Exit
		if errors.As(err, &exit) { // of a command that has spoken for itself
			os.Exit(int(exit))
		}
		fmt.Fprintln(os.Stderr, "rookery:", err)
		os.Exit(1)
	}
}

// A stateDir is where everything that the server knows is kept. The images may
// be elsewhere.
type stateDir struct{ path, location string }

func (s stateDir) site() string      { return filepath.Join(s.path, "site") }
func (s stateDir) boot() string      { return filepath.Join(s.path, "boot") }
func (s stateDir) records() string   { return filepath.Join(s.path, "rookery.db") }
func (s stateDir) admin() string     { return filepath.Join(s.path, "admin.sock") }
func (s stateDir) rsync() string     { return filepath.Join(s.path, "rsync") }
func (s stateDir) kernel() string    { return filepath.Join(s.boot(), "vmlinuz") }
func (s stateDir) initramfs() string { return filepath.Join(s.boot(), "initramfs") }

// images is the location of the images, as openStore takes it.
func (s stateDir) images() string {
	if s.location != "" {
		return s.location
	}
	return filepath.Join(s.path, "images")
}

// temp is where files for a while have room, beside the images.
func (s stateDir) temp() (string, error) {
	dir := s.images()
	if _, _, ok := registryAt(dir); ok {
		dir = s.path
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// tree is where the tree of that name lies. A name with a slash is the path
// itself.
func (s stateDir) tree(name string) string {
	if strings.Contains(name, "/") {
		return filepath.Clean(name)
	}
	return filepath.Join(s.path, "trees", name)
}

// maxSocket is the longest path that a unix socket can have (unix(7)).
const maxSocket = 107

func (s stateDir) check() error {
	if s.path == "" {
		return errors.New("state: no directory is named")
	}
	if n := len(s.admin()); n > maxSocket {
		return fmt.Errorf("state: the path of %s has %d bytes, a socket's can have %d", s.admin(), n, maxSocket)
	}
	return nil
}

func root() *cobra.Command {
	var dir stateDir
	cmd := &cobra.Command{
		Use:   "rookery",
		Short: "Install Linux on many machines at once",
		Long: `Rookery netboots machines into a small agent, lets them fetch one image from a
BitTorrent swarm that they all serve, and turns each copy into a machine of its own.

The flags of serve, --state and --images can also be set in ` + defaultConfig + ` (the flag's
name is the key) and in the environment (` + envPrefix + ` and the name in capitals, with _
for -). The command line goes before the environment, the environment before the file.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := configure(cmd, os.LookupEnv); err != nil {
				return err
			}
			return dir.check()
		},
	}
	cmd.PersistentFlags().StringVar(&dir.path, "state", "/var/lib/rookery", "directory that holds images, records and keys")
	cmd.PersistentFlags().StringVar(&dir.location, "images", "", "where the images are: a directory, or registry:HOST/PREFIX (default images in the directory of --state)")
	cmd.PersistentFlags().String("config", defaultConfig, "configuration file")
	state := func() stateDir { return dir }
	cmd.AddCommand(
		serveCommand(state),
		nodeCommand(state),
		groupCommand(state),
		applyCommand(state),
		diffCommand(state),
		getCommand(state),
		planCommand(state),
		eventsCommand(state),
		imageCommand(state),
		initramfsCommand(state),
	)
	explain(cmd)
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		var bad *pflag.InvalidValueError
		if errors.As(err, &bad) {
			return fmt.Errorf("--%s: %q: %w", bad.GetFlag().Name, bad.GetValue(), reason(bad))
		}
		return err
	})
	return cmd
}

// group is a command that only has commands below it. To cobra, a word that is
// none of them would be a wish for help, and success.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(commands...)
	return cmd
}

// explain makes a command that got too few words or too many say which it wants.
func explain(cmd *cobra.Command) {
	if want := cmd.Args; want != nil && !cmd.HasSubCommands() {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := want(cmd, args); err != nil {
				return fmt.Errorf("%w: want %s %s", err, cmd.CommandPath(), strings.TrimSpace(strings.TrimPrefix(cmd.Use, cmd.Name())))
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		explain(sub)
	}
}

// reason is what is wrong with a flag's value, without the words of strconv.
func reason(err error) error {
	var number *strconv.NumError
	if errors.As(err, &number) {
		return number.Err
	}
	return errors.Unwrap(err)
}

// stoppable is a file whose writing ends with ctx.
type stoppable struct {
	ctx context.Context
	io.Writer
}

func (s stoppable) Write(b []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.Writer.Write(b)
}
