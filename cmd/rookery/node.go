package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"rookery/server/fleet"
	"rookery/server/httpd"
	"rookery/server/seed"
	"rookery/server/site"
	"rookery/server/store"
	"rookery/wire"
)

// withClient calls do with a client of the server that runs on dir or, when
// none does, of the same handlers in this process.
func withClient(ctx context.Context, dir stateDir, do func(*httpd.Client) error) error {
	if _, err := os.Stat(dir.path); err != nil {
		return fmt.Errorf("state directory: %w: 'rookery image import' and 'rookery initramfs build' make it, --state names another", err)
	}
	conn, err := net.Dial("unix", dir.admin())
	switch {
	case err == nil:
		conn.Close()
		return do(httpd.Dial(dir.admin()))
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
		return err
	}
	keys, err := site.Open(dir.site())
	if err != nil {
		return err
	}
	images, err := openImages(dir)
	if err != nil {
		return err
	}
	records, err := store.Open(dir.records())
	if err != nil {
		return err
	}
	defer records.Close()
	log := slog.New(slog.DiscardHandler)
	machines, err := fleet.New(ctx, fleet.Config{Store: records, Images: seed.Images(images), Key: keys.Key, TokenKey: keys.TokenKey(), Log: log})
	if err != nil {
		return err
	}
	_, _, admin := (&httpd.Server{Fleet: machines, Blobs: images.Blob, Tracker: http.NotFoundHandler(), Log: log}).Routes()
	return do(httpd.InProcess(admin))
}

func nodeCommand(dir func() stateDir) *cobra.Command {
	return group("node", "List, accept, change and install machines",
		nodeList(dir), nodeShow(dir), nodeAccept(dir), nodeSet(dir), nodeInstall(dir), nodeRemove(dir))
}

func nodeList(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List all nodes and, as new, the machines that wait to be accepted",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withClient(cmd.Context(), dir(), func(c *httpd.Client) error {
				all, err := c.Nodes(cmd.Context())
				if err != nil {
					return err
				}
				return show(cmd.OutOrStdout(), format, all, func(w io.Writer) {
					fmt.Fprintln(w, "NODE\tMAC\tIMAGE\tADDRESS\tSTATE")
					for _, v := range all {
						name := v.Name
						if v.New {
							name = "-"
						}
						fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", name, v.MAC, imageOf(v), v.Address, state(v))
					}
				})
			})
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

// imageOf is the version that a node installs or, before that is decided, the
// image it is to have.
func imageOf(v fleet.View) string {
	if v.Image.Name == "" {
		return v.Wants
	}
	return v.Image.Name
}

// state is where a machine is, in a few words.
func state(v fleet.View) string {
	switch {
	case v.New:
		return "new: accept it with 'rookery node accept'"
	case v.Error != nil && v.State == wire.Failed:
		return fmt.Sprintf("failed: %s: %s", v.Error.Step, printable(v.Error.Cause))
	case v.Next == wire.Local && !v.Installed.IsZero():
		return "installed " + v.Installed.Local().Format(time.DateTime)
	case v.Next == wire.Local:
		return "starts from its own disk"
	case v.Phase == "":
		return "installs when it boots from the network"
	case v.Phase == wire.PhaseFetch && v.Fetch != nil:
		return fmt.Sprintf("fetch %.0f %% of %s", v.Percent, size(v.Fetch.Total))
	}
	return fmt.Sprintf("%s %s", v.Phase, v.State)
}

