package tree

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"rookery/image"
)

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// An acl is a POSIX ACL as text (acl(5)), which is how tarballs have them.
type acl struct {
	xattr string // what it becomes
	text  string
}

// Tags of entries, and the id of those that need none (linux/posix_acl_xattr.h).
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
	aclNoID     = 0xffffffff
)

// binary gives the ACL as the kernel has it, "" when it says no more than a mode.
func (a acl) binary(users *users) (string, error) {
	type entry struct {
		tag, perm uint16
		id        uint32
	}
	var list []entry
	seen := make(map[[2]uint32]bool)
	tags := uint16(0)
	for _, line := range strings.FieldsFunc(a.text, func(r rune) bool { return r == '\n' || r == ',' }) {
		line, _, _ = strings.Cut(line, "#") // "#effective:r--"
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		var e entry
		var err error
		if e.tag, e.perm, e.id, err = aclEntry(line, users); err != nil {
			return "", fmt.Errorf("ACL entry %q: %w", line, err)
		}
		key := [2]uint32{uint32(e.tag), e.id}
		if seen[key] {
			return "", fmt.Errorf("ACL entry %q: comes twice", line)
		}
		seen[key] = true
		tags |= e.tag
		list = append(list, e)
	}
	if len(list) == 0 {
		return "", nil
	}
	const base = aclUserObj | aclGroupObj | aclOther
	if tags&base != base || tags&(aclUser|aclGroup) != 0 && tags&aclMask == 0 {
		return "", fmt.Errorf("ACL %q has no entry for each of owner, group, others and, where users or groups are named, the mask", a.text)
	}
	if tags == base && a.xattr == aclAccess {
		return "", nil // the kernel keeps none either
	}
	slices.SortFunc(list, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.tag, b.tag), cmp.Compare(a.id, b.id))
	})
	out := []byte{2, 0, 0, 0}
	for _, e := range list {
		out = binary.LittleEndian.AppendUint16(out, e.tag)
		out = binary.LittleEndian.AppendUint16(out, e.perm)
		out = binary.LittleEndian.AppendUint32(out, e.id)
	}
	return string(out), nil
}

// aclEntry reads "user:lisa:r-x", or with star's fourth field "user:lisa:r-x:502".
func aclEntry(line string, users *users) (tag, perm uint16, id uint32, err error) {
	fields := strings.Split(line, ":")
	if fields[0] == "default" || fields[0] == "d" {
		fields = fields[1:]
	}
	if len(fields) == 2 && (fields[0] == "mask" || fields[0] == "m" || fields[0] == "other" || fields[0] == "o") {
		fields = []string{fields[0], "", fields[1]} // the short form of acl(5)
	}
	if len(fields) < 3 || len(fields) > 4 {
		return 0, 0, 0, fmt.Errorf("has %d fields, want 3", len(fields))
	}
	name := fields[1]
	if len(fields) == 4 && fields[3] != "" {
		name = fields[3]
	}
	id = aclNoID
	switch fields[0] {
	case "user", "u":
		tag = aclUserObj
		if name != "" {
			tag = aclUser
			id, err = users.id("etc/passwd", name)
		}
	case "group", "g":
		tag = aclGroupObj
		if name != "" {
			tag = aclGroup
			id, err = users.id("etc/group", name)
		}
	case "mask", "m":
		tag = aclMask
	case "other", "o":
		tag = aclOther
	default:
		err = fmt.Errorf("unknown tag %q", fields[0])
	}
	if err != nil {
		return 0, 0, 0, err
	}
	if name != "" && (tag == aclMask || tag == aclOther) {
		return 0, 0, 0, fmt.Errorf("%s with the name %q", fields[0], name)
	}
	for _, c := range fields[2] {
		bit := strings.IndexRune("xwr", c)
		if c == '-' {
			continue
		}
		if bit < 0 || perm&(1<<bit) != 0 {
			return 0, 0, 0, fmt.Errorf("permissions %q", fields[2])
		}
		perm |= 1 << bit
	}
	return tag, perm, id, nil
}

// users are the names of users and groups that a tree itself knows.
type users struct {
	source source
	open   func(*inode) io.Reader
	known  map[string]map[string]uint32 // by file, once it is read
}

// id is the number of a name in etc/passwd or etc/group.
func (u *users) id(file, name string) (uint32, error) {
	if id, err := strconv.ParseUint(name, 10, 32); err == nil {
		if id == aclNoID {
			return 0, fmt.Errorf("id %d is none", id)
		}
		return uint32(id), nil
	}
	if u.known[file] == nil {
		ids, err := u.read(file)
		if err != nil {
			return 0, fmt.Errorf("%s of the tree: %w", file, err)
		}
		u.known[file] = ids
	}
	id, ok := u.known[file][name]
	if !ok {
		return 0, fmt.Errorf("%s of the tree has no %q", file, name)
	}
	return id, nil
}

// maxUsers bounds the files of users: a site of 100,000 has 10 MB of them.
const maxUsers = 64 << 20

func (u *users) read(file string) (map[string]uint32, error) {
	n := u.source[file]
	switch {
	case n == nil:
		return nil, errors.New("is not there")
	case n.Type != image.Regular:
		return nil, fmt.Errorf("is a %s", n.Type)
	case n.Size > maxUsers:
		return nil, fmt.Errorf("has %d bytes, at most %d are read", n.Size, maxUsers)
	}
	b, err := io.ReadAll(u.open(n))
	if err != nil {
		return nil, err
	}
	ids := make(map[string]uint32)
	for line := range bytes.Lines(b) {
		fields := strings.Split(strings.TrimSuffix(string(line), "\n"), ":") // name:x:id:...
		if len(fields) < 3 {
			continue
		}
		if id, err := strconv.ParseUint(fields[2], 10, 32); err == nil {
			if _, ok := ids[fields[0]]; !ok { // the first counts, as for getpwnam
				ids[fields[0]] = uint32(id)
			}
		}
	}
	return ids, nil
}
