// Command rookery is the server of a site and the command line of those who
// look after it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := root().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "rookery:", err)
		os.Exit(1)
	}
}

// A stateDir is where everything that the server knows is kept.
type stateDir string

func (s stateDir) site() string      { return filepath.Join(string(s), "site") }
func (s stateDir) images() string    { return filepath.Join(string(s), "images") }
func (s stateDir) boot() string      { return filepath.Join(string(s), "boot") }
func (s stateDir) records() string   { return filepath.Join(string(s), "rookery.db") }
func (s stateDir) admin() string     { return filepath.Join(string(s), "admin.sock") }
func (s stateDir) kernel() string    { return filepath.Join(s.boot(), "vmlinuz") }
func (s stateDir) initramfs() string { return filepath.Join(s.boot(), "initramfs") }

func root() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "rookery",
		Short: "Install Linux on many machines at once",
		Long: `Rookery netboots machines into a small agent, lets them fetch one image from a
BitTorrent swarm that they all serve, and turns each copy into a machine of its own.

Every flag can also be set in ` + defaultConfig + ` (the flag's name is the key) and in the
environment (` + envPrefix + ` and the name in capitals, with _ for -).
The command line goes before the environment, the environment before the file.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return configure(cmd, os.LookupEnv) },
	}
	cmd.PersistentFlags().StringVar(&state, "state", "/var/lib/rookery", "directory that holds images, records and keys")
	cmd.PersistentFlags().String("config", defaultConfig, "configuration file")
	dir := func() stateDir { return stateDir(state) }
	cmd.AddCommand(
		serveCommand(dir),
		nodeCommand(dir),
		applyCommand(dir),
		planCommand(dir),
		eventsCommand(dir),
		imageCommand(dir),
		initramfsCommand(dir),
	)
	return cmd
}
