package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// bind gives the root at dir this system's /dev, /proc, /sys and /run, which
// grub-install and its probes look at. What is mounted below them, efivarfs
// for one, comes along.
func bind(root *os.Root, dir string) (unbind func() error, err error) {
	var bound []string
	unbind = func() error {
		var errs []error
		for i := len(bound) - 1; i >= 0; i-- {
			// Detached, since a bind of /run may hold mounts that are busy there.
			if err := unix.Unmount(bound[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				errs = append(errs, fmt.Errorf("unmount: %s: %w", bound[i], err))
			}
		}
		return errors.Join(errs...)
	}
	for _, name := range []string{"dev", "proc", "sys", "run"} {
		if err := bindOne(root, dir, name); err != nil {
			return nil, errors.Join(fmt.Errorf("bind /%s: %w", name, err), unbind())
		}
		bound = append(bound, dir+"/"+name)
	}
	return unbind, nil
}

func bindOne(root *os.Root, dir, name string) error {
	if err := root.Mkdir(name, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if st, err := root.Lstat(name); err != nil {
		return err
	} else if !st.IsDir() { // a link would be followed out of the root
		return errors.New("is not a directory in the image")
	}
	point := dir + "/" + name
	if err := unix.Mount("/"+name, point, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	// Where / is shared, as systemd makes it, unmounting below here would
	// unmount this system's own.
	if err := unix.Mount("", point, "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return errors.Join(err, unix.Unmount(point, unix.MNT_DETACH))
	}
	return nil
}
