package wire

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"rookery/disklayout"
)

var testKey = ed25519.NewKeyFromSeed([]byte("the seed of a key for tests only"))

func testScript() Script {
	return Script{
		Version: 1, ID: strings.Repeat("0a", 16), Node: "n1",
		Image:      Image{Name: "debian12:1", Manifest: DigestOf([]byte("manifest"))},
		Transports: []string{"bittorrent", "http"},
		Mirrors:    []string{"http://10.7.0.2/layers/", "http://[fd00::1]:5000/v2/site/image/blobs/"},
		Upload:     10e6, Download: 16 << 10,
		Layout: disklayout.Default(),
		Identity: Identity{
			Hostname: "n1", Domain: "lab.example", MachineID: strings.Repeat("1b", 16),
			Network:        []Network{{MAC: "52:54:00:00:00:01", Address: "10.7.0.11/24", Gateway: "10.7.0.1"}},
			Nameservers:    []string{"10.7.0.1"},
			AuthorizedKeys: []string{"ssh-ed25519 AAAA root@site"},
			Serial:         "ttyS0,115200",
		},
		SeedFor: 60, Ending: Reboot, OnFailure: Shell,
	}
}

func TestOpenReturnsWhatWasSealed(t *testing.T) {
	want := testScript()
	sealed, err := Seal(want, testKey)
	if err != nil {
		t.Fatalf("Seal: %v", err)
	}
	got, err := Open(sealed, testKey.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	a, _ := json.Marshal(want)
	b, _ := json.Marshal(got)
	if string(a) != string(b) {
		t.Fatalf("Open: %s, want %s", b, a)
	}
}

func TestOpenRefusesWhatTheKeyDidNotSign(t *testing.T) {
	sealed, err := Seal(testScript(), testKey)
	if err != nil {
		t.Fatalf("Seal: %v", err)
	}
	var e envelope
	if err := json.Unmarshal(sealed, &e); err != nil {
		t.Fatal(err)
	}
	e.Payload = []byte(strings.Replace(string(e.Payload), `"n1"`, `"n2"`, 1))
	tampered, _ := json.Marshal(e)
	public := testKey.Public().(ed25519.PublicKey)
	if _, err := Open(tampered, public); !errors.Is(err, ErrSignature) {
		t.Fatalf("Open of a tampered script: %v, want %v", err, ErrSignature)
	}
	other := ed25519.NewKeyFromSeed([]byte("the seed of another key for test"))
	if _, err := Open(sealed, other.Public().(ed25519.PublicKey)); !errors.Is(err, ErrSignature) {
		t.Fatalf("Open with a foreign key: %v, want %v", err, ErrSignature)
	}
	plain := ed25519.Sign(testKey, e.Payload)
	undomained, _ := json.Marshal(envelope{e.Payload, plain})
	if _, err := Open(undomained, public); !errors.Is(err, ErrSignature) {
		t.Fatalf("Open of a signature made for something else: %v, want %v", err, ErrSignature)
	}
}

func TestOpenRefusesAnUnknownKey(t *testing.T) {
	payload, _ := json.Marshal(testScript())
	payload = append([]byte(`{"wipe":true,`), payload[1:]...)
	sealed, _ := json.Marshal(envelope{payload, ed25519.Sign(testKey, signed(payload))})
	_, err := Open(sealed, testKey.Public().(ed25519.PublicKey))
	if err == nil || !strings.Contains(err.Error(), `unknown field "wipe"`) {
		t.Fatalf("Open: %v, want the unknown key named", err)
	}
}

func TestScriptCheckNamesTheKey(t *testing.T) {
	for _, tt := range []struct {
		key    string
		change func(*Script)
	}{
		{"version", func(s *Script) { s.Version = 2 }},
		{"id", func(s *Script) { s.ID = "../etc" }},
		{"node", func(s *Script) { s.Node = "a b" }},
		{"image.name", func(s *Script) { s.Image.Name = "" }},
		{"image.manifest", func(s *Script) { s.Image.Manifest = "sha256:12" }},
		{"transports", func(s *Script) { s.Transports = []string{"pigeon"} }},
		{"transports", func(s *Script) { s.Transports = nil }},
		{"transports", func(s *Script) { s.Transports = []string{"http", "bittorrent", "http"} }},
		{"layout", func(s *Script) { s.Layout.Partitions = nil }},
		{"identity.hostname", func(s *Script) { s.Identity.Hostname = "-n" }},
		{"identity.domain", func(s *Script) { s.Identity.Domain = "a..b" }},
		{"identity.machineID", func(s *Script) { s.Identity.MachineID = "0" }},
		{"identity.network: mac", func(s *Script) { s.Identity.Network[0].MAC = "eth0" }},
		{"identity.network: address", func(s *Script) { s.Identity.Network[0].Address = "10.7.0.11" }},
		{"identity.network: gateway", func(s *Script) { s.Identity.Network[0].Gateway = "gw" }},
		{"identity.nameservers", func(s *Script) { s.Identity.Nameservers = []string{"dns"} }},
		{"identity.authorizedKeys", func(s *Script) { s.Identity.AuthorizedKeys = []string{"a b\nc d"} }},
		{"identity.kernelArgs", func(s *Script) { s.Identity.KernelArgs = "quiet\ninit=/bin/sh" }},
		{"identity.kernelArgs", func(s *Script) { s.Identity.KernelArgs = "quiet; reboot" }},
		{"identity.serial", func(s *Script) { s.Identity.Serial = "ttyS0 quiet" }},
		{"mirrors", func(s *Script) { s.Mirrors = []string{"http://h/layers"} }},
		{"mirrors", func(s *Script) { s.Mirrors = []string{"http:///layers/"} }},
		{"mirrors", func(s *Script) { s.Mirrors = []string{"https://h/layers/"} }},
		{"mirrors", func(s *Script) { s.Mirrors = []string{"http://me:secret@h/layers/"} }},
		{"mirrors", func(s *Script) { s.Mirrors = []string{"http://h/?layer=/"} }},
		{"mirrors", func(s *Script) { s.Mirrors = []string{"http://h/#/"} }},
		{"mirrors", func(s *Script) { s.Mirrors = []string{"http://h/lay ers/"} }},
		{"mirrors", func(s *Script) { s.Mirrors = []string{"/layers/"} }},
		{"mirrors", func(s *Script) { s.Mirrors = slices.Repeat([]string{"http://h/layers/"}, 17) }},
		{"uploadLimit", func(s *Script) { s.Upload = -1 }},
		{"downloadLimit", func(s *Script) { s.Download = 1000 }},
		{"seedFor", func(s *Script) { s.SeedFor = -1 }},
		{"ending", func(s *Script) { s.Ending = "explode" }},
		{"onFailure", func(s *Script) { s.OnFailure = "" }},
	} {
		s := testScript()
		tt.change(&s)
		err := s.Check()
		if err == nil || !strings.HasPrefix(err.Error(), tt.key+":") {
			t.Errorf("Check: %v, want an error that begins with %q", err, tt.key+":")
		}
		if _, err := Seal(s, testKey); err == nil {
			t.Errorf("Seal signed a script with a bad %s", tt.key)
		}
	}
	if err := testScript().Check(); err != nil {
		t.Errorf("Check of a good script: %v", err)
	}
}

func TestStrictSaysWhatIsWrongInTheWordsOfJSON(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{`{"boot": 1}`, "boot: number, want string"},
		{`{"inventory": {"nics": [{"carrier": "yes"}]}}`, "inventory.nics.carrier: string, want bool"},
		{`{"inventory": {"nics": {}}}`, "inventory.nics: object, want array"},
		{`{"inventory": {"cpus": 1.5}}`, "inventory.cpus: number 1.5, want whole number"},
		{`[]`, "array, want object"},
		{`{"foo": 1}`, `unknown field "foo"`},
	} {
		var h Hello
		if err := Strict([]byte(tt.in), &h); err == nil || err.Error() != tt.want {
			t.Errorf("Strict(%s): %v, want %s", tt.in, err, tt.want)
		}
	}
}

