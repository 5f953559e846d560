// Package fixup turns a copy into a machine of its own, by what it finds in
// the installed root. Everything is read and written through os.Root, so that
// no link in the image leads out of it.
package fixup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"strings"

	"rookery/disklayout"
	"rookery/wire"
)

// A machine is what the fixups work on.
type machine struct {
	root *os.Root
	id   wire.Identity
	plan disklayout.Plan
}

// fixups are in the order in which they are done. Each says in a few words
// what it did; "" means that there was nothing to do.
var fixups = []struct {
	name string
	do   func(machine) (string, error)
}{
	{"hostname", machine.hostname},
	{"machine-id", machine.machineID},
	{"ssh host keys", machine.hostKeys},
	{"fstab", machine.fstab},
	{"network", machine.network},
	{"resolver", machine.resolver},
	{"authorized keys", machine.authorizedKeys},
	{"serial login", machine.serialLogin},
	{"leftovers", machine.leftovers},
}

// Apply makes the root a machine with the identity id on the disk of plan. It
// returns what was done, a line for each thing.
func Apply(ctx context.Context, root string, id wire.Identity, plan disklayout.Plan, log *slog.Logger) ([]string, error) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, fmt.Errorf("fixup: %w", err)
	}
	defer r.Close()
	var done []string
	for _, f := range fixups {
		if err := ctx.Err(); err != nil {
			return done, fmt.Errorf("fixup: %s: %w", f.name, err)
		}
		did, err := f.do(machine{r, id, plan})
		if err != nil {
			return done, fmt.Errorf("fixup: %s: %w", f.name, err)
		}
		if did != "" {
			done = append(done, f.name+": "+did)
			log.Info(f.name, "step", "fixup", "done", did)
		}
	}
	return done, nil
}

// exists says whether name is there, be it a link to nowhere.
func (m machine) exists(name string) bool {
	_, err := m.root.Lstat(name)
	return err == nil
}

// read is the text of a file, "" when there is none.
func (m machine) read(name string) (string, error) {
	b, err := m.root.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(b), err
}

// write makes the file anew: a link in its place is replaced and not followed,
// and a mode stricter than before holds from the first byte on.
func (m machine) write(name, text string, mode fs.FileMode) error {
	if err := m.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := m.remove(name); err != nil {
		return err
	}
	f, err := m.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, text)
	return errors.Join(err, f.Chmod(mode), f.Close()) // chmod: the umask is not ours
}

func (m machine) remove(name string) error {
	err := m.root.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// link makes a symbolic link, in the place of what was there.
func (m machine) link(target, name string) error {
	if err := m.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := m.remove(name); err != nil {
		return err
	}
	return m.root.Symlink(target, name)
}

// list is the names in a directory, none when it is missing.
func (m machine) list(dir string) ([]string, error) {
	entries, err := fs.ReadDir(m.root.FS(), dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// unit says whether systemd's unit is in the image, and where; Debian before
// 12 and images without a merged /usr have it in /lib.
func (m machine) unit(name string) (file string, ok bool) {
	for _, dir := range []string{"usr/lib/systemd/system/", "lib/systemd/system/"} {
		if m.exists(dir + name) {
			return "/" + dir + name, true
		}
	}
	return "", false
}

// enabled says whether systemd starts the unit for target.
func (m machine) enabled(unit, target string) bool {
	return m.exists("etc/systemd/system/" + target + ".wants/" + unit)
}

// enable is systemctl enable, for units whose target is known here.
func (m machine) enable(unit, target, file string) error {
	return m.link(file, "etc/systemd/system/"+target+".wants/"+unit)
}

// lines splits text; a last line without an end is one too.
func lines(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(text, "\n"), "\n")
}
