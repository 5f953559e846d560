package rookery_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// floors lists every package from the ground up, as DESIGN 3 does: a package
// imports only packages that come before it. A package PATH/*test, the fakes and
// suites of PATH, stands where PATH stands.
var floors = []string{
	// for tests alone
	"netnstest",
	// pure: no I/O
	"disklayout", "boot/netboot", "wire",
	// mechanisms
	"image", "image/oci", "image/store", "image/registry", "image/tree", "image/chroot", "image/capture",
	"transport", "transport/swarm/rules", "transport/swarm", "transport/multicast", "transport/tracker", "transport/interop", "transport/http", "transport/rsync",
	"disklayout/apply", "boot/loader", "fixup",
	// parts
	"agent/install", "agent/host", "agent/netup", "agent/lldp", "agent/report", "agent/pid1",
	"server/serve", "server/site", "server/store", "server/fleet",
	"server/seed", "server/carousel", "server/rsyncd", "server/dhcpd", "server/radvd", "server/tftpd", "server/httpd",
	// programs
	"initramfs", "cmd/rookery", "cmd/rookery-agent",
	// whole stories
	"lab", "cmd/rookery-demo", "qemu-tests", "swarm-tests", "bench/sim", "bench",
}

// importers says who may import other people's modules: one package each, so
// that a library is replaced in one place, or a reason why more. Tests are free
// to import what they like. An empty list is for what everyone may use.
var importers = map[string]struct {
	by  []string
	why string
}{
	"golang.org/x/sys":                           {nil, "system calls"},
	"golang.org/x/net":                           {nil, "ICMP and socket options"},
	"golang.org/x/term":                          {nil, "the width of a terminal"},
	"golang.org/x/crypto/ssh":                    {nil, "host keys in their file format, and the way to rsync through ssh"},
	"github.com/anacrolix/torrent/metainfo":      {[]string{"transport"}, ""},
	"github.com/anacrolix/torrent/bencode":       {[]string{"transport", "transport/swarm", "transport/tracker"}, "torrents, and the two ends of an announcement"},
	"github.com/anacrolix/torrent/peer_protocol": {[]string{"transport/swarm"}, ""},
	"github.com/diskfs/go-diskfs":                {[]string{"disklayout/apply"}, ""},
	"github.com/google/go-containerregistry":     {[]string{"image/registry"}, ""},
	"github.com/insomniacslk/dhcp":               {[]string{"agent/netup", "server/dhcpd"}, "the two ends of one protocol"},
	"github.com/klauspost/compress":              {[]string{"image", "image/registry", "image/tree", "initramfs"}, "layers are zstd, other people's and tarballs may be, and the kernel unpacks it"},
	"github.com/klauspost/reedsolomon":           {[]string{"transport/multicast"}, ""},
	"github.com/pin/tftp":                        {[]string{"server/tftpd"}, ""},
	"github.com/spf13/cobra":                     {[]string{"cmd/rookery"}, ""},
	"github.com/spf13/pflag":                     {[]string{"cmd/rookery"}, ""},
	"github.com/u-root/u-root/pkg/cpio":          {[]string{"initramfs"}, ""},
	"github.com/u-root/u-root/pkg/ldd":           {[]string{"initramfs"}, ""},
	"github.com/u-root/u-root/pkg/kmodule":       {[]string{"agent/pid1", "initramfs"}, "one loads modules, the other packs them and reads the same compressions"},
	"github.com/vishvananda/netlink":             {[]string{"agent/netup"}, ""},
	"go.etcd.io/bbolt":                           {[]string{"server/store"}, ""},
	"gonum.org/v1/plot":                          {[]string{"bench"}, ""},
	"go.yaml.in/yaml":                            {[]string{"cmd/rookery", "server/fleet"}, "the server's configuration, and the records of a site"},
}

// A use is one import: of what, by which package, in which file.
type use struct {
	by, of, file string
	test         bool
}

// uses reads the import declarations of the whole tree. It reads the files
// itself: an answer of `go list` would be taken from the test cache after an
// import was added.
func uses(t *testing.T) []use {
	t.Helper()
	var all []use
	err := fs.WalkDir(os.DirFS("."), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if p != "." && (name == "testdata" || name == "out" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_")) {
				return fs.SkipDir
			}
			if _, err := os.Stat(path.Join(p, "go.mod")); p != "." && err == nil {
				return fs.SkipDir // a module of its own, which no package of this one can import
			}
			return nil
		}
		if path.Ext(p) != ".go" || path.Dir(p) == "." {
			return nil
		}
		src, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, src, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			of, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			all = append(all, use{path.Dir(p), of, p, strings.HasSuffix(p, "_test.go")})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("no imports found: this test has to run at the root of the tree")
	}
	return all
}

