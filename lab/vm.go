package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"rookery/disklayout"
)

// Firmware of the distribution, package ovmf.
const (
	ovmfCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	ovmfVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// A VM is a virtual machine with one network card and one disk, that boots
// from the network first and from the disk second, as a machine of a cluster does.
type VM struct {
	Name     string
	MAC      string
	Firmware disklayout.Firmware
	Memory   int    // MiB; 0 means 1024
	Disk     int64  // bytes of the disk, empty at first; 0 means 4 GiB
	Dir      string // keeps disk.img, vars.fd and console.log

	power
	tap string
}

// Plug connects a new machine to the network, switched off, its disk empty.
func (n *Network) Plug(v *VM) error {
	v.Console = NewConsole()
	if v.Memory == 0 {
		v.Memory = 1024
	}
	if v.Disk == 0 {
		v.Disk = 4 << 30
	}
	err := func() error {
		if err := os.MkdirAll(v.Dir, 0o755); err != nil {
			return err
		}
		if err := sparse(v.path("disk.img"), v.Disk); err != nil {
			return err
		}
		var err error
		v.tap, err = n.tap()
		return err
	}()
	if err != nil {
		return fmt.Errorf("%s: plug: %w", v.Name, err)
	}
	return nil
}

func (v *VM) path(file string) string { return filepath.Join(v.Dir, file) }

// args is QEMU's command line. Each strange argument has its reason beside it.
func (v *VM) args(accel string, setup bool) []string {
	cpu := "max" // has RDRAND: without it the kernel's random numbers take a second
	if accel == "kvm" {
		cpu = "host"
	}
	args := []string{
		"-name", v.Name,
		"-accel", accel, "-cpu", cpu, "-smp", "2", "-m", fmt.Sprint(v.Memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "stdio",
		"-smbios", "type=1,manufacturer=Rookery,product=Lab,serial=" + v.Name,
		"-netdev", "tap,id=net,script=no,downscript=no,ifname=" + v.tap,
		"-drive", "if=none,id=disk,format=raw,cache=unsafe,discard=unmap,file=" + v.path("disk.img"),
	}
	nic := "virtio-net-pci,netdev=net,mac=" + v.MAC
	if v.Firmware == disklayout.UEFI {
		if setup {
			nic += ",bootindex=0"
		}
		return append(args,
			"-device", "virtio-blk-pci,drive=disk",
			"-machine", "q35",
			"-drive", "if=pflash,unit=0,readonly=on,format=raw,file="+ovmfCode,
			"-drive", "if=pflash,unit=1,format=raw,file="+v.path("vars.fd"),
			"-device", nic+",romfile=") // else QEMU's own iPXE takes over from the firmware
	}
	// The ROM must be QEMU's default: it writes the card's PCI id into that one
	// only (hw/pci/pci.c, pci_patch_ids), and SeaBIOS runs no ROM of another card.
	return append(args,
		"-machine", "pc,graphics=off", // SeaBIOS and iPXE speak on the serial line then
		"-device", "virtio-blk-pci,drive=disk,bootindex=1",
		"-device", nic+",bootindex=0")
}

// PowerOn starts the machine; a new one with UEFI has its firmware set up first.
func (v *VM) PowerOn() error {
	if _, err := os.Stat(v.path("vars.fd")); v.Firmware == disklayout.UEFI && err != nil {
		if err := v.setup(); err != nil {
			return fmt.Errorf("%s: firmware setup: %w", v.Name, err)
		}
	}
	if err := v.start(false, "console.log"); err != nil {
		return fmt.Errorf("%s: power on: %w", v.Name, err)
	}
	return nil
}

func (v *VM) start(setup bool, log string) error {
	cmd := exec.Command("qemu-system-x86_64", v.args(Accel(), setup)...) // it lives until it is switched off
	return v.on(cmd, (*exec.Cmd).Start, v.path(log))
}

// setup does what an operator does in the firmware's menu: it puts the network
// first in the boot order, where it stays. QEMU's own boot order would be
// imposed anew at every start, and the entries that an installation makes would
// come after all ways to boot from the network, each with its minute of waiting.
func (v *VM) setup() error {
	vars, err := os.ReadFile(ovmfVars)
	if err != nil {
		return fmt.Errorf("%w (package ovmf)", err)
	}
	if err := os.WriteFile(v.path("vars.fd"), vars, 0o644); err != nil {
		return err
	}
	if err := v.start(true, "setup.log"); err != nil {
		return err
	}
	defer v.PowerOff()
	ctx, cancel := context.WithTimeout(context.Background(), Within(time.Minute))
	defer cancel()
	_, err = v.Console.Expect(ctx, "Start PXE over IPv4") // the order is kept by then
	return err
}

// PowerCycle takes the power away and gives it back.
func (v *VM) PowerCycle() error {
	v.PowerOff()
	return v.PowerOn()
}
