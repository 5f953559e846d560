package capture

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// A tree of real packages, from wherever this machine gets its own. What only
// unpacks is quick, and has no scripts that would need more.
func TestBuild(t *testing.T) {
	if testing.Short() {
		t.Skip("fetches packages: run it without -short")
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Fatalf("%v: make deps", err)
	}
	temp := t.TempDir()
	if err := os.Chmod(filepath.Dir(temp), 0o755); err != nil { // for the users that fetch and unpack
		t.Fatal(err)
	}
	var log bytes.Buffer
	found := false
	err := Build{Suite: "bookworm", Variant: "extract", Include: []string{"hostname"}, Log: &log}.Run(t.Context(), temp, func(path string, b Build) error {
		if want := "mmdebstrap bookworm --variant=extract --include=hostname"; b.String() != want {
			t.Errorf("%q, want %q", b, want)
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for r := tar.NewReader(f); ; {
			h, err := r.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			found = found || h.Name == "./bin/hostname"
		}
	})
	if err != nil || !found {
		t.Errorf("%v, hostname found: %v\n%s", err, found, log.Bytes())
	}
	nothing(t, temp)
	if left := mountsBelow(t, temp); len(left) > 0 {
		t.Errorf("still mounted: %q", left)
	}
}

// nothing checks that nothing is left in a directory.
func nothing(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// tool puts a program before all others in PATH.
func tool(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestBuildFails(t *testing.T) {
	tool(t, "mmdebstrap", "echo I: fetching; echo E: no such suite >&2; exit 25")
	temp := t.TempDir()
	var log bytes.Buffer
	err := Build{Suite: "x", Log: &log}.Run(t.Context(), temp, nil)
	if err == nil || !strings.Contains(err.Error(), "mmdebstrap: exit status 25") || !strings.Contains(err.Error(), "E: no such suite") {
		t.Errorf("%v, want the status and what was said", err)
	}
	if log.String() != "I: fetching\nE: no such suite\n" {
		t.Errorf("log: %q", log.String())
	}
	nothing(t, temp)
}

// The tool gets time to clean up, and its children go with it.
func TestBuildIsGivenUp(t *testing.T) {
	tool(t, "mmdebstrap", "trap 'echo cleaned; exit 1' INT\necho began\nfor a; do :; done; : >\"$a\"\nwhile :; do sleep 0.1; done")
	temp := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	var log bytes.Buffer
	err := Build{Suite: "x", Log: writerFunc(func(b []byte) {
		log.Write(b)
		cancel()
	})}.Run(ctx, temp, nil)
	if !errors.Is(err, context.Canceled) || log.String() != "began\ncleaned\n" {
		t.Errorf("%v, said %q, want %v and time to clean up", err, log.String(), context.Canceled)
	}
	nothing(t, temp)
}

func TestBuildArguments(t *testing.T) {
	for _, tt := range []struct {
		build Build
		want  []string
		err   string
	}{
		{Build{Tool: "debootstrap", Suite: "bookworm", Arch: "arm64", Include: []string{"a", "b"}, Mirrors: []string{"http://m/"}},
			[]string{"--variant=minbase", "--include=a,b", "--arch=arm64", "bookworm", "OUT", "http://m/"}, ""},
		{Build{Tool: "debootstrap", Suite: "x", Mirrors: []string{"a", "b"}}, nil, "debootstrap takes one, there are 2"},
		{Build{Tool: "rpmstrap", Suite: "x"}, nil, `tool "rpmstrap": want mmdebstrap or debootstrap`},
		{Build{Tool: "mmdebstrap"}, nil, "suite: is missing"},
		{Build{Tool: "mmdebstrap", Suite: "--help"}, nil, `"--help" begins with a dash`},
		{Build{Tool: "mmdebstrap", Suite: "x", Mirrors: []string{"--setup-hook=reboot"}}, nil, "begins with a dash"},
	} {
		b, err := tt.build.check()
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%+v: %v, want %q", tt.build, err, tt.err)
			}
			continue
		}
		if os.Geteuid() != 0 && b.Tool == "debootstrap" {
			continue
		}
		if err != nil || !reflect.DeepEqual(b.args("OUT"), tt.want) {
			t.Errorf("%+v: %q, %v, want %q", tt.build, b.args("OUT"), err, tt.want)
		}
	}
}