// fakes reports whether a package holds fakes and suites, and whose.
func fakes(pkg string) (of string, ok bool) {
	of = path.Dir(pkg)
	return of, strings.HasSuffix(pkg, "test") && slices.Contains(floors, of)
}

// forbidden says what is wrong with one package of ours importing another; "" is nothing.
func forbidden(by, of string, test bool) string {
	home := by
	if base, ok := fakes(by); ok {
		if home = base; of == base {
			return ""
		}
		test = true
	}
	if base, ok := fakes(of); ok {
		if !test && slices.Index(floors, home) < slices.Index(floors, "lab") {
			return "only tests import fakes"
		}
		if of = base; of == home { // the suite beside the package it tests
			return ""
		}
	}
	if of == "netnstest" && !test {
		return "only tests import it"
	}
	from, to := slices.Index(floors, home), slices.Index(floors, of)
	switch {
	case from < 0:
		return by + " is on no floor: put it into the list"
	case to < 0:
		return of + " is on no floor: put it into the list"
	case strings.HasPrefix(home, "agent/") && strings.HasPrefix(of, "server/"),
		strings.HasPrefix(home, "server/") && strings.HasPrefix(of, "agent/"):
		return "agent and server meet in wire only"
	case home == of && !test, from < to:
		return of + " is on a later floor"
	}
	return ""
}

func TestFloors(t *testing.T) {
	homeless := map[string]bool{}
	for _, u := range uses(t) {
		if _, ok := fakes(u.by); !ok && !slices.Contains(floors, u.by) {
			homeless[u.by] = true
			continue
		}
		if of, ours := strings.CutPrefix(u.of, "rookery/"); ours {
			if why := forbidden(u.by, of, u.test); why != "" {
				t.Errorf("%s imports %s: %s", u.file, u.of, why)
			}
		}
	}
	for _, pkg := range slices.Sorted(maps.Keys(homeless)) {
		t.Errorf("%s is on no floor: put it into the list", pkg)
	}
}

func TestForbidden(t *testing.T) {
	for _, tt := range []struct {
		by, of string
		test   bool
		want   bool
	}{
		{"agent/install", "wire", false, false},
		{"wire", "agent/install", false, true},
		{"wire", "image", true, true}, // in tests as well
		{"agent/install", "server/store", false, true},
		{"server/store", "agent/host", true, true},
		{"server/store", "server/store/storetest", true, false},
		{"server/store", "server/store/storetest", false, true},
		{"server/store/storetest", "server/store", false, false},
		{"server/store/storetest", "server/httpd", false, true},
		{"transport/http", "transport/transporttest", true, false},
		{"lab", "server/dhcpd/dhcpdtest", false, false},
		{"new/package", "wire", false, true},
	} {
		if why := forbidden(tt.by, tt.of, tt.test); (why != "") != tt.want {
			t.Errorf("%s imports %s (test %v): %q, want an objection: %v", tt.by, tt.of, tt.test, why, tt.want)
		}
	}
}

// Each module of other people has exactly the importers that the table says.
func TestImporters(t *testing.T) {
	found := map[string]map[string]bool{}
	for _, u := range uses(t) {
		domain, _, _ := strings.Cut(u.of, "/")
		if _, ok := fakes(u.by); u.test || ok || !strings.Contains(domain, ".") {
			continue
		}
		module := ""
		for prefix := range importers {
			if u.of == prefix || strings.HasPrefix(u.of, prefix+"/") {
				module = prefix
			}
		}
		if module == "" {
			t.Errorf("%s imports %s: say in the table who may, and why, and in docs/dependencies.md what for", u.file, u.of)
			continue
		}
		if by := importers[module].by; by != nil && !slices.Contains(by, u.by) {
			t.Errorf("%s imports %s: that is for %s", u.file, u.of, strings.Join(by, ", "))
		}
		if found[module] == nil {
			found[module] = map[string]bool{}
		}
		found[module][u.by] = true
	}
	for module, allowed := range importers {
		for _, by := range allowed.by {
			if !found[module][by] {
				t.Errorf("%s: %s no longer imports it: take it out of the table", module, by)
			}
		}
		if len(allowed.by) > 1 && allowed.why == "" {
			t.Errorf("%s: %d importers and no reason", module, len(allowed.by))
		}
	}
}

// What go.mod asks for is explained.
func TestDependenciesAreExplained(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	direct := map[string]bool{}
	for line := range strings.Lines(string(mod)) {
		words := strings.Fields(strings.TrimPrefix(line, "require "))
		if len(words) == 2 && strings.HasPrefix(words[1], "v") { // a third word is "// indirect"
			direct[words[0]] = true
		}
	}
	if len(direct) == 0 {
		t.Fatal("go.mod: no modules found")
	}
	for _, module := range slices.Sorted(maps.Keys(direct)) {
		if !strings.Contains(string(doc), "`"+module+"`") {
			t.Errorf("docs/dependencies.md: no line about %s", module)
		}
	}
}
