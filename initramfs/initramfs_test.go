package initramfs

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"

	"rookery/wire"
)

func testSite(t *testing.T) wire.Site {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, public, private)
	if err != nil {
		t.Fatal(err)
	}
	return wire.Site{Key: public, CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
}

// small is a configuration of files made here: no package is needed for it.
func small(t *testing.T) Config {
	t.Helper()
	agent := filepath.Join(t.TempDir(), "agent")
	write(t, agent, fakeModule()) // an ELF file without an interpreter
	return Config{Agent: agent, Modules: fakeKernel(t, smallKernel), Profile: VM, Site: testSite(t), Tools: []string{}}
}

// unpack reads an initramfs back.
func unpack(t *testing.T, b []byte) map[string]cpio.Record {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	all, err := cpio.ReadAllRecords(cpio.EOFReader{RecordReader: cpio.Newc.Reader(bytes.NewReader(plain))})
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]cpio.Record{}
	for _, r := range all {
		if dir := filepath.Dir(r.Name); dir != "." && names[dir].Mode&cpio.S_IFMT != cpio.S_IFDIR {
			t.Errorf("%s comes before its directory: the kernel would drop it", r.Name)
		}
		names[r.Name] = r
	}
	return names
}

func content(t *testing.T, r cpio.Record) string {
	t.Helper()
	b := make([]byte, r.FileSize)
	if _, err := r.ReadAt(b, 0); err != nil && (err != io.EOF) {
		t.Fatal(err)
	}
	return string(b)
}

func TestBuild(t *testing.T) {
	c := small(t)
	motd := filepath.Join(t.TempDir(), "motd")
	write(t, motd, []byte("hello\n"))
	c.Files = map[string]string{"/etc/motd": motd}
	var out bytes.Buffer
	sum, err := Build(&out, c)
	if err != nil {
		t.Fatal(err)
	}
	got := unpack(t, out.Bytes())

	var site wire.Site
	if err := json.Unmarshal([]byte(content(t, got["etc/rookery/site.json"])), &site); err != nil || !bytes.Equal(site.Key, c.Site.Key) || site.CA != c.Site.CA {
		t.Errorf("site.json: %+v, %v; want what was given", site, err)
	}
	modules := "usr/lib/modules/6.1-fake/"
	for name, want := range map[string]string{
		"init":                      string(fakeModule()),
		"lib":                       "usr/lib",
		"etc/motd":                  "hello\n",
		"etc/rookery/modules":       "nls_cp437\ncrc32c_generic\nvfat\n",
		modules + "modules.builtin": string(smallKernel["modules.builtin"]),
		modules + "kernel/drivers/virtio/virtio_pci.ko": string(smallKernel["kernel/drivers/virtio/virtio_pci.ko"]),
	} {
		if r, ok := got[name]; !ok || content(t, r) != want {
			t.Errorf("%s: there %v, %q; want %q", name, ok, content(t, r), want)
		}
	}
	if r := got["dev/console"]; r.Mode != cpio.S_IFCHR|0o600 || r.Rmajor != 5 || r.Rminor != 1 {
		t.Errorf("dev/console: mode %o, device %d:%d; want a character device 5:1", r.Mode, r.Rmajor, r.Rminor)
	}
	if got["init"].Mode != cpio.S_IFREG|0o755 {
		t.Errorf("init: mode %o, want an executable", got["init"].Mode)
	}
	if _, ok := got[modules+"kernel/drivers/net/ethernet/intel/igb.ko"]; ok {
		t.Errorf("igb is packed, and is not in the profile")
	}
	var total int64
	for _, r := range got {
		total += int64(r.FileSize)
	}
	if sum.Kernel != "6.1-fake" || sum.Modules != 8 || !slices.Contains(sum.Absent, "e1000") || slices.Contains(sum.Absent, "ext4") ||
		sum.Size != int64(out.Len()) || sum.AgentBytes+sum.ModuleBytes+sum.ToolBytes+sum.OtherBytes != total {
		t.Errorf("summary %+v does not add up to %d bytes, %d packed", sum, total, out.Len())
	}
}

