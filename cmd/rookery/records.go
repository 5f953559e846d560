package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"rookery/server/fleet"
	"rookery/server/httpd"
)

// fromFlag gives a command that reads records the flag that says from where.
func fromFlag(cmd *cobra.Command, from *[]string) {
	cmd.Flags().StringArrayVarP(from, "filename", "f", nil, "file or directory to read, - for standard input; repeatable (required)")
	cmd.MarkFlagRequired("filename")
}

func applyCommand(dir func() stateDir) *cobra.Command {
	var from []string
	cmd := &cobra.Command{
		Use:   "apply -f FILE|DIR",
		Short: "Save the records in YAML files: nodes, groups, layouts, defaults",
		Long: `Save the records in YAML files: nodes, groups, layouts, defaults. Of a directory all
files that end in .yaml or .yml are read, and of directories in it. Nothing is saved
unless all of it is right; records that no file is about stay.`,
		Example: `  rookery apply -f nodes.yaml

  # nodes.yaml
  kind: Node
  name: n1
  macs: ["52:54:00:12:34:56"]
  groups: [compute]
  address: 10.7.0.11/24
  ---
  kind: Group
  name: compute
  image: debian12
  transports: [bittorrent, http]`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return sendRecords(cmd, dir(), from, (*httpd.Client).Apply)
		},
	}
	fromFlag(cmd, &from)
	return cmd
}

func diffCommand(dir func() stateDir) *cobra.Command {
	var from []string
	cmd := &cobra.Command{
		Use:   "diff -f FILE|DIR",
		Short: "Show what 'rookery apply' would change",
		Long: `Show what 'rookery apply' would change: a line for each new record and for each
key of one that is there.`,
		Example: "  rookery diff -f site/",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return sendRecords(cmd, dir(), from, (*httpd.Client).Diff)
		},
	}
	fromFlag(cmd, &from)
	return cmd
}

// sendRecords reads records, gives them to do, and prints the lines it returns.
func sendRecords(cmd *cobra.Command, dir stateDir, from []string, do func(*httpd.Client, context.Context, ...fleet.File) ([]string, error)) error {
	files, err := readRecords(from, cmd.InOrStdin())
	if err != nil {
		return fmt.Errorf("%s: %w", cmd.Name(), err)
	}
	return withClient(cmd.Context(), dir, func(c *httpd.Client) error {
		lines, err := do(c, cmd.Context(), files...)
		if err != nil {
			return err
		}
		if len(lines) == 0 {
			lines = []string{"nothing to change"}
		}
		fmt.Fprintln(cmd.OutOrStdout(), strings.Join(lines, "\n"))
		return nil
	})
}

func readRecords(from []string, stdin io.Reader) ([]fleet.File, error) {
	var files []fleet.File
	add := func(name string, r io.Reader) error {
		b, err := io.ReadAll(io.LimitReader(r, fleet.MaxApply+1))
		if err == nil && len(b) > fleet.MaxApply {
			err = fmt.Errorf("%s: more than %d bytes", name, fleet.MaxApply)
		}
		files = append(files, fleet.File{Name: name, Data: string(b)})
		return err
	}
	for _, path := range from {
		if path == "-" {
			if err := add("standard input", stdin); err != nil {
				return nil, err
			}
			continue
		}
		err := filepath.WalkDir(path, func(file string, d fs.DirEntry, err error) error {
			ext := filepath.Ext(file)
			if err != nil || d.IsDir() || file != path && ext != ".yaml" && ext != ".yml" {
				return err
			}
			f, err := os.Open(file)
			if err != nil {
				return err
			}
			defer f.Close()
			return add(file, f)
		})
		if err != nil {
			return nil, err
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s: no .yaml or .yml file", strings.Join(from, ", "))
	}
	return files, nil
}

func getCommand(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "get [KIND [NAME]]",
		Short: "Show records: nodes, groups, layouts, defaults",
		Long: `Show records. KIND is node, group, layout or defaults. As YAML they are what
'rookery apply' takes.`,
		Example: `  rookery get group compute -o yaml
  rookery get -o yaml > site.yaml`,
		Args: cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, name := append(args, "", "")[0], append(args, "", "")[1]
			return withClient(cmd.Context(), dir(), func(c *httpd.Client) error {
				all, err := c.Records(cmd.Context(), kind, name)
				if err != nil {
					return err
				}
				if format == "yaml" {
					return documents(cmd.OutOrStdout(), all)
				}
				return show(cmd.OutOrStdout(), format, all, func(w io.Writer) {
					fmt.Fprintln(w, "KIND\tNAME")
					for _, record := range all {
						var head struct{ Kind, Name string }
						_ = json.Unmarshal(record, &head) // the server's own
						fmt.Fprintf(w, "%s\t%s\n", head.Kind, head.Name)
					}
				})
			})
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

// documents writes each record as a document of its own.
func documents(w io.Writer, records []json.RawMessage) error {
	for i, record := range records {
		if i > 0 {
			fmt.Fprintln(w, "---")
		}
		if err := asYAML(w, record); err != nil {
			return err
		}
	}
	return nil
}

func groupCommand(dir func() stateDir) *cobra.Command {
	return group("group", "List and remove groups of nodes", groupList(dir), groupRemove(dir))
}

func groupList(dir func() stateDir) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List all groups and the nodes in them; 'rookery get group' shows what they say",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withClient(cmd.Context(), dir(), func(c *httpd.Client) error {
				all, err := c.Groups(cmd.Context())
				if err != nil {
					return err
				}
				return show(cmd.OutOrStdout(), format, all, func(w io.Writer) {
					fmt.Fprintln(w, "GROUP\tPRIORITY\tNODES")
					for _, g := range all {
						fmt.Fprintf(w, "%s\t%d\t%s\n", g.Name, g.Priority, strings.Join(g.Nodes, ", "))
					}
				})
			})
		},
	}
	outputFlag(cmd, &format)
	return cmd
}

func groupRemove(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "rm GROUP...",
		Short: "Forget groups that no node is in",
		Args:  cobra.MinimumNArgs(1),
		RunE:  each(dir, "forgotten", (*httpd.Client).DeleteGroup),
	}
}