func nodeShow(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "show NODE",
		Short: "Show all that is known of a node, or of a new machine by its MAC address",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withClient(cmd.Context(), dir(), func(c *httpd.Client) error {
				v, err := c.Node(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return show(cmd.OutOrStdout(), format, v, func(w io.Writer) { describe(w, v) })
			})
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

func describe(w io.Writer, v fleet.View) {
	row := func(key, format string, args ...any) {
		if text := fmt.Sprintf(format, args...); text != "" {
			fmt.Fprintf(w, "%s\t%s\n", key, text)
		}
	}
	row("node", "%s", v.Name)
	row("state", "%s", state(v))
	row("mac", "%s", v.MAC)
	row("address", "%s", v.Address)
	row("groups", "%s", strings.Join(v.Groups, ", "))
	row("version", "%s", v.Image.Name)
	if v.Rack != nil {
		row("rack", "%s (%s)", v.Rack.Name, v.Rack.From)
	}
	row("layout", "%s", v.Layout)
	for _, s := range v.Settings {
		if s.Key != "layout" && s.Key != "rack" { // shown above
			row(s.Key, "%s (%s)", inWords(s.Value), s.From)
		}
	}
	if i := v.Inventory; i != nil {
		row("machine", "%s", strings.TrimSpace(i.Vendor+" "+i.Product))
		row("serial", "%s", i.Serial)
		row("uuid", "%s", i.UUID)
		row("hardware", "%s, %s, %d CPUs, %s", i.Firmware, i.Arch, i.CPUs, size(i.Memory))
		for _, d := range i.Disks {
			row("disk", "%s %s %s", d.Path, size(d.Size), d.Model)
		}
		for _, n := range i.NICs {
			row("nic", "%s %s %s", n, n.Driver, n.Address)
			if at := n.Neighbor; at != nil {
				row("switch", "%s %s (%s)", at.Switch, at.Port, n.Name)
			}
		}
	}
	for _, p := range v.Phases {
		row("phase", "%s %s %.1f s", p.Phase, p.State, p.Seconds)
	}
	for _, turn := range v.Turns {
		row("turn", "%s %s: %s", turn.Time.Local().Format(time.TimeOnly), turn.Phase, printable(turn.Text))
	}
	if f := v.Fetch; f != nil {
		row("fetched", "%s of %s: %s from the server, %s from other nodes", size(f.Done), size(f.Total), size(f.FromServer), size(f.FromPeers))
	}
}

// inWords is a value of JSON for people.
func inWords(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case []any:
		var all []string
		for _, one := range v {
			all = append(all, inWords(one))
		}
		return strings.Join(all, ", ")
	}
	b, _ := json.Marshal(value) // it was JSON
	return string(b)
}

func nodeAccept(dir func() stateDir) *cobra.Command {
	var n fleet.Node
	var keys []string
	cmd := &cobra.Command{
		Use:   "accept MAC --name NAME",
		Short: "Make a node of a machine that waits; it goes on without a reboot",
		Example: "  rookery node accept 52:54:00:12:34:56 --name n4 --image debian12\n" +
			"  rookery node accept 52:54:00:12:34:56 --name n4 --image debian12 --address 10.7.0.14/24 --authorized-key ~/.ssh/id_ed25519.pub",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if n.AuthorizedKeys, err = readKeys(keys); err != nil {
				return err
			}
			return withClient(cmd.Context(), dir(), func(c *httpd.Client) error {
				if err := c.Accept(cmd.Context(), args[0], n); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s is %s\n", args[0], n.Name)
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&n.Name, "name", "", "the node's name, which becomes its host name (required)")
	f.StringSliceVar(&n.Groups, "group", nil, "groups that it is in; repeatable")
	f.StringVar(&n.Image, "image", "", "image to install, NAME for the newest version or NAME:TAG (default that of its groups or the Defaults record)")
	f.StringVar(&n.Layout, "layout", "", "name of a Layout record (default a layout for BIOS and UEFI)")
	f.StringVar(&n.Address, "address", "", "fixed address with prefix length (default by DHCP)")
	f.StringVar(&n.Console, "console", "", "serial console, such as ttyS0,115200")
	f.StringArrayVar(&keys, "authorized-key", nil, "file with public keys that may log in as root; repeatable")
	cmd.MarkFlagRequired("name")
	return cmd
}

// readKeys reads public key files, a key on each line.
func readKeys(files []string) ([]string, error) {
	var keys []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("authorized key: %w", err)
		}
		if bytes.Contains(b, []byte("PRIVATE KEY")) {
			return nil, fmt.Errorf("authorized key: %s is a private key: name the public one, %s.pub", file, file)
		}
		for line := range strings.Lines(string(b)) {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				keys = append(keys, line)
			}
		}
	}
	return keys, nil
}

// nodeFlags are the keys of a node's record that node set changes, by flag.
var nodeFlags = map[string]struct {
	key, about string
	list       bool
}{
	"group":          {"groups", "names of the groups it is in", true},
	"transports":     {"transports", "where layers come from, in this order: of " + strings.Join(wire.Transports, ", "), true},
	"mirrors":        {"mirrors", "URLs of layers besides the server's", true},
	"upload-limit":   {"uploadLimit", "bytes a second that it gives to others at the most, such as 5MB, or none", false},
	"download-limit": {"downloadLimit", "bytes a second that it fetches of layers at the most, such as 20MB, or none", false},
	"image":          {"image", "image to install, NAME for the newest version or NAME:TAG", false},
	"layout":         {"layout", "name of a Layout record", false},
	"address":        {"address", "fixed address with prefix length", false},
	"console":        {"console", "serial console, such as ttyS0,115200", false},
	"rack":           {"rack", "rack it stands in, such as r07: pieces pass the uplink of a rack once", false},
}