func TestStrictRefusesTrailingData(t *testing.T) {
	var v struct{ A int }
	for _, in := range []string{`{"A":1} {}`, `{"A":1}]`, `{"A":1,"B":2}`, ``, `{`} {
		if err := Strict([]byte(in), &v); err == nil {
			t.Errorf("Strict(%q): no error", in)
		}
	}
	if err := Strict([]byte(` {"A":1} `+"\n"), &v); err != nil {
		t.Errorf("Strict: %v", err)
	}
}

func TestDigest(t *testing.T) {
	d := DigestOf([]byte("x"))
	if err := d.Verify([]byte("x")); err != nil {
		t.Errorf("Verify: %v", err)
	}
	if err := d.Verify([]byte("y")); err == nil {
		t.Error("Verify of other bytes: no error")
	}
	for _, bad := range []Digest{"", "sha256:", "md5:00", "sha256:" + Digest(strings.Repeat("G", 64)), d + "0"} {
		if bad.Check() == nil {
			t.Errorf("Check(%q): no error", bad)
		}
	}
}

func testHello() string {
	b, _ := json.Marshal(Hello{Boot: strings.Repeat("0", 32), Inventory: Inventory{
		Firmware: disklayout.UEFI, Arch: "amd64",
		NICs:  []NIC{{Name: "eth0", MAC: "52:54:00:00:00:01", Carrier: true, Neighbor: &Neighbor{Switch: "leaf07", Port: "Gi1/0/7"}}},
		Disks: []disklayout.Disk{{Name: "vda", Path: "/dev/vda", Size: 4 << 30}},
	}})
	return string(b)
}

