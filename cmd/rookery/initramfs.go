package main

import (
	"bytes"
	"encoding/binary"
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
	return group("initramfs", "Build what the machines boot", initramfsBuild(dir))
}

func initramfsBuild(dir func() stateDir) *cobra.Command {
	var kernel, modules, agent, profile string
	var rsync bool
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Pack the agent, a kernel's modules and the site's public key",
		Long: `Pack the agent, a kernel's modules and the site's public key into the initramfs
that machines boot, and put it with its kernel where 'rookery serve' finds them.

The kernel is your distribution's: by default the newest in /boot, with its modules
in /lib/modules. The profile vm has the drivers of virtual machines and is small;
metal has those of real ones. Nodes that have rsync among their transports need
--rsync, which makes it 2.6 MiB larger.`,
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
			image, err := os.Open(kernel)
			if err != nil {
				return fmt.Errorf("kernel: %w", err)
			}
			defer image.Close()
			release, err := kernelRelease(image)
			if err != nil {
				return fmt.Errorf("kernel: %s: %w", kernel, err)
			}
			tools := initramfs.DefaultTools
			if rsync {
				tools = append(slices.Clone(tools), "rsync")
			}
			s, err := site.Open(dir().site())
			if err != nil {
				return err
			}
			if err := os.MkdirAll(dir().boot(), 0o755); err != nil {
				return err
			}
			var sum initramfs.Summary
			// A kernel cannot load the modules of another: both are complete
			// before either is put in its place.
			err = replace(dir().kernel(), func(w io.Writer) error {
				if _, err := io.Copy(stoppable{cmd.Context(), w}, image); err != nil {
					return fmt.Errorf("kernel: %w", err)
				}
				return replace(dir().initramfs(), func(w io.Writer) (err error) {
					sum, err = initramfs.Build(stoppable{cmd.Context(), w}, initramfs.Config{
						Agent: agent, Modules: modules, Profile: initramfs.Profile(profile), Site: s.Public(), Tools: tools,
					})
					if err == nil && release != "" && release != sum.Kernel {
						err = fmt.Errorf("modules: %s has those of kernel %s, %s is kernel %s", modules, sum.Kernel, kernel, release)
					}
					return err
				})
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
	cmd.Flags().BoolVar(&rsync, "rsync", false, "pack rsync, for nodes that have it among their transports")
	return cmd
}

// kernelRelease is what the running kernel will say of itself, and "" for one
// that does not say it beforehand: only x86 has it in its boot header
// (Documentation/arch/x86/boot.rst); others are programs for UEFI.
func kernelRelease(image io.ReaderAt) (string, error) {
	header := make([]byte, 0x210)
	if _, err := image.ReadAt(header, 0); errors.Is(err, io.EOF) {
		return "", errors.New("is not a Linux kernel")
	} else if err != nil {
		return "", err
	}
	if string(header[0x202:0x206]) != "HdrS" {
		if string(header[:2]) != "MZ" {
			return "", errors.New("is not a Linux kernel")
		}
		return "", nil
	}
	text := make([]byte, 256)
	n, err := image.ReadAt(text, 0x200+int64(binary.LittleEndian.Uint16(header[0x20e:])))
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	release, _, _ := bytes.Cut(text[:n], []byte(" "))
	return string(release), nil
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
