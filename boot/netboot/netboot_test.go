package netboot

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden scripts anew")

var site = Site{
	Server: netip.MustParseAddr("10.0.0.1"),
	HTTP:   "http://10.0.0.1:80",
	API:    "https://10.0.0.1:443",
}

// The classes are in the form that the named programs send.
func TestDecide(t *testing.T) {
	const mac = "52:54:00:12:34:56"
	const script = "http://10.0.0.1:80/boot/script.ipxe?mac=52:54:00:12:34:56&uuid=${uuid}"
	for _, tt := range []struct {
		name string
		req  Request
		want Answer
	}{
		{"dhclient", Request{}, Answer{}},
		{"udhcpc", Request{VendorClass: "udhcp 1.35.0"}, Answer{}},
		{"PXE ROM", Request{VendorClass: "PXEClient:Arch:00000:UNDI:002001", Archs: []uint16{0}}, Answer{File: "undionly.kpxe"}},
		{"PXE ROM without option 93", Request{VendorClass: "PXEClient:Arch:00000:UNDI:002001"}, Answer{File: "undionly.kpxe"}},
		{"iPXE on BIOS", Request{VendorClass: "PXEClient:Arch:00000:UNDI:002001", UserClass: []byte("iPXE"), Archs: []uint16{0}}, Answer{File: script}},
		{"iPXE on UEFI", Request{VendorClass: "PXEClient:Arch:00007:UNDI:003010", UserClass: []byte("iPXE"), Archs: []uint16{7}}, Answer{File: script}},
		{"iPXE, counted class", Request{VendorClass: "PXEClient:Arch:00007:UNDI:003010", UserClass: []byte("\x04iPXE")}, Answer{File: script}},
		{"OVMF, PXE", Request{VendorClass: "PXEClient:Arch:00007:UNDI:003001", Archs: []uint16{7}}, Answer{File: "snponly.efi"}},
		{"UEFI that says EBC", Request{VendorClass: "PXEClient:Arch:00009:UNDI:003001", Archs: []uint16{9}}, Answer{File: "snponly.efi"}},
		{"OVMF, HTTP", Request{VendorClass: "HTTPClient:Arch:00016:UNDI:003001", Archs: []uint16{16}},
			Answer{File: "http://10.0.0.1:80/boot/of/52:54:00:12:34:56/ipxe.efi", VendorClass: "HTTPClient"}},
		{"second of two architectures", Request{VendorClass: "PXEClient", Archs: []uint16{6, 7}}, Answer{File: "snponly.efi"}},
		{"arm64", Request{VendorClass: "PXEClient:Arch:00011:UNDI:003000", Archs: []uint16{11}},
			Answer{Why: "no boot program for architecture [11] (PXEClient:)"}},
		{"PXE with an HTTP architecture", Request{VendorClass: "PXEClient", Archs: []uint16{16}},
			Answer{Why: "no boot program for architecture [16] (PXEClient)"}},
		{"no architecture at all", Request{VendorClass: "PXEClient"}, Answer{Why: `"PXEClient" names no architecture`}},
		{"architecture that is no number", Request{VendorClass: "PXEClient:Arch:xxxxx:"}, Answer{Why: `"PXEClient:Arch:xxxxx:" names no architecture`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.req.MAC = mac
			if got := Decide(tt.req, site); got != tt.want {
				t.Errorf("Decide: %+v, want %+v", got, tt.want)
			}
		})
	}
}

// The BOOTP header has 128 bytes for the boot file, the last of them zero.
func TestScriptURLFitsTheHeader(t *testing.T) {
	s := Site{HTTP: "http://255.255.255.255:65535"}
	if url := ScriptURL(s, "52:54:00:12:34:56"); len(url) > 127 {
		t.Errorf("%s: %d bytes, want at most 127", url, len(url))
	}
}

