package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// Made is what make has made: paths of programs and files.
type Made struct {
	Rookery, Agent  string
	Image           string // tarball of a root filesystem
	Kernel, Modules string
}

// In is where the Makefile puts things, below a directory such as "out".
func In(out string) Made {
	return Made{
		Rookery: filepath.Join(out, "bin", "rookery"),
		Agent:   filepath.Join(out, "bin", "rookery-agent"),
		Image:   filepath.Join(out, "cache", "debian12.tar"),
		Kernel:  filepath.Join(out, "cache", "kernel", "vmlinuz"),
		Modules: filepath.Join(out, "cache", "kernel", "modules"),
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

// Publish puts the image into the state directory, as name.
func (m Made) Publish(ctx context.Context, s *Server, name string) error {
	_, err := s.Run(ctx, "image", "import", name, m.Image)
	return err
}

// Netboot puts the kernel there, and an initramfs that trusts the site.
func (m Made) Netboot(ctx context.Context, s *Server) error {
	_, err := s.Run(ctx, "initramfs", "build", "--kernel", m.Kernel, "--modules", m.Modules, "--profile", "vm", "--agent", m.Agent)
	return err
}
