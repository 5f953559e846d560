package netboot

import (
	"fmt"
	"strings"
)

// A Node is the machine a script is for.
type Node struct {
	MAC   string
	Name  string // "" while it is not accepted
	Local bool   // start from the own disk, not the agent
}

// Script is the iPXE script of n: it starts the agent, or the own disk.
//
// A download that fails is told on the screen and tried again, through a fresh
// script, for as long as it takes: a machine in a rack has nobody at its
// keyboard, and the server may have changed its mind meanwhile.
func Script(n Node, s Site) (string, error) {
	mac, err := ParseMAC(n.MAC)
	if err != nil {
		return "", fmt.Errorf("script: %w", err)
	}
	name := n.Name
	if name == "" {
		name = "unknown machine"
	}
	for _, text := range []string{name, s.HTTP, s.API, s.Args} {
		if err := plain(text); err != nil {
			return "", fmt.Errorf("script: %s: %w", mac, err)
		}
	}
	args := s.Args
	if args == "" {
		args = DefaultArgs
	}
	if n.Local {
		return expand(localScript, "NAME", name, "MAC", mac), nil
	}
	return expand(agentScript,
		"NAME", name, "MAC", mac,
		"KERNEL", s.HTTP+PathBoot+FileKernel,
		"INITRAMFS", s.HTTP+PathBoot+FileInitramfs,
		"ARGS", fmt.Sprintf("initrd=%s %s rookery.api=%s rookery.http=%s", FileInitramfs, args, s.API, s.HTTP),
		"SCRIPT", ScriptURL(s, mac)), nil
}

// The initrd must also be named on the command line: that is how the kernel's
// EFI stub finds it in what iPXE lets it see. It is harmless on BIOS.
const agentScript = `#!ipxe
echo rookery: NAME (MAC) starts the agent
imgfree
kernel KERNEL ARGS || goto failed
initrd INITRAMFS || goto failed
boot || goto failed
:failed
echo rookery: NAME (MAC) could not load the agent; trying again in 5 seconds
imgfree
sleep 5
chain --replace --autofree SCRIPT || goto failed
`

// A UEFI boot program that ends well ends the boot: edk2's boot manager then
// shows its menu (BdsEntry.c, BootBootOptions). Only one that fails makes the
// firmware go on to the next entry, which is the disk.
const localScript = `#!ipxe
echo rookery: NAME (MAC) starts from its own disk
iseq ${platform} efi && exit 1 ||
sanboot --no-describe --drive 0x80 || exit 1
`

// Autoexec is the script for an iPXE that was started without a DHCP answer of
// ours: autoexec.ipxe beside the boot program, or embedded in it. It asks for
// an address and then for the machine's own script, until it has both.
func Autoexec(s Site) (string, error) {
	if err := plain(s.HTTP); err != nil {
		return "", fmt.Errorf("autoexec: %w", err)
	}
	return expand(autoexecScript, "SCRIPT", ScriptURL(s, "${netX/mac}")), nil
}

const autoexecScript = `#!ipxe
:again
dhcp || goto failed
chain --replace --autofree SCRIPT || goto failed
:failed
echo rookery: no answer; trying again in 5 seconds
sleep 5
goto again
`

// expand replaces the capital words of a template, each with what follows it.
func expand(template string, pairs ...string) string {
	return strings.NewReplacer(pairs...).Replace(template)
}

// CheckArgs says whether args can be a Site's.
func CheckArgs(args string) error { return plain(args) }

// plain refuses what iPXE would take for more than text.
func plain(text string) error {
	for _, c := range text {
		if c < ' ' || c > '~' {
			return fmt.Errorf("%.80q: character %q cannot be in an iPXE script", text, c)
		}
	}
	if strings.Contains(text, "${") {
		return fmt.Errorf("%.80q: iPXE would expand it", text)
	}
	for _, word := range strings.Fields(text) {
		switch word {
		case "||", "&&", ";", "#":
			return fmt.Errorf("%.80q: iPXE would end the command at %s", text, word)
		}
	}
	return nil
}
