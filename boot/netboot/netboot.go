// Package netboot decides what a machine asking the network gets next, and
// renders the iPXE scripts it runs. It does no I/O: DHCP and HTTP servers ask
// it and carry the answer.
package netboot

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Boot programs, as they are called below the TFTP root and below PathBoot.
// All are iPXE: Debian's package ipxe has them in /usr/lib/ipxe.
const (
	FileBIOS     = "undionly.kpxe" // drives the card through the ROM that loaded it
	FileUEFI     = "snponly.efi"   // drives the card through the firmware
	FileUEFIHTTP = "ipxe.efi"      // has drivers of its own: firmware that booted by HTTP may offer no plain card
)

// Where the boot files are served by HTTP.
const (
	PathBoot   = "/boot/"
	PathBootOf = "/boot/of/" // + MAC address + "/" + file: not there for a machine that starts from its own disk
)

// Names of the files below PathBoot that the scripts ask for.
const (
	FileKernel    = "vmlinuz"
	FileInitramfs = "initramfs"
	FileScript    = "script.ipxe" // ?mac=...&uuid=...
)

// A Site is the server as machines reach it.
type Site struct {
	Server netip.Addr // IPv4: next server, also by TFTP
	HTTP   string     // "http://10.0.0.1:80", for the boot files
	API    string     // "https://10.0.0.1:443", for the agent
	Args   string     // kernel arguments; "" is DefaultArgs
}

// DefaultArgs puts the kernel's and the agent's words on both consoles.
const DefaultArgs = "console=tty0 console=ttyS0,115200"

// A Request is what a machine says of itself in its DHCP request.
type Request struct {
	MAC         string   // as ParseMAC gives it
	VendorClass string   // option 60
	UserClass   []byte   // option 77
	Archs       []uint16 // option 93
}

// An Answer is what the machine is to load. An empty File means nothing.
type Answer struct {
	File        string // name for TFTP, or URL
	VendorClass string // option 60 of the reply, "" for none
	Why         string // why a netbooting machine gets nothing, for the log
}

// Decide says what r gets from s. A machine that is not netbooting gets an
// empty answer.
func Decide(r Request, s Site) Answer {
	pxe := strings.HasPrefix(r.VendorClass, "PXEClient")
	http := strings.HasPrefix(r.VendorClass, "HTTPClient")
	switch {
	case isIPXE(r.UserClass):
		return Answer{File: ScriptURL(s, r.MAC)}
	case !pxe && !http:
		return Answer{}
	}
	archs := r.Archs
	if len(archs) == 0 {
		archs = vendorArch(r.VendorClass)
	}
	for _, arch := range archs {
		switch arch {
		case 0:
			if pxe {
				return Answer{File: FileBIOS}
			}
		case 7, 9: // RFC 4578 says 9 is x86-64 and its errata 7; firmware says both
			if pxe {
				return Answer{File: FileUEFI}
			}
		case 16:
			// UEFI 2.10, 24.7.3.1: only a reply with this class is a HTTP Boot offer.
			if http {
				return Answer{File: s.HTTP + PathBootOf + r.MAC + "/" + FileUEFIHTTP, VendorClass: "HTTPClient"}
			}
		}
	}
	if len(archs) == 0 {
		return Answer{Why: fmt.Sprintf("%.32q names no architecture", r.VendorClass)}
	}
	return Answer{Why: fmt.Sprintf("no boot program for architecture %d (%.10s)", archs, r.VendorClass)}
}

// isIPXE reads option 77. iPXE sends the bare text, not the counted strings of
// RFC 3004; a relay or a rebuilt iPXE may do the latter.
func isIPXE(class []byte) bool {
	return string(class) == "iPXE" || string(class) == "\x04iPXE"
}

// vendorArch reads the architecture out of "PXEClient:Arch:00000:UNDI:002001",
// for ROMs that are too old for option 93.
func vendorArch(class string) []uint16 {
	_, rest, ok := strings.Cut(class, ":Arch:")
	if !ok {
		return nil
	}
	digits, _, _ := strings.Cut(rest, ":")
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil {
		return nil
	}
	return []uint16{uint16(n)}
}

// ScriptURL is where the machine mac, running iPXE, finds its script. iPXE
// itself puts the UUID in: option 97 has its bytes in an order that differs
// from ROM to ROM.
func ScriptURL(s Site, mac string) string {
	return s.HTTP + PathBoot + FileScript + "?mac=" + mac + "&uuid=${uuid}"
}

// ParseMAC reads an Ethernet address in any usual spelling and writes it in
// lower case with colons.
func ParseMAC(text string) (string, error) {
	mac, err := net.ParseMAC(text)
	if err != nil || len(mac) != 6 {
		return "", fmt.Errorf("MAC address %.40q: want six pairs of hex digits", text)
	}
	if mac[0]&1 != 0 || slices.Equal(mac, make(net.HardwareAddr, 6)) {
		return "", fmt.Errorf("MAC address %s: not of one machine", mac)
	}
	return mac.String(), nil
}

// ParseQuery reads the query of a request for the script: the MAC address, and
// the SMBIOS UUID in lower case when there is one.
func ParseQuery(raw string) (mac, uuid string, err error) {
	if len(raw) > 512 {
		return "", "", fmt.Errorf("query: %d bytes, want at most 512", len(raw))
	}
	q, err := url.ParseQuery(raw)
	if err != nil {
		return "", "", fmt.Errorf("query: %w", err)
	}
	mac, err = ParseMAC(q.Get("mac"))
	if err != nil {
		return "", "", fmt.Errorf("query: %w", err)
	}
	uuid = strings.ToLower(q.Get("uuid"))
	if uuid != "" && !isUUID(uuid) {
		return "", "", fmt.Errorf("query: uuid %.40q: want 8-4-4-4-12 hex digits", uuid)
	}
	return mac, uuid, nil
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (c == '-') || !dash && !strings.ContainsRune("0123456789abcdef", rune(c)) {
			return false
		}
	}
	return true
}
