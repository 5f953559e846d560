package initramfs

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/kmodule"
)

// fakeModule is the smallest ELF file with a .modinfo section.
func fakeModule(fields ...string) []byte {
	info := []byte(strings.Join(fields, "\x00") + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	var b bytes.Buffer
	put := func(vs ...any) {
		for _, v := range vs {
			binary.Write(&b, binary.LittleEndian, v)
		}
	}
	at := uint64(64)
	put([16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, uint16(1), uint16(62), uint32(1), uint64(0), uint64(0),
		at+uint64(len(info)+len(names)), uint32(0), uint16(64), uint16(0), uint16(0), uint16(64), uint16(3), uint16(2))
	b.Write(info)
	b.Write(names)
	section := func(name, kind uint32, off uint64, size int) {
		put(name, kind, uint64(0), uint64(0), off, uint64(size), uint32(0), uint32(0), uint64(1), uint64(0))
	}
	section(0, 0, 0, 0)
	section(1, 1, at, len(info))
	section(10, 3, at+uint64(len(info)), len(names))
	return b.Bytes()
}

// fakeKernel writes /lib/modules/6.1-fake below a new directory, and returns its path.
func fakeKernel(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "lib/modules/6.1-fake")
	for name, b := range files {
		write(t, filepath.Join(dir, name), b)
	}
	return dir
}

func write(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

var smallKernel = map[string][]byte{
	"modules.builtin":                          []byte("kernel/drivers/virtio/virtio.ko\nkernel/fs/ext4/ext4.ko\n"),
	"kernel/drivers/virtio/virtio_pci.ko":      fakeModule("depends=virtio", "alias=pci:v00001AF4d*sv*sd*bc*sc*i*"),
	"kernel/drivers/net/virtio_net.ko":         fakeModule("alias=virtio:d00000001v*", "depends=net-failover,virtio"),
	"kernel/drivers/net/net_failover.ko":       fakeModule("depends=failover"),
	"kernel/net/core/failover.ko":              fakeModule("depends="),
	"kernel/fs/fat/vfat.ko":                    fakeModule("depends=fat", "softdep=pre: nls_cp437 crc32c post: late"),
	"kernel/fs/fat/fat.ko":                     fakeModule("depends="),
	"kernel/fs/nls/nls_cp437.ko":               fakeModule(),
	"kernel/fs/nls/late.ko":                    fakeModule(),
	"kernel/crypto/crc32c-generic.ko":          fakeModule("alias=crc32c", "alias=crypto-crc32c"),
	"kernel/drivers/net/ethernet/intel/igb.ko": fakeModule("depends="),
}

func TestClosure(t *testing.T) {
	for _, tt := range []struct {
		name    string
		entries []string
		want    []string
		absent  []string
	}{
		{"depends, dashes and all", []string{"virtio-net"}, []string{"failover", "net_failover", "virtio_net"}, nil},
		{"built in", []string{"ext4"}, nil, nil},
		{"neither", []string{"e1000", "drivers/ata"}, nil, []string{"e1000", "drivers/ata"}},
		{"directory", []string{"drivers/net/ethernet"}, []string{"igb"}, nil},
		{"soft dependencies before it, by name and by algorithm", []string{"vfat"}, []string{"crc32c_generic", "fat", "nls_cp437", "vfat"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, err := openKernel(fakeKernel(t, smallKernel))
			if err != nil {
				t.Fatal(err)
			}
			names, absent := k.expand(tt.entries)
			all, err := k.closure(names)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for name := range all {
				got = append(got, name)
			}
			slices.Sort(got)
			if !slices.Equal(got, tt.want) || !slices.Equal(absent, tt.absent) {
				t.Fatalf("closure of %v: %v, absent %v; want %v, absent %v", tt.entries, got, absent, tt.want, tt.absent)
			}
		})
	}
}

func TestOrder(t *testing.T) {
	k, err := openKernel(fakeKernel(t, smallKernel))
	if err != nil {
		t.Fatal(err)
	}
	all, err := k.closure([]string{"vfat"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.order([]string{"ext4", "vfat", "nls_cp437"}, all)
	if want := []string{"nls_cp437", "crc32c_generic", "vfat"}; err != nil || !slices.Equal(got, want) {
		t.Fatalf("order: %v, %v; want %v", got, err, want)
	}
}

func TestMissingDependency(t *testing.T) {
	k, err := openKernel(fakeKernel(t, map[string][]byte{
		"modules.builtin":                  nil,
		"kernel/drivers/net/virtio_net.ko": fakeModule("depends=failover"),
	}))
	if err != nil {
		t.Fatal(err)
	}
	_, err = k.closure([]string{"virtio_net"})
	if want := "kernel/drivers/net/virtio_net.ko: depends on failover, which kernel 6.1-fake does not have"; err == nil || err.Error() != want {
		t.Fatalf("closure: %v, want %s", err, want)
	}
}

func TestCompressedModules(t *testing.T) {
	plain := fakeModule("alias=pci:x", "depends=")
	for suffix, compress := range map[string]func(*testing.T) []byte{
		"": func(*testing.T) []byte { return plain },
		".gz": func(*testing.T) []byte {
			var b bytes.Buffer
			z := gzip.NewWriter(&b)
			z.Write(plain)
			z.Close()
			return b.Bytes()
		},
		".zst": func(t *testing.T) []byte {
			z, err := zstd.NewWriter(nil)
			if err != nil {
				t.Fatal(err)
			}
			return z.EncodeAll(plain, nil)
		},
		".xz": func(t *testing.T) []byte {
			xz := exec.Command("xz", "--check=crc32") // as the kernel's build does
			xz.Stdin = bytes.NewReader(plain)
			b, err := xz.Output()
			if err != nil {
				t.Skipf("xz: %v: install xz-utils to run this", err)
			}
			return b
		},
	} {
		t.Run("ko"+suffix, func(t *testing.T) {
			k, err := openKernel(fakeKernel(t, map[string][]byte{
				"modules.builtin": nil, "kernel/drivers/e1000.ko" + suffix: compress(t),
			}))
			if err != nil {
				t.Fatal(err)
			}
			m, err := k.load("e1000")
			if err != nil {
				t.Fatal(err)
			}
			if m.path != "kernel/drivers/e1000.ko" || !bytes.Equal(m.body, plain) || !slices.Equal(m.Aliases, []string{"pci:x"}) {
				t.Fatalf("%s: %d bytes, aliases %v; want the plain module", m.path, len(m.body), m.Aliases)
			}
		})
	}
}

// The agent loads modules with kmodule, so kmodule is the judge of modules.dep.
func TestModulesDepAsKmoduleReadsIt(t *testing.T) {
	dir := fakeKernel(t, smallKernel)
	k, err := openKernel(dir)
	if err != nil {
		t.Fatal(err)
	}
	all, err := k.closure([]string{"virtio_net", "virtio_pci"})
	if err != nil {
		t.Fatal(err)
	}
	dep, alias := depmod(all)
	write(t, filepath.Join(dir, "modules.dep"), []byte(dep))
	var loaded []string
	p, err := kmodule.NewProber(kmodule.ProbeOpts{
		RootDir: strings.TrimSuffix(dir, "/lib/modules/6.1-fake"), KVer: "6.1-fake", IgnoreProcMods: true,
		DryRunCB: func(p string) { loaded = append(loaded, moduleName(p)) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Probe("virtio_net", ""); err != nil {
		t.Fatal(err)
	}
	if want := []string{"failover", "net_failover", "virtio_net"}; !slices.Equal(loaded, want) {
		t.Fatalf("loaded %v, want %v, from\n%s", loaded, want, dep)
	}
	if want := "alias virtio:d00000001v* virtio_net\nalias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci\n"; alias != want {
		t.Fatalf("modules.alias:\n%swant\n%s", alias, want)
	}
}

func FuzzParseModule(f *testing.F) {
	f.Add(fakeModule("depends=a,b", "softdep=pre: c post: d", "alias=pci:*"))
	f.Add(fakeModule())
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := parseModule(b)
		if err != nil {
			return
		}
		for _, name := range slices.Concat(info.Depends, info.Pre) {
			if name == "" || strings.Contains(name, "\x00") {
				t.Fatalf("name %q", name)
			}
		}
	})
}