func TestDecodeHello(t *testing.T) {
	if _, err := DecodeHello([]byte(testHello())); err != nil {
		t.Fatalf("DecodeHello: %v", err)
	}
	for _, tt := range []struct{ old, new, want string }{
		{`"uefi"`, `"lilo"`, "inventory.firmware"},
		{`52:54:00:00:00:01`, `52-54-00-00-00-01`, "inventory.nics"},
		{`"eth0"`, `"eth0\n"`, "control characters"},
		{`4294967296`, `-1`, "inventory.disks"},
		{`"boot":"0000`, `"boot":"zzzz`, "boot"},
		{`"leaf07"`, `""`, "inventory.nics: 52:54:00:00:00:01: neighbor: switch is missing"},
		{`"leaf07"`, `"` + strings.Repeat("x", 257) + `"`, "longer than 256 bytes"},
		{`"Gi1/0/7"`, `"\u001b[2J"`, "control characters"},
		{`"arch"`, `"march"`, `unknown field "march"`},
	} {
		_, err := DecodeHello([]byte(strings.Replace(testHello(), tt.old, tt.new, 1)))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("DecodeHello with %s: %v, want %q", tt.new, err, tt.want)
		}
	}
	if _, err := DecodeHello(make([]byte, MaxHello+1)); err == nil {
		t.Error("DecodeHello of too many bytes: no error")
	}
}

func TestDecodeEvents(t *testing.T) {
	good := `[{"boot":"00000000000000000000000000000000","seq":1,"time":"2026-11-22T10:00:00Z","phase":"fetch","state":"progress","fetch":{"total":10,"done":5,"fromServer":3,"fromPeers":2,"uploaded":0,"peers":2,"rate":1}}]`
	if _, err := DecodeEvents([]byte(good)); err != nil {
		t.Fatalf("DecodeEvents: %v", err)
	}
	for _, tt := range []struct{ old, new, want string }{
		{`"fetch","state"`, `"dance","state"`, "phase"},
		{`progress`, `maybe`, "state"},
		{`"seq":1`, `"seq":0`, "seq"},
		{`"done":5`, `"done":-5`, "fetch"},
	} {
		_, err := DecodeEvents([]byte(strings.Replace(good, tt.old, tt.new, 1)))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("DecodeEvents with %s: %v, want %q", tt.new, err, tt.want)
		}
	}
}

