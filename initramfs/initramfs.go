// Package initramfs builds what a machine boots over the network: a cpio archive
// of the agent, the modules of one kernel, and the few tools the agent runs.
// It needs files and no toolchain; the same files give the same bytes.
package initramfs

import (
	"crypto/ed25519"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/u-root/u-root/pkg/ldd"

	"rookery/wire"
)

// A Config says what goes in.
type Config struct {
	Agent   string            // path of the rookery-agent binary, static; becomes /init
	Modules string            // the kernel's modules: /lib/modules/VERSION, wherever it lies
	Profile Profile           // which of them
	Site    wire.Site         // whom the agent will trust
	Tools   []string          // programs by name or path; nil: DefaultTools
	Files   map[string]string // more: path in the archive -> path on this host
}

// DefaultTools are the programs the agent runs, and a shell for when it fails.
var DefaultTools = []string{"mke2fs", "mkfs.vfat", "mkswap", "busybox"}

// A Summary says what went in. Sizes are bytes before compression, but Size.
type Summary struct {
	Kernel  string   // its version, from the directory's name
	Modules int      // how many
	Absent  []string // what the profile lists and this kernel does not have

	AgentBytes  int64
	ModuleBytes int64
	ToolBytes   int64 // with their libraries
	OtherBytes  int64
	Size        int64 // of the compressed archive
}

// packages says which Debian package has a tool.
var packages = map[string]string{
	"mke2fs": "e2fsprogs", "e2fsck": "e2fsprogs", "mkfs.vfat": "dosfstools", "mkswap": "util-linux",
	"busybox": "busybox-static", "mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs", "rsync": "rsync",
}

// Build writes an initramfs, compressed with zstd, to w. Errors name what is
// missing and, where known, the package that has it.
func Build(w io.Writer, c Config) (Summary, error) {
	a := archive{}
	var sum Summary
	for _, step := range []struct {
		name string
		size *int64
		do   func() error
	}{
		{"agent", &sum.AgentBytes, func() error { return a.agent(c.Agent) }},
		{"modules", &sum.ModuleBytes, func() error { return a.modules(c.Modules, c.Profile, &sum) }},
		{"tools", &sum.ToolBytes, func() error { return a.tools(c.Tools) }},
		{"site", &sum.OtherBytes, func() error { return a.site(c.Site) }},
		{"files", &sum.OtherBytes, func() error { return a.extra(c.Files) }},
		{"frame", &sum.OtherBytes, a.frame},
	} {
		before := a.size()
		if err := step.do(); err != nil {
			return Summary{}, fmt.Errorf("initramfs: %s: %w", step.name, err)
		}
		*step.size += a.size() - before
	}
	counted := &counter{w: w}
	if err := a.writeTo(counted); err != nil {
		return Summary{}, fmt.Errorf("initramfs: write: %w", err)
	}
	sum.Size = counted.n
	return sum, nil
}

// An archive is the records to be written, by name.
type archive map[string]cpio.Record

// add puts a record in its place and makes the directories above it. Debian
// keeps /bin, /sbin, /lib and /lib64 below /usr and links to them, and so does
// the archive: programs and libraries are found by either name.
func (a archive) add(r cpio.Record) {
	name := path.Clean(strings.TrimLeft(r.Name, "/"))
	if first, rest, ok := strings.Cut(name, "/"); ok && slices.Contains(merged, first) {
		name = path.Join("usr", first, rest)
	}
	r.Name = name
	a[name] = r
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := a[dir]; !ok {
			a[dir] = cpio.Directory(dir, 0o755)
		}
	}
}

var merged = []string{"bin", "sbin", "lib", "lib64"}

func (a archive) size() (n int64) {
	for _, r := range a {
		n += int64(r.FileSize)
	}
	return n
}

// file copies one file or symbolic link of this host.
func (a archive) file(name, host string) error {
	fi, err := os.Lstat(host)
	if err != nil {
		return err
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(host)
		if err != nil {
			return err
		}
		a.add(cpio.Symlink(name, target))
		return nil
	}
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("%s: %v: not a file", host, fi.Mode().Type())
	}
	b, err := os.ReadFile(host)
	if err != nil {
		return err
	}
	perm := uint64(0o644) // the umask of whoever unpacked the file is no input
	if fi.Mode()&0o100 != 0 {
		perm = 0o755
	}
	a.add(cpio.StaticFile(name, string(b), perm))
	return nil
}

func (a archive) agent(host string) error {
	f, err := elf.Open(host)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the path of rookery-agent is wanted", err)
	} else if err != nil {
		return fmt.Errorf("%s: not an ELF file: %w", host, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s: linked dynamically: build it with CGO_ENABLED=0", host)
		}
	}
	b, err := os.ReadFile(host)
	if err != nil {
		return err
	}
	a.add(cpio.StaticFile("init", string(b), 0o755))
	return nil
}

