// Init is a first process that tries what is packed beside it: it loads modules
// from modules.dep, makes filesystems with the tools, mounts them, and turns the
// machine off. Its last words are "packed: all works".
package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/u-root/u-root/pkg/kmodule"
	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Println("packed: to be run as the first process of a virtual machine")
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Println("packed:", err)
	} else {
		fmt.Println("packed: all works")
	}
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	p, err := kmodule.NewProber(kmodule.ProbeOpts{})
	if err != nil {
		return err
	}
	for _, name := range []string{"virtio_pci", "virtio_blk", "virtio_net"} {
		if err := p.Probe(name, ""); err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
	}
	list, err := os.ReadFile("/etc/rookery/modules")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(list)) {
		if err := p.Probe(name, ""); err != nil {
			fmt.Printf("packed: module %s: %v\n", name, err) // efivarfs wants UEFI
		}
	}
	for _, words := range []string{
		"/usr/sbin/mke2fs -q -t ext4 /dev/vda",
		"/sbin/mkswap /dev/vdb",
		"/usr/sbin/mkfs.vfat -F 32 /dev/vdb",
		"/bin/sh -c uname",
		"/usr/bin/rsync -aHAXS --numeric-ids --modify-window=-1 --info=progress2 /etc/ /tmp/copy/",
	} {
		args := strings.Fields(words)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", words, err, out)
		}
	}
	for _, m := range [][2]string{{"/dev/vda", "ext4"}, {"/dev/vdb", "vfat"}} {
		if err := unix.Mount(m[0], "/mnt", m[1], 0, ""); err != nil {
			return fmt.Errorf("mount %s as %s: %w", m[0], m[1], err)
		}
		if err := os.WriteFile("/mnt/file", []byte("content"), 0o644); err != nil {
			return err
		}
		if err := unix.Unmount("/mnt", 0); err != nil {
			return fmt.Errorf("unmount %s: %w", m[0], err)
		}
	}
	return nil
}
