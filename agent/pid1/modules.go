package pid1

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/kmodule"
	"golang.org/x/sys/unix"
)

// LoadModules loads the modules that the machine's devices ask for, then those
// named in the file names. A kernel without modules is no error.
func LoadModules(sys fs.FS, names string, log *slog.Logger) error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	dir := filepath.Join("/lib/modules", unix.ByteSliceToString(uts.Release[:]))
	file, err := os.Open(filepath.Join(dir, "modules.alias"))
	if errors.Is(err, fs.ErrNotExist) {
		log.Warn("modules: none for this kernel", "dir", dir)
		return nil
	} else if err != nil {
		return err
	}
	defer file.Close()
	aliases, err := ParseAliases(file)
	if err != nil {
		return fmt.Errorf("%s: %w", file.Name(), err)
	}
	prober, err := kmodule.NewProber(kmodule.ProbeOpts{})
	if err != nil {
		return err
	}
	probe := func(name string) error { return prober.Probe(name, "") }

	// By name first: what a disk driver wants (crc32c, for one) is there in time.
	wanted, err := os.ReadFile(names)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var loaded, failed []string
	for _, name := range list(string(wanted)) {
		if err := probe(name); err != nil {
			failed = append(failed, fmt.Sprintf("%s (%v)", name, err))
		} else {
			loaded = append(loaded, name)
		}
	}
	plugged, errs := Coldplug(sys, aliases, probe)
	log.Info("modules", "by_name", strings.Join(loaded, ","), "for_devices", strings.Join(plugged, ","))
	if failed = append(failed, errs...); len(failed) > 0 {
		log.Info("modules not loaded, perhaps built in or for no device here: " + strings.Join(failed, "; "))
	}
	return nil
}

// list is the lines of a file, without comments.
func list(text string) (names []string) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line != "" {
			names = append(names, line)
		}
	}
	return names
}

// Aliases is a modules.alias file: what patterns of devices a module is for,
// by the bus, which is the pattern up to its colon.
type Aliases map[string][]alias

type alias struct{ pattern, module string }

// ParseAliases reads modules.alias as depmod writes it.
func ParseAliases(r io.Reader) (Aliases, error) {
	aliases := Aliases{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || fields[0] != "alias" {
			continue
		}
		if bus, _, ok := strings.Cut(fields[1], ":"); ok {
			aliases[bus] = append(aliases[bus], alias{fields[1], fields[2]})
		}
	}
	return aliases, lines.Err()
}

// Match lists the modules for a device, by its modalias.
func (a Aliases) Match(modalias string) []string {
	var modules []string
	bus, _, _ := strings.Cut(modalias, ":")
	for _, alias := range a[bus] {
		// The pattern is fnmatch(3)'s without slashes; a broken one matches nothing.
		if ok, _ := path.Match(alias.pattern, modalias); ok && !slices.Contains(modules, alias.module) {
			modules = append(modules, alias.module)
		}
	}
	return modules
}

// rounds of Coldplug: a bus's module makes devices that want others (PCI,
// virtio, and what hangs on that).
const rounds = 4

// Coldplug probes the modules for all devices below sys/devices, again for the
// devices that appear by that, and lists what was loaded and what was not.
func Coldplug(sys fs.FS, aliases Aliases, probe func(module string) error) (loaded, failed []string) {
	tried := map[string]bool{}
	for range rounds {
		fresh := false
		_ = fs.WalkDir(sys, "devices", func(name string, entry fs.DirEntry, err error) error {
			if err != nil || entry.Name() != "modalias" {
				return nil // devices come and go
			}
			b, err := fs.ReadFile(sys, name)
			if err != nil {
				return nil
			}
			for _, module := range aliases.Match(strings.TrimSpace(string(b))) {
				if tried[module] {
					continue
				}
				tried[module], fresh = true, true
				if err := probe(module); err != nil {
					failed = append(failed, fmt.Sprintf("%s (%v)", module, err))
				} else {
					loaded = append(loaded, module)
				}
			}
			return nil
		})
		if !fresh {
			break
		}
	}
	return loaded, failed
}
