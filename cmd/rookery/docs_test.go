package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
)

// elsewhere are commands of docs/images.md that need more than a small tree, and
// the tests that run their like.
var elsewhere = []struct{ prefix, dir, test string }{
	{"rookery image import debian12 docker.io/", "image/registry", "TestSources"},
	{"rookery image build ", "image/capture", "TestBuild"},
	{"rookery image capture ", "image/capture", "TestCapture"},
	{"rookery image shell ", "image/chroot", "TestDebian"},
	{"podman load ", "image/registry", "TestPodmanRuns"},
}

// Every command of docs/images.md does what it says, as it stands there and in
// that order, or a test that is named does; and it says what it is said to say.
func TestImagesAsItIsWritten(t *testing.T) {
	text, err := os.ReadFile("../../docs/images.md")
	if err != nil {
		t.Fatal(err)
	}
	home := documentsHome(t)
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	here := strings.NewReplacer("/var/lib/rookery", home+"/state", "/srv/", home+"/srv/", "/mnt/", home+"/mnt/",
		"registry.example.org:5000", strings.TrimPrefix(server.URL, "http://"))
	var said []string
	missed := make([]bool, len(elsewhere))
	for i := range missed {
		missed[i] = true
	}
	for _, command := range fenced(string(text), "sh") {
		if i := slices.IndexFunc(elsewhere, func(e struct{ prefix, dir, test string }) bool { return strings.HasPrefix(command, e.prefix) }); i >= 0 {
			missed[i] = false
			continue
		}
		for line := range strings.Lines(typed(t, home, here.Replace(command))) {
			said = append(said, unnumbered(line))
		}
	}
	for _, line := range fenced(string(text), "") {
		if strings.HasPrefix(line, "debian12:") && !slices.Contains(said, unnumbered(line+"\n")) {
			t.Errorf("no command says %q", line)
		}
	}
	for i, e := range elsewhere {
		if missed[i] {
			t.Errorf("no command of the document begins with %q any more", e.prefix)
		}
		if !hasTest(t, e.dir, e.test) {
			t.Errorf("%q: there is no %s in %s", e.prefix, e.test, e.dir)
		}
	}
}

// Every command of docs/groups.md does what it says, with the files that stand
// there; and what it is said to say is among what it says.
func TestGroupsAsItIsWritten(t *testing.T) {
	text, err := os.ReadFile("../../docs/groups.md")
	if err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	if err := errors.Join(installed(home), os.Mkdir(filepath.Join(home, "site"), 0o755), os.Rename(published(t), filepath.Join(home, "state"))); err != nil {
		t.Fatal(err)
	}
	files := regexp.MustCompile("(?sm)^```yaml\n# (\\S+)\n(.*?)^```").FindAllStringSubmatch(string(text), -1)
	if len(files) != 2 {
		t.Errorf("the document has %d files", len(files))
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(home, f[1]), []byte(f[2]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var said []string
	for _, command := range fenced(string(text), "sh") {
		for line := range strings.Lines(typed(t, home, command)) {
			said = append(said, strings.Join(strings.Fields(line), " "))
		}
	}
	for _, line := range fenced(string(text), "") {
		if !slices.Contains(said, strings.Join(strings.Fields(line), " ")) {
			t.Errorf("no command says %q", line)
		}
	}
}

// typed is what a command of a document says, in home.
func typed(t *testing.T, home, command string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-ec", command)
	cmd.Dir = home
	cmd.Env = append(os.Environ(), "ROOKERY_STATE="+home+"/state", "PATH="+home+"/bin:"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	t.Logf("%s\n%s", command, out)
	return string(out)
}

// fenced gives the lines of a document's blocks of that language, without
// comments.
func fenced(text, language string) (lines []string) {
	for _, block := range regexp.MustCompile("(?sm)^```(\\w*)\n(.*?)^```").FindAllStringSubmatch(text, -1) {
		if block[1] != language {
			continue
		}
		for line := range strings.Lines(strings.ReplaceAll(block[2], "\\\n", " ")) {
			line, _, _ = strings.Cut(line, " # ")
			if line = strings.TrimSpace(line); line != "" {
				lines = append(lines, line)
			}
		}
	}
	return lines
}

// unnumbered is a line without what is different each time.
func unnumbered(line string) string {
	return regexp.MustCompile(`[0-9.]+( [KMG]?i?B\b)?`).ReplaceAllString(line, "N")
}

// documentsHome is a directory with what the reader of docs/images.md is taken to
// have: a root filesystem in all the forms that it can have, and the program.
func documentsHome(t *testing.T) string {
	t.Helper()
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, "srv"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(rootfs(t), filepath.Join(home, "srv/debian12")); err != nil {
		t.Fatal(err)
	}
	before := filepath.Join(t.TempDir(), "state")
	must(t, before, "image", "import", "debian12", filepath.Join(home, "srv/debian12"))
	for _, dest := range []string{"tar:debian12.tar.zst", "docker-archive:debian12.tar", "oci:debian12.layout", "oci-archive:debian12.oci"} {
		scheme, name, _ := strings.Cut(dest, ":")
		must(t, before, "image", "export", "debian12", scheme+":"+filepath.Join(home, name))
	}
	if err := installed(home); err != nil {
		t.Fatal(err)
	}
	return home
}

// installed puts the program into the directory bin of home.
func installed(home string) error {
	self, err := os.Executable()
	program := fmt.Sprintf("#!/bin/sh\n%s=1 exec %s \"$@\"\n", asProgram, self)
	return errors.Join(err, os.Mkdir(filepath.Join(home, "bin"), 0o755), os.WriteFile(filepath.Join(home, "bin/rookery"), []byte(program), 0o755))
}

func hasTest(t *testing.T, dir, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../..", dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(files, func(file string) bool {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(text), "func "+name+"(")
	})
}
