package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"rookery/image/imagetest"
	"rookery/server/rsyncd"
)

// The commands of docs/transports.md about rsync do what they say, as they stand
// there, and the first says the others.
func TestRsyncAsItIsWritten(t *testing.T) {
	imagetest.Root(t)
	if err := rsyncd.Available(); err != nil {
		t.Skipf("%v: run as root, with Debian's package rsync", err)
	}
	text, err := os.ReadFile("../../docs/transports.md")
	if err != nil {
		t.Fatal(err)
	}
	home := documentsHome(t)
	// By itself rsync takes two times within one second for the same.
	old := exec.Command("find", filepath.Join(home, "srv/debian12"), "-exec", "touch", "-hd", "2026-01-02 03:04:05.678", "{}", "+")
	if out, err := old.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	state := filepath.Join(home, "state")
	must(t, state, "image", "import", "debian12:1", filepath.Join(home, "srv/debian12"))
	if _, err := run(t, state, "image", "rsync", "debian12:1"); err == nil || !strings.HasSuffix(err.Error(), "start it with 'rookery serve'") {
		t.Errorf("image rsync without a server: %v", err)
	}
	t.Setenv("ROOKERY_RSYNC_SSH_PORT", "2222")
	s := startServerIn(t, state, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET})
	here := strings.NewReplacer("/var/lib/rookery", state, "/mnt/", home+"/mnt/", "192.0.2.1", "127.0.0.1")
	if err := os.Mkdir(filepath.Join(home, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	ran, said := 0, ""
	for _, command := range fenced(string(text), "sh") {
		if !strings.Contains(command, "rsync") {
			continue
		}
		ran++
		cmd := exec.CommandContext(t.Context(), "nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", s.Process.Pid), "sh", "-ec", here.Replace(command))
		cmd.Env = append(os.Environ(), "ROOKERY_STATE="+state, "PATH="+home+"/bin:"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s\n%s", command, err, out, &s.said)
		}
		said += string(out)
	}
	if ran != 4 {
		t.Errorf("%d commands, want what says the three ways, and these", ran)
	}
	want := filepath.Join(home, "want")
	must(t, state, "image", "extract", "debian12:1", want)
	for _, name := range []string{"copy", "copy2", "copy3"} {
		imagetest.Same(t, imagetest.Snapshot(t, filepath.Join(home, "mnt", name)), imagetest.Snapshot(t, want))
	}
	for _, line := range []string{
		"  rsync -aHAX --numeric-ids rsync://127.0.0.1/debian12-1/ DIR\n",
		"  rsync -aHAX --numeric-ids -e \"ssh -p 2222 -o HostKeyAlias=rookery -o UserKnownHostsFile=" + state + "/site/known_hosts\" 127.0.0.1::debian12-1/ DIR\n",
		"  RSYNC_SSL_CA_CERT=" + state + "/site/ca.crt RSYNC_SSL_SKIP_HOSTNAME_CHECK=1 rsync-ssl -aHAX --numeric-ids rsync://127.0.0.1/debian12-1/ DIR\n",
	} {
		if !strings.Contains(said, line) {
			t.Errorf("said %q, want %q in it", said, line)
		}
	}
	if err := s.end(syscall.SIGTERM); err != nil {
		t.Errorf("the server ends with %v\n%s", err, &s.said)
	}
}
