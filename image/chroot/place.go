package chroot

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// mountPoints are the directories that a tree needs for kernel filesystems.
var mountPoints = []string{"proc", "sys", "dev", "run"}

// An addition is a mount point that the tree did not have.
type addition struct {
	path string
	info fs.FileInfo
}

// additions are what was made in a tree, to be removed again.
type additions struct {
	root *os.Root
	made []addition
}

// place makes the mount points that are missing in the tree, and settles where
// resolv.conf is shown. What it returns is to be removed, with an error as well.
func place(root *os.Root, j *job) (*additions, error) {
	a := &additions{root: root}
	for _, dir := range mountPoints {
		info, err := root.Lstat(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = a.add(dir, func() error { return root.Mkdir(dir, 0o755) })
		case err == nil && !info.IsDir():
			err = fmt.Errorf("%s: is no directory", dir)
		}
		if err != nil {
			return a, err
		}
	}
	if at, ok, err := resolvConf(root); err != nil {
		return a, err
	} else if ok && j.Resolv != "" {
		j.Files = append(j.Files, file{at, j.Resolv, 0o644})
	}
	for _, f := range j.Files {
		if volatile(f.Path) {
			continue
		}
		if _, err := root.Stat(f.Path); errors.Is(err, fs.ErrNotExist) {
			err = a.add(f.Path, func() error {
				file, err := root.OpenFile(f.Path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, f.Mode)
				if err != nil {
					return err
				}
				return file.Close()
			})
			if err != nil {
				return a, err
			}
		} else if err != nil {
			return a, err
		}
	}
	return a, nil
}

// volatile says whether p lies on a filesystem that the command gets anew.
func volatile(p string) bool {
	top, _, _ := strings.Cut(p, "/")
	return top == "run" || top == "dev"
}

// resolvConf follows the tree's etc/resolv.conf to where its content is to be:
// often a link to a file below /run that a running system would make. A tree
// without etc has no use for it.
func resolvConf(root *os.Root) (at string, ok bool, err error) {
	if _, err := root.Lstat("etc"); errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	at, rest := ".", []string{"etc", "resolv.conf"}
	for links := 0; len(rest) > 0; {
		name := path.Join("/", at, rest[0])[1:] // nothing is above the root
		rest = rest[1:]
		if volatile(name) {
			return path.Join(append([]string{name}, rest...)...), true, nil
		}
		info, err := root.Lstat(cmp.Or(name, "."))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return name, len(rest) == 0, nil // or a link to nowhere
		case err != nil:
			return "", false, err
		case info.Mode().Type() == fs.ModeSymlink:
			if links++; links > 8 {
				return "", false, errors.New("etc/resolv.conf: too many links")
			}
			to, err := root.Readlink(name)
			if err != nil {
				return "", false, err
			}
			if path.IsAbs(to) {
				at = "."
			}
			rest = append(strings.Split(to, "/"), rest...)
		case info.IsDir() && len(rest) > 0, info.Mode().IsRegular() && len(rest) == 0:
			at = name
		default:
			return "", false, fmt.Errorf("%s: is neither file nor link", name)
		}
	}
	return at, true, nil
}

// add makes p. Its directory looks as if nothing had happened.
func (a *additions) add(p string, create func() error) error {
	if err := a.quietly(p, create); err != nil {
		return err
	}
	info, err := a.root.Lstat(p)
	if err != nil {
		return err
	}
	a.made = append(a.made, addition{p, info})
	return nil
}

// remove takes away what was made, unless the command put something else there.
func (a *additions) remove() error {
	var errs []error
	for _, m := range a.made {
		info, err := a.root.Lstat(m.path)
		if err != nil || !os.SameFile(info, m.info) || info.Mode().IsRegular() && info.Size() > 0 {
			continue
		}
		err = a.quietly(m.path, func() error { return a.root.Remove(m.path) })
		if err != nil && !errors.Is(err, unix.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// quietly does what changes the directory of p, and leaves its times alone.
func (a *additions) quietly(p string, do func() error) error {
	dir, err := a.root.Open(path.Dir(p))
	if err != nil {
		return err
	}
	defer dir.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}
	return unix.UtimesNanoAt(int(dir.Fd()), ".", times, 0)
}
