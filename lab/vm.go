package lab

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

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

	Console *Console

	tap string
	mu  sync.Mutex
	run *running
}

// running is one power-on of a VM.
type running struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{} // closed when QEMU has ended and all is read
}

// Plug connects a new machine to the network, switched off, its disk empty.
func (n *Network) Plug(v *VM) error {
	v.Console = newConsole()
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
		disk, err := os.Create(v.path("disk.img"))
		if err != nil {
			return err
		}
		if err := errors.Join(disk.Truncate(v.Disk), disk.Close()); err != nil {
			return err
		}
		// Kept from here on: boot entries written by an installation stay.
		if v.Firmware == disklayout.UEFI {
			vars, err := os.ReadFile(ovmfVars)
			if err != nil {
				return fmt.Errorf("%w (package ovmf)", err)
			}
			if err := os.WriteFile(v.path("vars.fd"), vars, 0o644); err != nil {
				return err
			}
		}
		if err := os.WriteFile(v.path("console.log"), nil, 0o644); err != nil {
			return err
		}
		v.tap, err = n.tap()
		return err
	}()
	if err != nil {
		return fmt.Errorf("%s: plug: %w", v.Name, err)
	}
	return nil
}

func (v *VM) path(file string) string { return filepath.Join(v.Dir, file) }

// args is QEMU's command line. Boot order, firmware and ROMs are what
// facts of the boot chain say works; each strange one has its reason.
func (v *VM) args(accel string) []string {
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
		"-device", "virtio-blk-pci,drive=disk,bootindex=1",
	}
	nic := "virtio-net-pci,netdev=net,bootindex=0,mac=" + v.MAC
	if v.Firmware == disklayout.UEFI {
		return append(args,
			"-machine", "q35",
			"-drive", "if=pflash,unit=0,readonly=on,format=raw,file="+ovmfCode,
			"-drive", "if=pflash,unit=1,format=raw,file="+v.path("vars.fd"),
			"-device", nic+",romfile=") // else QEMU's own iPXE takes over from the firmware
	}
	// The ROM must be QEMU's default: it writes the card's PCI id into that one
	// only (hw/pci/pci.c, pci_patch_ids), and SeaBIOS runs no ROM of another card.
	return append(args,
		"-machine", "pc,graphics=off", // SeaBIOS and iPXE speak on the serial line then
		"-device", nic)
}

// PowerOn starts the machine.
func (v *VM) PowerOn() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.run != nil {
		select {
		case <-v.run.done:
		default:
			return fmt.Errorf("%s: power on: is on already", v.Name)
		}
	}
	run, err := v.start()
	if err != nil {
		return fmt.Errorf("%s: power on: %w", v.Name, err)
	}
	v.run = run
	return nil
}

func (v *VM) start() (*running, error) {
	log, err := os.OpenFile(v.path("console.log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	// Not CommandContext: a VM lives until it is switched off.
	cmd := exec.Command("qemu-system-x86_64", v.args(Accel())...)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	v.Console.end(nil)
	run := &running{cmd: cmd, stdin: stdin, done: make(chan struct{})}
	go func() {
		defer close(run.done)
		_, err := io.Copy(io.MultiWriter(log, v.Console), stdout)
		err = errors.Join(err, log.Close())
		ended := cmd.Wait()
		if said := last(complaints.Bytes()); said != "" {
			err = errors.Join(err, errors.New(said))
		}
		v.Console.end(errors.Join(fmt.Errorf("switched off (qemu: %s)", state(ended)), err))
	}()
	return run, nil
}

func state(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// PowerOff takes the power away, without a word to the machine, and waits
// until it is off. It is fine to switch off what is not on.
func (v *VM) PowerOff() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.run == nil {
		return
	}
	v.run.cmd.Process.Kill() // an error means that it has ended
	<-v.run.done
	v.run = nil
}

// Off is closed when the machine is off: by PowerOff, by itself or because QEMU
// gave up. Console.Ended has the reason.
func (v *VM) Off() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.run == nil {
		off := make(chan struct{})
		close(off)
		return off
	}
	return v.run.done
}

// PowerCycle takes the power away and gives it back.
func (v *VM) PowerCycle() error {
	v.PowerOff()
	return v.PowerOn()
}

// Type writes to the serial line.
func (v *VM) Type(text string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.run == nil {
		return fmt.Errorf("%s: type: is off", v.Name)
	}
	_, err := io.WriteString(v.run.stdin, text)
	return err
}