func FuzzOpen(f *testing.F) {
	sealed, _ := Seal(testScript(), testKey)
	f.Add(sealed)
	f.Add([]byte(`{"payload":"","signature":""}`))
	public := testKey.Public().(ed25519.PublicKey)
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := Open(b, public); err == nil && s.Check() != nil {
			t.Fatal("Open returned a script that does not pass its own check")
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(testHello()))
	f.Add([]byte(`[{"seq":1}]`))
	f.Add([]byte(`{"size":1}`))
	f.Add([]byte(`{"do":"wait"}`))
	f.Add([]byte(`{"client":"00112233445566ff","layer":"` + string(DigestOf(nil)) + `","lost":0.5,"lacks":"AP8="}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		DecodeHello(b)
		DecodeEvents(b)
		DecodeWelcome(b)
		DecodeTree(b)
		DecodeWant(b)
		DecodeSending(b)
	})
}

func TestDecodeWant(t *testing.T) {
	layer := string(DigestOf(nil))
	for text, want := range map[string]string{
		`{"client":"00112233445566ff","layer":"` + layer + `","lost":0.5,"lacks":"AP8="}`: "",
		`{"client":"00112233445566ff","layer":"` + layer + `","done":true}`:               "",
		`{"client":"n1","layer":"` + layer + `"}`:                                         `want: client: "n1" is not 16 hex digits`,
		`{"client":"00112233445566ff","layer":"sha256:0"}`:                                "want: layer: ",
		`{"client":"00112233445566ff","layer":"` + layer + `","rate":-1}`:                 "want: rate: ",
		`{"client":"00112233445566ff","layer":"` + layer + `","lost":1.5}`:                "want: lost: 1.5, want 0 to 1",
		`{"client":"00112233445566ff","layer":"` + layer + `","lacks":"?"}`:               "want: ",
		strings.Repeat(" ", MaxWant) + `{}`:                                               "want: ",
	} {
		_, err := DecodeWant([]byte(text))
		if (err == nil) != (want == "") || err != nil && !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%.120s: %v, want %q", text, err, want)
		}
	}
}

func TestDecodeSending(t *testing.T) {
	for text, want := range map[string]string{
		`{"size":36012}`: "",
		`{"size":0}`:     "sending: size: 0, want 1 or more",
		`{"size":-1}`:    "sending: size: -1, want 1 or more",
		`{"sizes":1}`:    `sending: unknown field "sizes"`,
		``:               "sending: EOF",
		strings.Repeat(" ", MaxSending) + `{"size":1}`: "sending: 1034 bytes, at most 1024 are read",
	} {
		_, err := DecodeSending([]byte(text))
		if got := fmt.Sprint(err); got != want && (err != nil || want != "") {
			t.Errorf("%.20s: %v, want %q", text, err, want)
		}
	}
}

func TestDecodeTree(t *testing.T) {
	for text, want := range map[string]string{
		`{"done":3,"total":7}`:                       "",
		`{"module":"0a1b","port":873,"tlsPort":874}`: "",
		`{"module":"0a1b","sshPort":2222}`:           "",
		`{"sshPort":65536}`:                          "tree: port 65536: want 0 to 65535",
		`{"module":"../x","port":873}`:               `tree: module: "../x": want letters a-z and digits`,
		`{"module":"x --delete"}`:                    `tree: module: "x --delete": want letters a-z and digits`,
		`{"port":70000}`:                             "tree: port 70000: want 0 to 65535",
		`{"port":-1}`:                                "tree: port -1: want 0 to 65535",
		`{"password":"x"}`:                           `tree: unknown field "password"`,
	} {
		_, err := DecodeTree([]byte(text))
		if got := fmt.Sprint(err); got != want && (err != nil || want != "") {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestParseRate(t *testing.T) {
	for text, want := range map[string]int64{"": 0, "none": 0, "10MB": 10e6, "512 KiB": 512 << 10, "1GB": 1e9} {
		if got, err := ParseRate(text); err != nil || got != want {
			t.Errorf("ParseRate(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"10", "10%", "*", "-1MB", "1kB", "0MB", "10Mbit", "10MB/s"} {
		if got, err := ParseRate(text); err == nil {
			t.Errorf("ParseRate(%q) = %d, want an error", text, got)
		}
	}
}
