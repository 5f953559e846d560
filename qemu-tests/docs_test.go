package qemutests

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"rookery/disklayout"
	"rookery/lab"
)

// elsewhere are commands of the documentation that no story runs, and who does.
var elsewhere = map[string]string{
	"make demo":    "the Makefile's own target",
	"make test":    "it runs the stories",
	"make deps":    "the Makefile's targets do, before the stories",
	"install out/": "the stories run the programs from out/bin",
	"mmdebstrap":   "scripts/image does, with the same packages and more",
	"apt-get":      "scripts/kernel fetches the kernel without installing it",
}

// shell gives the commands in the sh blocks of a document.
func shell(t *testing.T, file string) (commands []string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		joined := strings.ReplaceAll(block[1], "\\\n", " ")
		for line := range strings.Lines(joined) {
			line, _, _ = strings.Cut(line, "  #")
			if line = strings.TrimSpace(line); line != "" {
				commands = append(commands, line)
			}
		}
	}
	return commands
}

// records gives the yaml blocks of a document that are records.
func yamlRecords(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, block := range regexp.MustCompile("(?s)```yaml\n(kind:.*?)```").FindAllStringSubmatch(string(text), -1) {
		all = append(all, block[1])
	}
	return strings.Join(all, "---\n")
}

// Every command in the documentation is run by the story below, as it stands
// there, or is in the list of those that something else runs.
func TestFirstSiteAsItIsWritten(t *testing.T) {
	const doc = "../docs/first-site.md"
	s := begin(t, 8*time.Minute, "")
	home, err := filepath.Abs(filepath.Join(s.dir, "home"))
	s.must(err)
	site := reader{site: s, home: home}
	site.prepare(yamlRecords(t, doc))

	var vm *lab.VM
	for _, command := range append(shell(t, "../README.md"), shell(t, doc)...) {
		if site.elsewhere(command) {
			continue
		}
		switch {
		case strings.HasPrefix(command, "rookery initramfs build"):
			// This machine has no kernel of its own to offer.
			site.run(command + " --kernel " + site.made.Kernel + " --modules " + site.made.Modules)
		case strings.HasPrefix(command, "rookery serve"):
			s.server.Flags = strings.Fields(strings.ReplaceAll(command, "lan0", network.Bridge))[2:]
			s.must(s.server.Start(s.ctx))
			vm = site.newMachine("52:54:00:12:34:56")
		case strings.HasPrefix(command, "rookery node accept"):
			site.run(command)
			s.expect(vm.Console, "partition: started")
		case strings.Contains(command, "--follow"):
			site.until(command, "n1 end finished")
		case strings.HasPrefix(command, "ssh "):
			s.until(1, installed)
			s.starts(vm, "Debian GNU/Linux 12")
			if out := site.run(command + " hostname"); strings.TrimSpace(out) != "n1" {
				t.Errorf("%s: the machine says it is %q, want n1", command, out)
			}
		default:
			site.run(command)
		}
	}
	if v, err := s.server.Admin().Node(s.ctx, "n2"); err != nil || v.Next != "install" {
		t.Errorf("n2 of the document's records: %+v, %v", v, err)
	}
}

// A reader does what the documentation says, in a directory of its own.
type reader struct {
	*site
	home string
}

// prepare makes what the reader is taken to have: an image's tarball, a file of
// records, a key to log in with, and the programs in PATH.
func (r *reader) prepare(records string) {
	r.t.Helper()
	r.must(os.MkdirAll(filepath.Join(r.home, ".ssh"), 0o700))
	r.must(os.MkdirAll(filepath.Join(r.home, "bin"), 0o755))
	for _, link := range []struct{ name, to string }{
		{"debian12.tar", r.made.Image}, {"bin/rookery", r.made.Rookery}, {"bin/rookery-agent", r.made.Agent},
	} {
		to, err := filepath.Abs(link.to)
		r.must(err)
		r.must(os.Symlink(to, filepath.Join(r.home, link.name)))
	}
	for _, path := range []*string{&r.made.Kernel, &r.made.Modules} {
		abs, err := filepath.Abs(*path)
		r.must(err)
		*path = abs
	}
	r.must(os.WriteFile(filepath.Join(r.home, "nodes.yaml"), []byte(records), 0o644))
	key := filepath.Join(r.home, ".ssh", "id_ed25519")
	if out, err := exec.CommandContext(r.ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		r.t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	// ssh looks for its files in the home directory of the user database.
	r.must(os.WriteFile(filepath.Join(r.home, "bin", "ssh"), []byte(fmt.Sprintf(`#!/bin/sh
exec /usr/bin/ssh -F /dev/null -i %s -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=10 -o ConnectionAttempts=30 "$@"
`, key)), 0o755))
}

func (r *reader) elsewhere(command string) bool {
	for prefix := range elsewhere {
		if strings.HasPrefix(command, prefix) {
			return true
		}
	}
	return false
}

func (r *reader) shell(command string) *exec.Cmd {
	command = strings.ReplaceAll(command, "/usr/local/bin/", r.home+"/bin/")
	cmd := exec.CommandContext(r.ctx, "sh", "-c", command)
	cmd.Dir = r.home
	state, err := filepath.Abs(r.server.State)
	r.must(err)
	cmd.Env = append(os.Environ(), "HOME="+r.home, "ROOKERY_STATE="+state, "PATH="+r.home+"/bin:"+os.Getenv("PATH"))
	return cmd
}

// run runs a command to its end.
func (r *reader) run(command string) string {
	r.t.Helper()
	var out, complaints bytes.Buffer
	cmd := r.shell(command)
	cmd.Stdout, cmd.Stderr = &out, &complaints
	if err := cmd.Run(); err != nil {
		r.t.Fatalf("%s: %v: %s", command, err, complaints.String())
	}
	return out.String()
}

// until runs a command that does not end by itself until it has said something.
func (r *reader) until(command, words string) {
	r.t.Helper()
	cmd := r.shell("exec " + command)
	said := lab.NewConsole()
	cmd.Stdout, cmd.Stderr = said, said
	r.must(cmd.Start())
	r.expect(said, words)
	cmd.Process.Kill()
	cmd.Wait() // killed
}

// newMachine switches on a machine that nobody knows, and waits until it is in
// the list.
func (r *reader) newMachine(mac string) *lab.VM {
	r.t.Helper()
	vm := &lab.VM{Name: "n1", MAC: mac, Firmware: disklayout.UEFI, Dir: filepath.Join(r.dir, "n1")}
	r.must(network.Plug(vm))
	r.t.Cleanup(vm.PowerOff)
	r.must(vm.PowerOn())
	r.expect(vm.Console, "waiting: this machine is "+mac)
	return vm
}
