package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// configured runs a command with the flags of a small server and returns what
// they ended up as.
func configured(t *testing.T, file string, env map[string]string, args ...string) (pool string, dns []string, err error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rookery.yaml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	root := &cobra.Command{Use: "rookery", SilenceErrors: true, SilenceUsage: true}
	root.PersistentFlags().String("config", defaultConfig, "")
	serve := &cobra.Command{Use: "serve", RunE: func(cmd *cobra.Command, _ []string) error {
		return configure(cmd, func(k string) (string, bool) { v, ok := env[k]; return v, ok })
	}}
	serve.Flags().StringVar(&pool, "pool", "default", "")
	serve.Flags().StringSliceVar(&dns, "dns", nil, "")
	serve.Flags().Int("lease-time", 3600, "")
	root.AddCommand(serve)
	root.SetArgs(append([]string{"serve", "--config", path}, args...))
	err = root.Execute()
	if err != nil {
		err = &shortened{strings.ReplaceAll(err.Error(), path, "FILE")}
	}
	return pool, dns, err
}

type shortened struct{ string }

func (s *shortened) Error() string { return s.string }

func TestConfigurePrecedence(t *testing.T) {
	file, env := "pool: file\ndns: [10.0.0.1, 10.0.0.2]\n", map[string]string{"ROOKERY_POOL": "env"}
	for _, tt := range []struct {
		name string
		file string
		env  map[string]string
		args []string
		want string
	}{
		{name: "nothing", want: "default"},
		{name: "file", file: file, want: "file"},
		{name: "environment before file", file: file, env: env, want: "env"},
		{name: "flag before environment", file: file, env: env, args: []string{"--pool", "flag"}, want: "flag"},
	} {
		pool, dns, err := configured(t, tt.file, tt.env, tt.args...)
		if err != nil || pool != tt.want {
			t.Errorf("%s: pool is %q, %v; want %q", tt.name, pool, err, tt.want)
		}
		if tt.file != "" && strings.Join(dns, " ") != "10.0.0.1 10.0.0.2" {
			t.Errorf("%s: dns is %q", tt.name, dns)
		}
	}
}

func TestConfigureNamesFileLineKeyAndReason(t *testing.T) {
	for _, tt := range []struct {
		file string
		env  map[string]string
		want string
	}{
		{file: "\npolo: x\n", want: `config: FILE: line 2: unknown key "polo"`},
		{file: "pool: a\npool: b\n", want: `config: FILE: line 2: key "pool" stands twice`},
		{file: "pool: {a: b}\n", want: `config: FILE: line 1: pool: want one value or a list of values`},
		{file: "- pool\n", want: `config: FILE: line 1: want keys and values`},
		{file: "lease-time: soon\n", want: `config: FILE: line 1: lease-time: "soon": `},
		{env: map[string]string{"ROOKERY_LEASE_TIME": "soon"}, want: `config: ROOKERY_LEASE_TIME: "soon": `},
		{file: "pool: [", want: "config: FILE: yaml: line 1"},
	} {
		_, _, err := configured(t, tt.file, tt.env)
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("file %q, environment %v: %v, want %s", tt.file, tt.env, err, tt.want)
		}
	}
}

func TestConfigureMissesTheFileThatWasNamed(t *testing.T) {
	root := &cobra.Command{Use: "rookery", RunE: func(cmd *cobra.Command, _ []string) error {
		return configure(cmd, func(string) (string, bool) { return "", false })
	}, SilenceErrors: true, SilenceUsage: true}
	root.Flags().String("config", defaultConfig, "")
	root.SetArgs([]string{"--config", "/nonexistent/rookery.yaml"})
	if err := root.Execute(); err == nil || !strings.Contains(err.Error(), "/nonexistent/rookery.yaml") {
		t.Errorf("configure: %v, want the file named", err)
	}
}

func FuzzSettings(f *testing.F) {
	f.Add([]byte("pool: a\ndns: [b, c]\n"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		settings(b, map[string]bool{"pool": true, "dns": true})
	})
}
