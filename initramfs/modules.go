package initramfs

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/kmodule"
)

// maxModule bounds one module: the largest of Debian's (amdgpu) holds 22 MiB.
const maxModule = 128 << 20

// A kernel is a directory of modules, /lib/modules/VERSION. The package that
// brings it need not be installed: nothing here wants depmod's files.
type kernel struct {
	dir     string
	version string
	files   map[string]string // module name -> path below dir
	builtin map[string]bool   // module name -> compiled into the kernel
	builtTo []byte            // modules.builtin as found
	read    map[string]*module
}

// A module is one file of a kernel and what it says of itself.
type module struct {
	path string // below the kernel's directory, without the suffix of a compression
	body []byte // the plain ELF file
	modinfo
}

// A modinfo is what of a module's .modinfo section decides about loading it.
type modinfo struct {
	Depends []string // symbols come from these
	Pre     []string // wants these before it, by name or by alias
	Aliases []string // patterns of the devices and algorithms it is for
}

// openKernel lists the modules below dir.
func openKernel(dir string) (*kernel, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: want the /lib/modules/VERSION of a kernel package", err)
	}
	k := &kernel{dir: real, version: filepath.Base(real), files: map[string]string{}, builtin: map[string]bool{}, read: map[string]*module{}}
	k.builtTo, err = os.ReadFile(filepath.Join(real, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("%w: the kernel's package has it beside its modules", err)
	}
	for line := range strings.Lines(string(k.builtTo)) {
		k.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	err = fs.WalkDir(os.DirFS(real), "kernel", func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasSuffix(plainPath(p), ".ko") {
			k.files[moduleName(p)] = p
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", real, err)
	}
	return k, nil
}

// plainPath is the path that a module has once it is decompressed.
func plainPath(p string) string {
	for _, suffix := range []string{".xz", ".gz", ".zst"} {
		p = strings.TrimSuffix(p, suffix)
	}
	return p
}

// moduleName is the name the kernel gives the module in a file: file names mix
// dashes and underscores, the kernel knows only underscores.
func moduleName(p string) string {
	return canonical(strings.TrimSuffix(path.Base(plainPath(p)), ".ko"))
}

func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// expand turns a profile's entries into module names: an entry with a slash is a
// directory below kernel/, all modules in it; another is one module.
// Absent are the entries this kernel has neither as modules nor built in.
func (k *kernel) expand(entries []string) (names, absent []string) {
	for _, entry := range entries {
		var found []string
		if strings.Contains(entry, "/") {
			for name, p := range k.files {
				if strings.HasPrefix(p, "kernel/"+strings.TrimSuffix(entry, "/")+"/") {
					found = append(found, name)
				}
			}
		} else if name := canonical(entry); k.files[name] != "" {
			found = []string{name}
		} else if k.builtin[name] {
			continue
		}
		if len(found) == 0 {
			absent = append(absent, entry)
		}
		names = append(names, found...)
	}
	slices.Sort(names)
	return slices.Compact(names), absent
}

// load reads one module, once.
func (k *kernel) load(name string) (*module, error) {
	if m := k.read[name]; m != nil {
		return m, nil
	}
	rel := k.files[name]
	body, err := readModule(filepath.Join(k.dir, rel))
	if err != nil {
		return nil, err
	}
	info, err := parseModule(body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", rel, err)
	}
	m := &module{path: plainPath(rel), body: body, modinfo: info}
	k.read[name] = m
	return m, nil
}

func readModule(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := kmodule.CompressionReader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if c, ok := r.(interface{ Close() }); ok { // zstd's
		defer c.Close()
	}
	body, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(body) > maxModule {
		return nil, fmt.Errorf("%s: more than %d bytes: too large for a module", file, maxModule)
	}
	return body, nil
}

// parseModule finds the .modinfo section in a plain ELF file.
func parseModule(body []byte) (modinfo, error) {
	f, err := elf.NewFile(bytes.NewReader(body))
	if err != nil {
		return modinfo{}, fmt.Errorf("not an ELF file: %w", err)
	}
	s := f.Section(".modinfo")
	if s == nil {
		return modinfo{}, errors.New("no .modinfo section: not a kernel module")
	}
	b, err := s.Data()
	if err != nil {
		return modinfo{}, fmt.Errorf(".modinfo: %w", err)
	}
	return parseModinfo(b), nil
}

// parseModinfo reads key=value strings, each ended by NUL (include/linux/moduleparam.h).
func parseModinfo(b []byte) modinfo {
	var info modinfo
	for field := range strings.SplitSeq(string(b), "\x00") {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					info.Depends = append(info.Depends, canonical(name))
				}
			}
		case "softdep": // "pre: a b post: c"
			pre := false
			for _, word := range strings.Fields(value) {
				if strings.HasSuffix(word, ":") {
					pre = word == "pre:"
				} else if pre {
					info.Pre = append(info.Pre, word)
				}
			}
		case "alias":
			info.Aliases = append(info.Aliases, value)
		}
	}
	return info
}