func (a archive) modules(dir string, p Profile, sum *Summary) error {
	listed, ok := profiles[p]
	if !ok {
		return fmt.Errorf("profile %q: want %q or %q", p, VM, Metal)
	}
	k, err := openKernel(dir)
	if err != nil {
		return err
	}
	names, absent := k.expand(append(slices.Clone(listed), filesystems...))
	all, err := k.closure(names)
	if err != nil {
		return err
	}
	probe, err := k.order(filesystems, all)
	if err != nil {
		return err
	}
	root := "lib/modules/" + k.version + "/"
	for _, m := range all {
		a.add(cpio.StaticFile(root+m.path, string(m.body), 0o644))
	}
	dep, alias := depmod(all)
	a.add(cpio.StaticFile(root+"modules.dep", dep, 0o644))
	a.add(cpio.StaticFile(root+"modules.alias", alias, 0o644))
	a.add(cpio.StaticFile(root+"modules.builtin", string(k.builtTo), 0o644))
	var list strings.Builder
	for _, name := range probe {
		list.WriteString(name + "\n")
	}
	a.add(cpio.StaticFile("etc/rookery/modules", list.String(), 0o644))
	sum.Kernel, sum.Modules, sum.Absent = k.version, len(all), absent
	return nil
}

// tools packs programs with the libraries they are linked to, and the chains of
// symbolic links that lead to either.
func (a archive) tools(tools []string) error {
	if tools == nil {
		tools = DefaultTools
	}
	busybox := ""
	for _, tool := range tools {
		host, err := find(tool)
		if err != nil {
			return err
		}
		libs, err := ldd.FList(host)
		if err != nil {
			return fmt.Errorf("%s: libraries: %w", host, err)
		}
		slices.Sort(libs)
		for _, p := range append(follow(host), libs...) {
			if err := a.file(p, p); err != nil {
				return fmt.Errorf("%s: %w", tool, err)
			}
		}
		switch path.Base(tool) {
		case "busybox":
			busybox = host
		case "mke2fs": // the distribution's defaults, which may differ from those compiled in
			if err := a.file("etc/mke2fs.conf", "/etc/mke2fs.conf"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	if busybox == "" {
		return nil
	}
	return a.applets(busybox)
}

// applets links busybox's programs to it, sh among them. Busybox as Debian links
// it dynamically runs none by name alone. What is packed itself stays what it is.
func (a archive) applets(busybox string) error {
	out, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("%s --list: %w", busybox, err)
	}
	for _, name := range strings.Fields(string(out)) {
		_, bin := a["usr/bin/"+name]
		_, sbin := a["usr/sbin/"+name]
		if !bin && !sbin {
			a.add(cpio.Symlink("bin/"+name, busybox))
		}
	}
	return nil
}

// find looks where Debian keeps programs: an ordinary user's PATH lacks /usr/sbin.
func find(tool string) (string, error) {
	if path.IsAbs(tool) {
		_, err := os.Stat(tool)
		return tool, err
	}
	dirs := []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"}
	for _, dir := range dirs {
		if fi, err := os.Stat(path.Join(dir, tool)); err == nil && fi.Mode().IsRegular() {
			return path.Join(dir, tool), nil
		}
	}
	hint := ""
	if p := packages[tool]; p != "" {
		hint = ": install " + p
	}
	return "", fmt.Errorf("%s: not in %s%s", tool, strings.Join(dirs, ", "), hint)
}

// follow lists a path and every path its symbolic links lead through, at most
// as many as the kernel would follow.
func follow(p string) []string {
	paths := []string{p}
	for range 40 {
		target, err := os.Readlink(p)
		if err != nil { // no link, or nothing there: reading it will tell
			break
		}
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(p), target)
		}
		p = target
		paths = append(paths, p)
	}
	return paths
}

func (a archive) site(s wire.Site) error {
	if len(s.Key) != ed25519.PublicKeySize {
		return fmt.Errorf("key: %d bytes, want %d", len(s.Key), ed25519.PublicKeySize)
	}
	block, _ := pem.Decode([]byte(s.CA))
	if block == nil {
		return errors.New("CA: no PEM block")
	}
	if _, err := x509.ParseCertificate(block.Bytes); err != nil {
		return fmt.Errorf("CA: %w", err)
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	a.add(cpio.StaticFile(wire.SiteFile, string(b), 0o644))
	return nil
}

func (a archive) extra(files map[string]string) error {
	for name, host := range files {
		if !filepath.IsLocal(strings.TrimLeft(name, "/")) {
			return fmt.Errorf("%s: leaves the archive", name)
		}
		b, err := filepath.EvalSymlinks(host) // what is asked for by name is wanted, not a link
		if err != nil {
			return err
		}
		if err := a.file(name, b); err != nil {
			return err
		}
	}
	return nil
}

// frame makes what a first process expects to find before it has mounted anything.
func (a archive) frame() error {
	for _, dir := range []string{"dev", "proc", "sys", "run", "root", "mnt"} {
		a.add(cpio.Directory(dir, 0o755))
	}
	a.add(cpio.Directory("tmp", 0o1777))
	// The kernel opens it for /init's standard streams.
	a.add(cpio.CharDev("dev/console", 0o600, 5, 1))
	for _, dir := range merged {
		a.add(cpio.Directory("usr/"+dir, 0o755))
		a[dir] = cpio.Symlink(dir, "usr/"+dir)
	}
	return nil
}

func (a archive) writeTo(w io.Writer) error {
	// The kernel takes windows of up to 128 MiB (lib/decompress_unzstd.c). One
	// encoder goroutine, so that the number of cores is no input.
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	names := make([]string, 0, len(a))
	for name := range a {
		names = append(names, name)
	}
	slices.Sort(names) // parents come before their children
	cw := cpio.Newc.Writer(z)
	for _, name := range names {
		if err := cw.WriteRecord(cpio.MakeReproducible(a[name])); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := cpio.WriteTrailer(cw); err != nil {
		return err
	}
	return z.Close()
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