func TestSameFilesSameBytes(t *testing.T) {
	c := small(t)
	var first, second bytes.Buffer
	if _, err := Build(&first, c); err != nil {
		t.Fatal(err)
	}
	// The same content elsewhere, of another age and unpacked with another umask.
	agent := filepath.Join(t.TempDir(), "other")
	write(t, agent, fakeModule())
	if err := os.Chmod(agent, 0o700); err != nil {
		t.Fatal(err)
	}
	c.Agent, c.Modules = agent, fakeKernel(t, smallKernel)
	err := filepath.WalkDir(c.Modules, func(p string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chtimes(p, time.Unix(1, 0), time.Unix(1, 0)))
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Build(&second, c); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Fatalf("two builds of the same files differ: %d and %d bytes", first.Len(), second.Len())
	}
}

func TestTools(t *testing.T) {
	if _, err := find("mkswap"); err != nil {
		t.Skipf("%v, to run this", err)
	}
	c := small(t)
	c.Tools = []string{"mkswap"}
	var out bytes.Buffer
	if _, err := Build(&out, c); err != nil {
		t.Fatal(err)
	}
	got := unpack(t, out.Bytes())
	if r := got["usr/sbin/mkswap"]; r.Mode != cpio.S_IFREG|0o755 {
		t.Errorf("mkswap: mode %o, want an executable", r.Mode)
	}
	libc := func(name string) bool { return strings.HasSuffix(name, "/libc.so.6") }
	if names := slices.Collect(maps.Keys(got)); !slices.ContainsFunc(names, libc) {
		t.Errorf("no libc in %v", names)
	}
}

func TestBuildRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no agent", func(c *Config) { c.Agent = "/nowhere/agent" }, "initramfs: agent: open /nowhere/agent: no such file or directory: the path of rookery-agent is wanted"},
		{"script as agent", func(c *Config) { c.Agent = c.Modules + "/modules.builtin" }, "initramfs: agent: MODULES/modules.builtin: not an ELF file: "},
		{"linked dynamically", func(c *Config) { write(t, c.Agent, dynamic()) }, "initramfs: agent: AGENT: linked dynamically: build it with CGO_ENABLED=0"},
		{"no modules", func(c *Config) { c.Modules = "/nowhere" }, "initramfs: modules: lstat /nowhere: no such file or directory: want the /lib/modules/VERSION of a kernel package"},
		{"no kernel there", func(c *Config) { c.Modules = filepath.Dir(c.Agent) }, "modules.builtin: no such file or directory: the kernel's package has it beside its modules"},
		{"profile", func(c *Config) { c.Profile = "toaster" }, `initramfs: modules: profile "toaster": want "vm" or "metal"`},
		{"broken module", func(c *Config) { write(t, c.Modules+"/kernel/drivers/virtio/virtio_pci.ko", []byte("<html>")) }, "initramfs: modules: kernel/drivers/virtio/virtio_pci.ko: not an ELF file: "},
		{"tool", func(c *Config) { c.Tools = []string{"mkfs.nosuch"} }, "initramfs: tools: mkfs.nosuch: not in /usr/sbin, /usr/bin, /sbin, /bin"},
		{"key", func(c *Config) { c.Site.Key = []byte("short") }, "initramfs: site: key: 5 bytes, want 32"},
		{"CA", func(c *Config) { c.Site.CA = "none" }, "initramfs: site: CA: no PEM block"},
		{"file", func(c *Config) { c.Files = map[string]string{"../x": c.Agent} }, "initramfs: files: ../x: leaves the archive"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := small(t)
			tt.change(&c)
			want := strings.NewReplacer("AGENT", c.Agent, "MODULES", c.Modules).Replace(tt.want)
			_, err := Build(io.Discard, c)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Fatalf("Build: %v\nwant %s", err, want)
			}
		})
	}
}

func TestToolNamesItsPackage(t *testing.T) {
	packages["mkfs.nosuch"] = "nosuch-progs"
	t.Cleanup(func() { delete(packages, "mkfs.nosuch") })
	if _, err := find("mkfs.nosuch"); err == nil || !strings.HasSuffix(err.Error(), ": install nosuch-progs") {
		t.Fatalf("find: %v, want the package", err)
	}
}

// dynamic is an ELF header and one program header that asks for an interpreter.
func dynamic() []byte {
	var b bytes.Buffer
	for _, v := range []any{
		[16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, uint16(2), uint16(62), uint32(1), uint64(0), uint64(64), uint64(0),
		uint32(0), uint16(64), uint16(56), uint16(1), uint16(64), uint16(0), uint16(0),
		uint32(3), uint32(4), uint64(0), uint64(0), uint64(0), uint64(0), uint64(0), uint64(1),
	} {
		binary.Write(&b, binary.LittleEndian, v)
	}
	return b.Bytes()
}