func nodeSet(dir func() stateDir) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "set NODE...",
		Short: "Change the records of nodes",
		Long: `Change the records of nodes. What is said replaces what was there, a list as a whole.
"" takes a value away: then the node has that of its groups or of the Defaults record.
It counts from the node's next start on. All keys of a record are in what
'rookery get node NAME -o yaml' shows and 'rookery apply' takes.`,
		Example: `  rookery node set n1 n2 --group compute,gpu
  rookery node set n7 --transports http --download-limit 1MB
  rookery node set n8 n9 --rack r07
  rookery node set n7 --transports ""`,
		Args: cobra.MinimumNArgs(1),
	}
	for flag, f := range nodeFlags {
		if f.list {
			cmd.Flags().StringSlice(flag, nil, f.about)
		} else {
			cmd.Flags().String(flag, "", f.about)
		}
	}
	cmd.RunE = func(cmd *cobra.Command, names []string) error {
		keys := map[string]any{}
		cmd.Flags().Visit(func(f *pflag.Flag) {
			switch of := nodeFlags[f.Name]; {
			case of.list:
				keys[of.key] = f.Value.(pflag.SliceValue).GetSlice()
			case of.key != "":
				keys[of.key] = f.Value.String()
			}
		})
		if len(keys) == 0 {
			return errors.New("node set: nothing to change: name a flag, such as --group")
		}
		return each(dir, "changed", func(c *httpd.Client, ctx context.Context, name string) error {
			return c.Edit(ctx, name, keys)
		})(cmd, names)
	}
	return cmd
}

func nodeInstall(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "install NODE...",
		Short: "Install nodes anew when they next boot from the network",
		Args:  cobra.MinimumNArgs(1),
		RunE:  each(dir, "installs when it next boots from the network", (*httpd.Client).Install),
	}
}

func nodeRemove(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "rm NODE...",
		Short: "Forget nodes; what is on their disks stays",
		Args:  cobra.MinimumNArgs(1),
		RunE:  each(dir, "forgotten", (*httpd.Client).Delete),
	}
}

// each does something to every node or group that is named and says so. It goes on
// after an error.
func each(dir func() stateDir, done string, do func(*httpd.Client, context.Context, string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, names []string) error {
		return withClient(cmd.Context(), dir(), func(c *httpd.Client) error {
			var errs []error
			for _, name := range names {
				if err := do(c, cmd.Context(), name); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", name, done)
			}
			return errors.Join(errs...)
		})
	}
}

func planCommand(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "plan NODE",
		Short: "Show what an installation would write where, before it does",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withClient(cmd.Context(), dir(), func(c *httpd.Client) error {
				plan, err := c.Plan(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return show(cmd.OutOrStdout(), format, plan, func(w io.Writer) {
					fmt.Fprintln(w, plan.From+":")
					for _, line := range plan.Describe() {
						fmt.Fprintln(w, line)
					}
				})
			})
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

func eventsCommand(dir func() stateDir) *cobra.Command {
	var follow bool
	var format string
	cmd := &cobra.Command{
		Use:   "events [NODE]",
		Short: "Tell what happened on a node, or on all",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			node := strings.Join(args, "")
			print := func(e fleet.NodeEvent) error {
				switch w := cmd.OutOrStdout(); format {
				case "json": // one on each line
					return json.NewEncoder(w).Encode(e)
				case "yaml":
					fmt.Fprintln(w, "---")
					return asYAML(w, e)
				default:
					_, err := fmt.Fprintln(w, line(e))
					return err
				}
			}
			return withClient(cmd.Context(), dir(), func(c *httpd.Client) error {
				err := c.Events(cmd.Context(), node, 0, follow, print)
				if cmd.Context().Err() != nil {
					return nil // whoever follows ends it
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&follow, "follow", false, "go on with what happens from now on")
	outputFlag(cmd, &format)
	return cmd
}

// line is an event for people.
func line(e fleet.NodeEvent) string {
	words := []string{e.Time.Local().Format(time.TimeOnly), e.Node, string(e.Phase), string(e.State)}
	if e.Took > 0 {
		words = append(words, fmt.Sprintf("in %.1f s", e.Took))
	}
	if f := e.Fetch; f != nil && f.Total > 0 {
		words = append(words, fmt.Sprintf("%.0f %% of %s, %s/s from %d peers", 100*float64(f.Done)/float64(f.Total), size(f.Total), size(f.Rate), f.Peers))
	}
	if e.Text != "" {
		words = append(words, printable(e.Text))
	}
	return strings.Join(words, " ")
}

// printable is what a machine said, on one line and without what a terminal
// would obey.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
}
