package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"rookery/image/capture"
	"rookery/image/oci"
)

type captor struct {
	options, identities          []string
	port                         uint16
	noSnapshot, treeOnly, dryRun bool
	excludes                     excludeFlags
}

func imageCapture(dir func() stateDir) *cobra.Command {
	var c captor
	cmd := &cobra.Command{
		Use:   "capture NAME[:TAG] [root@]HOST[:PORT]",
		Short: "Make a version of a machine that runs, over ssh",
		Long: `Make a version of a machine that runs, over ssh.

The machine needs sshd and rsync, and nothing remains there. Its files come into the
tree NAME, in the directory trees of --state; a second capture fetches only what has
changed since. Filesystems on LVM, where the volume group has free extents, and on
btrfs are read from a snapshot of one moment. Files of others that change during the
capture are named afterwards.

The machine's disk layout becomes the image's where it can be expressed. All that it
says of itself is kept beside the tree, in NAME.facts.json.
` + excludesHelp,
		Example: `  rookery image capture debian12 root@golden
  rookery image capture debian12 golden:2222 --identity ~/.ssh/golden --exclude '/home/*'`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: words(completeImages(dir), cobra.NoFileCompletions),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkNewName(args[0]); err != nil {
				return err
			}
			if err := c.capture(cmd, dir(), args[0], args[1]); err != nil {
				return fmt.Errorf("capture %s: %w", args[0], err)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.Uint16Var(&c.port, "port", 0, "port of its sshd")
	f.StringArrayVarP(&c.identities, "identity", "i", nil, "file with the key to log in with")
	f.StringArrayVar(&c.options, "ssh-option", nil, "option of ssh, as in its -o; repeatable")
	f.BoolVar(&c.noSnapshot, "no-snapshot", false, "read all filesystems as they change")
	f.BoolVar(&c.treeOnly, "tree-only", false, "fetch the files, publish nothing")
	f.BoolVar(&c.dryRun, "dry-run", false, "only say what would be captured, and how")
	c.excludes.add(cmd)
	return cmd
}

// remote is how the client is reached. Only at a terminal can ssh ask anything.
func (c captor) remote(address string) capture.Remote {
	r := capture.Remote{Address: address, Ask: term.IsTerminal(int(os.Stdin.Fd()))}
	if c.port != 0 {
		r.Options = append(r.Options, "-p", fmt.Sprint(c.port))
	}
	for _, file := range c.identities {
		r.Options = append(r.Options, "-i", file)
	}
	for _, o := range c.options {
		r.Options = append(r.Options, "-o", o)
	}
	return r
}

func (c captor) capture(cmd *cobra.Command, dir stateDir, name, address string) (err error) {
	ctx, out := cmd.Context(), cmd.OutOrStdout()
	repo, _, _ := strings.Cut(name, ":")
	path := dir.tree(repo)
	excludes, err := c.excludes.of(dir, name)
	if err != nil {
		return err
	}
	s, err := capture.Connect(ctx, c.remote(address))
	if err != nil {
		return err
	}
	defer s.Close() // again: after an error
	plan := capture.NewPlan(s.Facts, excludes, !c.noSnapshot)
	layout, noLayout := s.Facts.Layout()
	if c.dryRun {
		for _, line := range plan.Describe() {
			fmt.Fprintln(out, line)
		}
		if noLayout != nil {
			fmt.Fprintf(out, "disk layout: cannot be taken over: %v\n", noLayout)
		} else {
			fmt.Fprintf(out, "disk layout: %d partitions, for %s\n", len(layout.Partitions), s.Facts.Firmware)
		}
		return nil
	}
	began := time.Now()
	captured := began.UTC().Format(time.RFC3339)
	if err := noteFacts(path, address, captured, s.Facts); err != nil {
		return err
	}
	m := startMeter(cmd, "capture "+address, 0)
	defer m.stop()
	r, err := s.Capture(ctx, plan, path, m.set)
	m.stop()
	if err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s: %d files in %s; %d fetched, %d deleted, %s received, in %.1f s\n",
		address, r.Files, path, r.Sent, r.Deleted, size(r.Received), time.Since(began).Seconds())
	warn(cmd.ErrOrStderr(), r)
	if noLayout != nil {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: the disk layout cannot be taken over, nodes without one get the default: %v\n", noLayout)
	}
	if c.treeOnly {
		return nil
	}
	labels := map[string]string{
		oci.LabelSource: address, oci.LabelHost: s.Facts.Host, oci.LabelCaptured: captured,
		oci.LabelFirmware: string(s.Facts.Firmware), oci.LabelLayout: "",
	}
	if noLayout == nil {
		text, err := json.Marshal(layout)
		if err != nil {
			return err
		}
		labels[oci.LabelLayout] = string(text)
	}
	images, err := openImages(dir)
	if err != nil {
		return err
	}
	return publisher{excludes: c.excludes, comment: "captured from " + address, labels: labels}.publish(cmd, images, dir, path, name)
}

// noteFacts writes what a client says of itself beside the tree that its files
// come into: also the sign that what is there may be overwritten.
func noteFacts(path, address, captured string, facts capture.Facts) error {
	file := filepath.Clean(path) + ".facts.json"
	if _, err := os.Lstat(path); err == nil {
		if _, err := os.Lstat(file); err != nil {
			return fmt.Errorf("%s is there and not from a capture: remove it, or capture under another name", path)
		}
	}
	text, err := json.MarshalIndent(struct {
		Source   string        `json:"source"`
		Captured string        `json:"captured"`
		Facts    capture.Facts `json:"facts"`
	}{address, captured, facts}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o600)
}

// mostNamed is how many files a warning names.
const mostNamed = 20

// warn names what may not be of one moment.
func warn(w io.Writer, r capture.Result) {
	if len(r.Changed) == 0 {
		return
	}
	fmt.Fprintf(w, "warning: %d files changed during the capture, since these filesystems have no snapshot: %s\n",
		len(r.Changed), strings.Join(r.Plan.Live(), "; "))
	for _, name := range r.Changed[:min(len(r.Changed), mostNamed)] {
		fmt.Fprintf(w, "  %s\n", name)
	}
	if more := len(r.Changed) - mostNamed; more > 0 {
		fmt.Fprintf(w, "  and %d more\n", more)
	}
}