// resolve names the modules that a soft dependency means. Those that are not
// modules' names are names of algorithms ("crc32c"), which only crypto modules
// carry: the others are not read.
func (k *kernel) resolve(word string) ([]string, error) {
	if name := canonical(word); k.builtin[name] || k.files[name] != "" {
		return []string{name}, nil
	}
	var names []string
	for name, p := range k.files {
		if !strings.Contains(p, "crypto/") {
			continue
		}
		m, err := k.load(name)
		if err != nil {
			return nil, err
		}
		if slices.Contains(m.Aliases, word) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// closure is every module needed to load the named ones, by name.
func (k *kernel) closure(names []string) (map[string]*module, error) {
	all := map[string]*module{}
	var add func(name string) error
	add = func(name string) error {
		if all[name] != nil || k.builtin[name] {
			return nil
		}
		m, err := k.load(name)
		if err != nil {
			return err
		}
		all[name] = m
		for _, dep := range m.Depends {
			if k.files[dep] == "" && !k.builtin[dep] {
				return fmt.Errorf("%s: depends on %s, which kernel %s does not have", m.path, dep, k.version)
			}
			if err := add(dep); err != nil {
				return err
			}
		}
		for _, word := range m.Pre {
			soft, err := k.resolve(word)
			if err != nil {
				return err
			}
			for _, name := range soft {
				if err := add(name); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// order lists names for probing by hand, soft dependencies first: the kernel
// asks a modprobe for these, and the initramfs has none.
func (k *kernel) order(names []string, all map[string]*module) ([]string, error) {
	var out []string
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		m := all[name]
		if m == nil || seen[name] { // nil: built in, or absent
			return nil
		}
		seen[name] = true
		for _, word := range m.Pre {
			soft, err := k.resolve(word)
			if err != nil {
				return err
			}
			for _, name := range soft {
				if err := visit(name); err != nil {
					return err
				}
			}
		}
		out = append(out, name)
		return nil
	}
	for _, name := range names {
		if err := visit(canonical(name)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// depmod writes what depmod would: modules.dep (each module with all it needs,
// the first to be loaded last) and modules.alias.
func depmod(all map[string]*module) (dep, alias string) {
	names := make([]string, 0, len(all))
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	var deps, aliases strings.Builder
	for _, name := range names {
		deps.WriteString(all[name].path + ":")
		for _, need := range needs(name, all) {
			deps.WriteString(" " + all[need].path)
		}
		deps.WriteByte('\n')
		for _, pattern := range all[name].Aliases {
			fmt.Fprintf(&aliases, "alias %s %s\n", pattern, name)
		}
	}
	return deps.String(), aliases.String()
}

// needs lists everything a module depends on, dependants before what they need.
func needs(name string, all map[string]*module) []string {
	var out []string
	seen := map[string]bool{name: true}
	var visit func(string)
	visit = func(name string) {
		for _, dep := range all[name].Depends {
			if all[dep] != nil && !seen[dep] { // nil: built in
				seen[dep] = true
				visit(dep)
				out = append(out, dep)
			}
		}
	}
	visit(name)
	slices.Reverse(out)
	return out
}
