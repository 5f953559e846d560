package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
)

// Made is what make has made: paths of programs and files.
type Made struct {
	Rookery, Agent  string
	Image           string // tarball of a root filesystem
	Kernel, Modules string
	Cache           string // directory, for the published image
}

// In is where the Makefile puts things, below a directory such as "out".
func In(out string) Made {
	return Made{
		Rookery: filepath.Join(out, "bin", "rookery"),
		Agent:   filepath.Join(out, "bin", "rookery-agent"),
		Image:   filepath.Join(out, "cache", "debian12.tar"),
		Kernel:  filepath.Join(out, "cache", "kernel", "vmlinuz"),
		Modules: filepath.Join(out, "cache", "kernel", "modules"),
		Cache:   filepath.Join(out, "cache", "published"),
	}
}

// Check says what is missing.
func (m Made) Check() error {
	for _, path := range []string{m.Rookery, m.Agent, m.Image, m.Kernel, m.Modules} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%w: make build kernel image", err)
		}
	}
	return nil
}

// Publish gives the server's state directory the image, as name. Publishing
// takes long, so it is done once for a tarball and a program, and kept.
func (m Made) Publish(ctx context.Context, s *Server, name string) error {
	key, err := m.key()
	if err != nil {
		return err
	}
	kept := filepath.Join(m.Cache, key)
	if _, err := os.Stat(kept); errors.Is(err, fs.ErrNotExist) {
		if err := os.RemoveAll(m.Cache); err != nil { // older ones
			return err
		}
		making := &Server{Program: s.Program, State: kept + ".new"}
		if _, err := making.Run(ctx, "image", "import", name, m.Image); err != nil {
			return err
		}
		if err := os.Rename(making.State, kept); err != nil {
			return err
		}
	}
	// Links: blobs never change, and what changes is written beside and renamed.
	return s.copy(ctx, filepath.Join(kept, "images"), "-al")
}

// copy copies a directory into the state directory by cp(1).
func (s *Server) copy(ctx context.Context, from, how string) error {
	if err := os.MkdirAll(s.State, 0o755); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", how, from, s.State).CombinedOutput(); err != nil {
		return fmt.Errorf("cp %s: %w: %s", from, err, last(out))
	}
	return nil
}

// key changes with the tarball and with the program that publishes it.
func (m Made) key() (string, error) {
	sum := sha256.New()
	tar, err := os.Stat(m.Image)
	if err != nil {
		return "", err
	}
	fmt.Fprintln(sum, tar.Size(), tar.ModTime().UnixNano())
	program, err := os.Open(m.Rookery)
	if err != nil {
		return "", err
	}
	defer program.Close()
	if _, err := io.Copy(sum, program); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", sum.Sum(nil)[:8]), nil
}

// Netboot gives the state directory the kernel and an initramfs that trusts
// its site.
func (m Made) Netboot(ctx context.Context, s *Server) error {
	_, err := s.Run(ctx, "initramfs", "build", "--kernel", m.Kernel, "--modules", m.Modules, "--profile", "vm", "--agent", m.Agent)
	return err
}
