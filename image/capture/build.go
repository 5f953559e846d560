package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// A Build is a root filesystem to be made of a distribution's packages.
type Build struct {
	Tool    string // mmdebstrap or debootstrap; "" for the first that is there
	Suite   string // bookworm
	Variant string // the tool's word for how much; "" is minbase
	Include []string
	Arch    string   // Debian's word; "" for this machine's
	Mirrors []string // "" for the tool's own; debootstrap takes one

	Log io.Writer // what the tool says
}

// tools are those that Run knows, the better first.
var tools = []string{"mmdebstrap", "debootstrap"}

func (b Build) check() (Build, error) {
	if b.Tool == "" {
		for _, tool := range tools {
			if _, err := exec.LookPath(tool); err == nil {
				b.Tool = tool
				break
			}
		}
		if b.Tool == "" {
			return b, errors.New("neither mmdebstrap nor debootstrap is installed: apt-get install mmdebstrap")
		}
	}
	if b.Variant == "" {
		b.Variant = "minbase"
	}
	switch {
	case b.Tool != "mmdebstrap" && b.Tool != "debootstrap":
		return b, fmt.Errorf("tool %q: want mmdebstrap or debootstrap", b.Tool)
	case b.Suite == "":
		return b, errors.New("suite: is missing, as in bookworm")
	case b.Tool == "debootstrap" && len(b.Mirrors) > 1:
		return b, fmt.Errorf("mirror: debootstrap takes one, there are %d: use mmdebstrap", len(b.Mirrors))
	case b.Tool == "debootstrap" && os.Geteuid() != 0:
		return b, fmt.Errorf("debootstrap needs root, this is user %d: use mmdebstrap", os.Geteuid())
	}
	for _, word := range append([]string{b.Suite, b.Variant, b.Arch}, append(b.Mirrors, b.Include...)...) {
		if strings.HasPrefix(word, "-") { // would be an option
			return b, fmt.Errorf("%q begins with a dash", word)
		}
	}
	return b, nil
}

// bootable are the packages that make a machine of minbase, as scripts/image
// has them.
const bootable = "systemd-sysv,udev,dbus,openssh-server,ifupdown,iproute2,iputils-ping,initramfs-tools,kmod,zstd,e2fsprogs," +
	"grub2-common,less,ca-certificates,libcap2-bin"

// Bootable are the packages of Debian that a machine of an architecture, "" for
// this machine's, needs to start by itself and to be reached.
func Bootable(arch string) []string {
	if arch == "" {
		arch = runtime.GOARCH
	}
	packages := append(strings.Split(bootable, ","), "linux-image-"+arch, "grub-efi-"+arch+"-bin")
	if arch == "amd64" {
		packages = append(packages, "grub-pc-bin")
	}
	return packages
}

// GoArch is the architecture as an image says it; "" is this machine's.
func (b Build) GoArch() string {
	if arch, ok := map[string]string{"i386": "386", "armhf": "arm", "armel": "arm", "ppc64el": "ppc64le"}[b.Arch]; ok {
		return arch
	}
	return b.Arch
}

// String is the build in one line, as a version's source.
func (b Build) String() string {
	words := []string{b.Tool, b.Suite, "--variant=" + b.Variant}
	if len(b.Include) > 0 {
		words = append(words, "--include="+strings.Join(b.Include, ","))
	}
	if b.Arch != "" {
		words = append(words, "--arch="+b.Arch)
	}
	return strings.Join(append(words, b.Mirrors...), " ")
}

// args are those of the tool that make out: a tarball by mmdebstrap, a directory
// by debootstrap.
func (b Build) args(out string) []string {
	args := []string{"--variant=" + b.Variant}
	if len(b.Include) > 0 {
		args = append(args, "--include="+strings.Join(b.Include, ","))
	}
	if b.Tool == "debootstrap" {
		if b.Arch != "" {
			args = append(args, "--arch="+b.Arch)
		}
		return append(append(args, b.Suite, out), b.Mirrors...)
	}
	mode := "root"
	if os.Geteuid() != 0 {
		mode = "unshare"
	}
	args = append(args, "--mode="+mode, "--format=tar")
	if b.Arch != "" {
		args = append(args, "--architectures="+b.Arch)
	}
	return append(append(args, b.Suite, out), b.Mirrors...)
}

// Run makes the root filesystem below the directory temp and calls use with the
// path of its tarball or directory, and with b as it was carried out. Nothing
// of it is there afterwards.
func (b Build) Run(ctx context.Context, temp string, use func(path string, b Build) error) (err error) {
	if b, err = b.check(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(temp, ".build-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// apt fetches as a user of its own, and that of mmdebstrap's namespace is
	// another again: both have to come through.
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	out := filepath.Join(dir, "root")
	if b.Tool == "mmdebstrap" {
		out += ".tar"
	}
	if err := b.run(ctx, dir, out); err != nil {
		return err
	}
	return use(out, b)
}

func (b Build) run(ctx context.Context, dir, out string) error {
	var said tail
	cmd := exec.CommandContext(ctx, b.Tool, b.args(out)...)
	cmd.Stdout = io.MultiWriter(b.Log, &said)
	cmd.Stderr = cmd.Stdout
	cmd.Env = os.Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		cmd.Env = append(cmd.Env, "TMPDIR="+dir)
		// The tools mount /dev and more below dir. In mounts of their own nothing
		// of that is left, or deleted, when they are killed.
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	// mmdebstrap waits for its children when it gets the terminal's ^C.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = 20 * time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // who did not heed: an error is that nobody is left
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", b.Tool, err, &said)
	}
	return nil
}
