package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"rookery/initramfs"
	"rookery/server/site"
)

func initramfsCommand(dir func() stateDir) *cobra.Command {
	cmd := &cobra.Command{Use: "initramfs", Short: "Build what the machines boot"}
	cmd.AddCommand(initramfsBuild(dir))
	return cmd
}

func initramfsBuild(dir func() stateDir) *cobra.Command {
	var kernel, modules, agent, profile string
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Pack the agent, a kernel's modules and the site's public key",
		Long: `Pack the agent, a kernel's modules and the site's public key into the initramfs
that machines boot, and put it with its kernel where 'rookery serve' finds them.

The kernel is your distribution's: by default the newest in /boot, with its modules
in /lib/modules. The profile vm has the drivers of virtual machines and is small;
metal has those of real ones.`,
		Example: "  rookery initramfs build --profile metal",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if kernel == "" {
				if kernel, err = newestKernel("/boot"); err != nil {
					return err
				}
			}
			if modules == "" {
				modules = "/lib/modules/" + strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
			}
			if agent == "" {
				if agent, err = findAgent(); err != nil {
					return err
				}
			}
			s, err := site.Open(dir().site())
			if err != nil {
				return err
			}
			if err := os.MkdirAll(dir().boot(), 0o755); err != nil {
				return err
			}
			var sum initramfs.Summary
			err = replace(dir().initramfs(), func(w io.Writer) (err error) {
				sum, err = initramfs.Build(w, initramfs.Config{
					Agent: agent, Modules: modules, Profile: initramfs.Profile(profile), Site: s.Public(),
				})
				return err
			})
			if err != nil {
				return err
			}
			err = replace(dir().kernel(), func(w io.Writer) error {
				f, err := os.Open(kernel)
				if err != nil {
					return fmt.Errorf("kernel: %w", err)
				}
				defer f.Close()
				_, err = io.Copy(w, f)
				return err
			})
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %s; kernel %s, %d modules %s, agent %s, tools %s\n",
				dir().initramfs(), size(sum.Size), sum.Kernel, sum.Modules,
				size(sum.ModuleBytes), size(sum.AgentBytes), size(sum.ToolBytes))
			return nil
		},
	}
	cmd.Flags().StringVar(&kernel, "kernel", "", "kernel image (default the newest /boot/vmlinuz-*)")
	cmd.Flags().StringVar(&modules, "modules", "", "the kernel's modules (default /lib/modules/ and the kernel's version)")
	cmd.Flags().StringVar(&agent, "agent", "", "rookery-agent program (default beside this program, or in PATH)")
	cmd.Flags().StringVar(&profile, "profile", string(initramfs.Metal), "hardware to pack drivers for: vm or metal")
	return cmd
}

// newestKernel is the kernel of the highest version in dir.
func newestKernel(dir string) (string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "vmlinuz-*"))
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		return "", fmt.Errorf("kernel: no %s/vmlinuz-*: install a kernel package such as linux-image-amd64, or name one with --kernel and --modules", dir)
	}
	return slices.MaxFunc(found, compareVersions), nil
}

// compareVersions orders names whose numbers count as numbers: 6.1.0-9 comes
// before 6.1.0-10.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		x, restA := chunk(a)
		y, restB := chunk(b)
		if isDigit(x[0]) && isDigit(y[0]) {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if len(x) != len(y) {
				return len(x) - len(y)
			}
		}
		if c := strings.Compare(x, y); c != 0 {
			return c
		}
		a, b = restA, restB
	}
	return len(a) - len(b)
}

// chunk cuts off the run of digits, or of other bytes, that s begins with.
func chunk(s string) (run, rest string) {
	i := 1
	for i < len(s) && isDigit(s[i]) == isDigit(s[0]) {
		i++
	}
	return s[:i], s[i:]
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func findAgent() (string, error) {
	self, err := os.Executable()
	if err == nil {
		beside := filepath.Join(filepath.Dir(self), "rookery-agent")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath("rookery-agent")
	if err != nil {
		return "", errors.New("agent: no rookery-agent beside this program or in PATH: name it with --agent")
	}
	return path, nil
}

// replace writes a file beside path and renames it, so that nobody who boots in
// between gets half of it.
func replace(path string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = write(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
