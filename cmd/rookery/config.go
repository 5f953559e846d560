package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// defaultConfig is read when --config names no other file; it may be absent.
const defaultConfig = "/etc/rookery/rookery.yaml"

// envPrefix begins the environment variable of every flag: --state-dir is
// ROOKERY_STATE_DIR.
const envPrefix = "ROOKERY_"

// configure gives the flags of cmd that the command line left alone the values
// of the environment, or else of the configuration file. The file's keys are
// the names of the server's flags and of those that all commands have; any other
// key is refused. What a command does to one node is said on the command line
// only: serve's --address is not that of every node.
func configure(cmd *cobra.Command, environ func(string) (string, bool)) error {
	path, _ := cmd.Flags().GetString("config")
	if v, ok := environ(envName("config")); ok && !cmd.Flags().Changed("config") {
		path = v
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && path == defaultConfig {
		b, err = nil, nil
	}
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	keys := known(cmd.Root())
	file, err := settings(b, keys)
	if err != nil {
		return fmt.Errorf("config: %s: %w", path, err)
	}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Changed || err != nil || !keys[f.Name] || cmd.Name() != serveName && cmd.InheritedFlags().Lookup(f.Name) == nil {
			return
		}
		from, value := envName(f.Name), ""
		if v, ok := environ(from); ok {
			value = v
		} else if s, ok := file[f.Name]; ok {
			from, value = fmt.Sprintf("%s: line %d: %s", path, s.line, f.Name), s.value
		} else {
			return
		}
		if bad := cmd.Flags().Set(f.Name, value); bad != nil {
			err = fmt.Errorf("config: %s: %q: %w", from, value, reason(bad))
		}
	})
	return err
}

func envName(flag string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// known is the names of the flags that can be set by file and environment.
func known(root *cobra.Command) map[string]bool {
	names := map[string]bool{}
	add := func(f *pflag.Flag) { names[f.Name] = true }
	root.PersistentFlags().VisitAll(add)
	for _, cmd := range root.Commands() {
		if cmd.Name() == serveName {
			cmd.LocalFlags().VisitAll(add)
		}
	}
	delete(names, "help")
	delete(names, "config")
	return names
}

type setting struct {
	value string
	line  int
}

// settings reads a configuration file: a mapping of known names to scalars or
// lists of scalars.
func settings(b []byte, known map[string]bool) (map[string]setting, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, err
	}
	if doc.Kind == 0 {
		return nil, nil // empty
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("line %d: want keys and values", root.Line)
	}
	all := map[string]setting{}
	for i := 0; i < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		if !known[key.Value] {
			return nil, fmt.Errorf("line %d: unknown key %q", key.Line, key.Value)
		}
		if _, twice := all[key.Value]; twice {
			return nil, fmt.Errorf("line %d: key %q stands twice", key.Line, key.Value)
		}
		words := []*yaml.Node{value}
		if value.Kind == yaml.SequenceNode {
			words = value.Content
		}
		var text []string
		for _, w := range words {
			if w.Kind != yaml.ScalarNode {
				return nil, fmt.Errorf("line %d: %s: want one value or a list of values", w.Line, key.Value)
			}
			text = append(text, w.Value)
		}
		all[key.Value] = setting{strings.Join(text, ","), key.Line}
	}
	return all, nil
}
