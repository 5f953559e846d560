package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// nvram is the firmware's variables, as a directory in efivarfs's form: a file
// per variable, four bytes of attributes before its value.
type nvram string

const (
	global     = "-8be4df61-93ca-11d2-aa0d-00e098032b8c" // EFI_GLOBAL_VARIABLE
	attributes = 7                                       // non-volatile, boot service and runtime access
)

// setEntry makes option a boot entry and puts it into the boot order. An entry
// with the same label is ours from an earlier installation, and is replaced.
func (n nvram) setEntry(option []byte) (uint16, error) {
	names, err := filepath.Glob(filepath.Join(string(n), "Boot[0-9A-F][0-9A-F][0-9A-F][0-9A-F]"+global))
	if err != nil {
		return 0, err
	}
	if _, err := os.Stat(string(n)); err != nil {
		return 0, err
	}
	taken := map[uint16]bool{}
	var former []uint16
	for _, name := range names {
		digits := filepath.Base(name)[len("Boot"):][:4]
		number, err := strconv.ParseUint(digits, 16, 16)
		if err != nil {
			continue
		}
		taken[uint16(number)] = true
		old, err := n.read("Boot" + digits)
		if err != nil {
			return 0, err
		}
		if label(old) == label(option) {
			former = append(former, uint16(number))
		}
	}
	order, err := n.numbers("BootOrder")
	if err != nil {
		return 0, err
	}
	current, err := n.numbers("BootCurrent")
	if err != nil {
		return 0, err
	}

	for _, number := range former {
		if err := n.remove(entryName(number)); err != nil {
			return 0, err
		}
		delete(taken, number)
		order = slices.DeleteFunc(order, func(o uint16) bool { return o == number })
	}
	var entry uint16
	for taken[entry] || slices.Contains(order, entry) {
		entry++
	}
	if err := n.write(entryName(entry), option); err != nil {
		return 0, err
	}
	first := uint16(0)
	if len(current) > 0 {
		first = current[0]
	}
	var b []byte
	for _, o := range bootOrder(order, first, len(current) > 0, entry) {
		b = binary.LittleEndian.AppendUint16(b, o)
	}
	return entry, n.write("BootOrder", b)
}

func entryName(number uint16) string { return fmt.Sprintf("Boot%04X", number) }

func (n nvram) path(name string) string { return filepath.Join(string(n), name+global) }

// read is the value of a variable, nil when there is none.
func (n nvram) read(name string) ([]byte, error) {
	b, err := os.ReadFile(n.path(name))
	if errors.Is(err, os.ErrNotExist) || err == nil && len(b) < 4 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return b[4:], nil
}

func (n nvram) numbers(name string) ([]uint16, error) {
	b, err := n.read(name)
	var list []uint16
	for ; len(b) >= 2; b = b[2:] {
		list = append(list, binary.LittleEndian.Uint16(b))
	}
	return list, err
}

// write sets a variable in one write call, as efivarfs wants it.
func (n nvram) write(name string, value []byte) error {
	if err := n.mutable(name); err != nil {
		return err
	}
	f, err := os.OpenFile(n.path(name), os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(binary.LittleEndian.AppendUint32(nil, attributes), value...))
	return errors.Join(err, f.Close())
}

func (n nvram) remove(name string) error {
	if err := n.mutable(name); err != nil {
		return err
	}
	return os.Remove(n.path(name))
}

// mutable takes away the immutable flag, by which efivarfs guards machines
// against rm -rf (kernel: Documentation/filesystems/efivarfs.rst).
func (n nvram) mutable(name string) error {
	f, err := os.Open(n.path(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	const immutable = 0x10 // FS_IMMUTABLE_FL, linux/fs.h
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&immutable == 0 {
		return nil // a filesystem without flags has no such guard
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags&^immutable)); err != nil {
		return fmt.Errorf("%s: immutable flag: %w", name, err)
	}
	return nil
}
