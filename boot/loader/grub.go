package loader

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
)

// A kernel is one that can be started: its file in /boot, and its initramfs's.
type kernel struct {
	version string
	file    string
	initrd  string // "" for none
}

// kernels finds the kernels among the names of /boot, newest first.
func kernels(names []string) []kernel {
	there := map[string]bool{}
	for _, n := range names {
		there[n] = true
	}
	var list []kernel
	for _, n := range names {
		version, ok := strings.CutPrefix(n, "vmlinuz-")
		if !ok {
			version, ok = strings.CutPrefix(n, "vmlinux-")
		}
		if !ok || version == "" {
			continue
		}
		k := kernel{version: version, file: n}
		for _, initrd := range []string{"initrd.img-" + version, "initramfs-" + version + ".img", "initrd-" + version} {
			if there[initrd] {
				k.initrd = initrd
				break
			}
		}
		list = append(list, k)
	}
	slices.SortFunc(list, func(a, b kernel) int { return -compareVersions(a.version, b.version) })
	return list
}

// compareVersions orders by runs of digits as numbers, 6.1.0-9 before 6.1.0-10,
// and by what is between them as text.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na == 0 || nb == 0 {
			if c := cmp.Compare(a[0], b[0]); c != 0 {
				return c
			}
			a, b = a[1:], b[1:]
			continue
		}
		x, y := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
		if c := cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(x, y)); c != 0 {
			return c
		}
		a, b = a[na:], b[nb:]
	}
	return cmp.Compare(len(a), len(b))
}

// digits is how many digits s begins with.
func digits(s string) int { return len(s) - len(strings.TrimLeft(s, "0123456789")) }

// A menu is all that grub.cfg says.
type menu struct {
	title    string // of the system, "Debian GNU/Linux"
	fsModule string // GRUB's module for /boot's filesystem
	fsUUID   string // of /boot's filesystem
	dir      string // of the kernels on it: "/boot", or "/" when /boot is a filesystem
	root     string // the kernel's root=, when it has an initramfs
	bareRoot string // and without: kernels know partitions, not filesystems
	args     []string
	serial   string // "ttyS0,115200", "" for none
	kernels  []kernel
}

// config is grub.cfg.
func (m menu) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Written by Rookery when this machine was installed; update-grub replaces it.\n")
	fmt.Fprintf(&b, "set default=0\nset timeout=1\n")
	if command := grubSerial(m.serial); command != "" {
		fmt.Fprintf(&b, "%s\nterminal_input console serial\nterminal_output console serial\n", command)
	}
	fmt.Fprintf(&b, "insmod part_gpt\ninsmod %s\nsearch --no-floppy --fs-uuid --set=root %s\n", m.fsModule, m.fsUUID)
	for _, k := range m.kernels {
		root := m.root
		if k.initrd == "" {
			root = m.bareRoot
		}
		fmt.Fprintf(&b, "menuentry %s {\n", quote(m.title+", "+k.version))
		fmt.Fprintf(&b, "\tlinux %s root=%s ro", quote(path.Join(m.dir, k.file)), root)
		for _, arg := range m.args {
			fmt.Fprintf(&b, " %s", quote(arg))
		}
		b.WriteString("\n")
		if k.initrd != "" {
			fmt.Fprintf(&b, "\tinitrd %s\n", quote(path.Join(m.dir, k.initrd)))
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// quote makes s one word of GRUB's language, which has the shell's quotes.
func quote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./=,:+@%") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// grubSerial is GRUB's command for the line that Linux calls serial; "" for a
// line that is not one of a PC.
func grubSerial(serial string) string {
	name, mode, _ := strings.Cut(serial, ",")
	unit, ok := strings.CutPrefix(name, "ttyS")
	if !ok || digits(unit) != len(unit) || unit == "" {
		return ""
	}
	speed := mode[:digits(mode)]
	if speed == "" {
		speed = "115200"
	}
	return "serial --unit=" + unit + " --speed=" + speed
}

// kernelArgs joins what the image wants on the command line (words), what the
// node wants and the consoles. The last console is the one that has /dev/console.
func kernelArgs(image []string, node, serial string) []string {
	var args []string
	add := func(words ...string) {
		for _, w := range words {
			if !slices.Contains(args, w) {
				args = append(args, w)
			}
		}
	}
	for _, w := range image {
		if serial == "" || !strings.HasPrefix(w, "console=") {
			add(w)
		}
	}
	add(strings.Fields(node)...)
	if serial != "" {
		add("console=tty0", "console="+serial)
	}
	return args
}

// A setting is one line of /etc/default/grub.
type setting struct{ key, value string }

// setDefaults gives /etc/default/grub these settings and leaves its other
// lines as they are. Settings it has already are changed in place.
func setDefaults(text string, settings []setting) string {
	var out []string
	done := map[string]bool{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		key, _, ok := strings.Cut(strings.TrimSpace(line), "=")
		i := slices.IndexFunc(settings, func(s setting) bool { return ok && s.key == key })
		if i < 0 {
			out = append(out, line)
		} else if !done[key] {
			out = append(out, settings[i].String())
			done[key] = true
		}
	}
	for _, s := range settings {
		if !done[s.key] {
			out = append(out, s.String())
		}
	}
	return strings.Join(out, "\n") + "\n"
}

func (s setting) String() string {
	return s.key + `="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`").Replace(s.value) + `"`
}

// shellValue is the value that a file of KEY=value lines, such as os-release
// and /etc/default/grub, gives to key; the last one counts.
func shellValue(text, key string) string {
	value := ""
	for line := range strings.Lines(text) {
		v, ok := strings.CutPrefix(strings.TrimSpace(line), key+"=")
		if !ok {
			continue
		}
		if len(v) >= 2 && (v[0] == '"' || v[0] == '\'') && v[len(v)-1] == v[0] {
			quoted := v[0] == '"'
			v = v[1 : len(v)-1]
			if quoted {
				v = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\$`, `$`, "\\`", "`").Replace(v)
			}
		}
		value = v
	}
	return value
}
