// Package netnstest runs tests in a network of their own, where port 67 is free
// and links can be made, as root or as anybody.
package netnstest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// again marks the second life of a test binary.
const again = "ROOKERY_IN_NETNS"

// Inside reports whether the test t runs in a new user and network namespace.
// When it does not, Inside runs t there, in a second life of the test binary,
// and ends as that does: the caller has nothing left to do.
func Inside(t *testing.T) bool {
	t.Helper()
	if os.Getenv(again) == t.Name() {
		return true
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), again+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	var ended *exec.ExitError
	switch {
	case err == nil && bytes.Contains(out, []byte("--- SKIP: "+t.Name())):
		t.Skipf("in the namespace: %s", out)
	case err == nil:
		t.Logf("%s", out)
	case errors.As(err, &ended):
		t.Fatalf("in the namespace: %v\n%s", err, out)
	default:
		t.Skipf("no user namespace here (%v): allow kernel.unprivileged_userns_clone, or run as root", err)
	}
	return false
}