func TestScript(t *testing.T) {
	for _, tt := range []struct {
		golden string
		node   Node
		site   Site
	}{
		{"install.ipxe", Node{MAC: "52-54-00-12-34-AB", Name: "n001"}, site},
		{"wait.ipxe", Node{MAC: "52:54:00:12:34:ab"}, site},
		{"local.ipxe", Node{MAC: "52:54:00:12:34:ab", Name: "n001", Local: true}, site},
		{"args.ipxe", Node{MAC: "52:54:00:12:34:ab", Name: "n001"}, Site{HTTP: site.HTTP, API: site.API, Args: "console=ttyS1,9600 nomodeset"}},
	} {
		t.Run(tt.golden, func(t *testing.T) {
			got, err := Script(tt.node, tt.site)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, tt.golden, got)
		})
	}
	t.Run("autoexec", func(t *testing.T) {
		got, err := Autoexec(site)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "autoexec.ipxe", got)
	})
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n%s\nwant\n%s", name, got, want)
	}
}

func TestScriptRefuses(t *testing.T) {
	const mac = "52:54:00:12:34:56"
	for _, tt := range []struct {
		name string
		node Node
		site Site
		want string
	}{
		{"no MAC", Node{}, site, "want six pairs"},
		{"MAC with a script in it", Node{MAC: mac + "\nshell"}, site, "want six pairs"},
		{"eight bytes", Node{MAC: "52:54:00:12:34:56:78:9a"}, site, "want six pairs"},
		{"broadcast", Node{MAC: "ff:ff:ff:ff:ff:ff"}, site, "not of one machine"},
		{"zero", Node{MAC: "00:00:00:00:00:00"}, site, "not of one machine"},
		{"name with a line end", Node{MAC: mac, Name: "n1\nshell"}, site, "cannot be in an iPXE script"},
		{"name with a setting", Node{MAC: mac, Name: "${password}"}, site, "would expand"},
		{"arguments with a command", Node{MAC: mac}, Site{Args: "quiet || shell"}, "would end the command"},
		{"address with a line end", Node{MAC: mac}, Site{HTTP: "http://x\n"}, "cannot be in an iPXE script"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Script(tt.node, tt.site)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Script: %v, want %q", err, tt.want)
			}
		})
	}
}

func FuzzParseQuery(f *testing.F) {
	for _, seed := range []string{
		"mac=52:54:00:12:34:56&uuid=1b4e28ba-2fa1-11d2-883f-0016d3cca427",
		"mac=52%3a54%3a00%3a12%3a34%3a56&uuid=",
		"mac=52-54-00-12-34-56", "mac=5254.0012.3456", "mac=", "mac=%zz", "uuid=x&mac=52:54:00:12:34:56", "",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		mac, uuid, err := ParseQuery(raw)
		if err != nil {
			if mac != "" || uuid != "" {
				t.Fatalf("%q and %q with error %v", mac, uuid, err)
			}
			return
		}
		if again, err := ParseMAC(mac); err != nil || again != mac {
			t.Fatalf("ParseMAC(%q): %q, %v", mac, again, err)
		}
		if uuid != "" && !isUUID(uuid) {
			t.Fatalf("uuid %q", uuid)
		}
		if _, err := Script(Node{MAC: mac}, site); err != nil {
			t.Fatalf("Script: %v", err)
		}
	})
}

func TestParseQuery(t *testing.T) {
	mac, uuid, err := ParseQuery("mac=52%3A54%3A00%3aAB%3Acd%3Aef&uuid=1B4E28BA-2FA1-11D2-883F-0016D3CCA427")
	if err != nil || mac != "52:54:00:ab:cd:ef" || uuid != "1b4e28ba-2fa1-11d2-883f-0016d3cca427" {
		t.Errorf("ParseQuery: %q, %q, %v", mac, uuid, err)
	}
	if _, _, err := ParseQuery("mac=52:54:00:ab:cd:ef&uuid=${uuid}"); err == nil {
		t.Error("ParseQuery took ${uuid} for a UUID")
	}
}
