// Package tree captures trees, which is to list what a directory, a tarball or the
// layers of a foreign image hold as the entries of a layer, and compares them.
package tree

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"rookery/image"
)

// A Tree is a captured tree, for image.Write.
type Tree struct {
	Entries []image.Entry // sorted; hard links after what they name

	open  func(image.Entry) (io.ReadCloser, error)
	close func() error
}

// Open opens the content of one of the Entries.
func (t *Tree) Open(e image.Entry) (io.ReadCloser, error) { return t.open(e) }

// Close lets go of the source. Files still open become unreadable.
func (t *Tree) Close() error { return t.close() }

// An inode is a file, whatever its names.
type inode struct {
	image.Entry        // Path is any of the names until entries says which
	place       *place // in the tarball, for content
	acls        []acl  // in text, until all names of users are known
}

// A named is one name of an inode.
type named struct {
	path string
	*inode
}

var errRoot = errors.New("its root is no directory")

// entries lists what is named: sorted, with every parent, and of the names of
// an inode the first as the file and the others as hard links to it. drop, when
// it is there, says what stays out; what is below that stays out as well.
func entries(names []named, drop func(path string, dir bool) bool) ([]image.Entry, error) {
	slices.SortFunc(names, func(a, b named) int { return image.Compare(a.path, b.path) })
	if len(names) == 0 || names[0].path != "." {
		names = slices.Insert(names, 0, named{".", missing(".")})
	}
	if names[0].Type != image.Dir {
		return nil, errRoot
	}
	l := list{
		entries: make([]image.Entry, 0, len(names)), names: names, drop: drop,
		first: make(map[*inode]bool, len(names)), dirs: make(map[string]bool),
	}
	for _, n := range names {
		if err := l.add(n); err != nil {
			return nil, fmt.Errorf("%q: %w", n.path, err)
		}
	}
	return l.entries, nil
}

type list struct {
	entries []image.Entry
	names   []named // sorted
	drop    func(path string, dir bool) bool
	first   map[*inode]bool
	dirs    map[string]bool // whether it stays out
}

// add adds n after its parents. Since names come sorted, what a missing
// directory would come after is there, and what would come after it is not.
func (l *list) add(n named) error {
	out := false
	if n.path != "." {
		parent := dirOf(n.path)
		if _, ok := l.dirs[parent]; !ok {
			i, ok := slices.BinarySearchFunc(l.names, parent, func(n named, p string) int { return image.Compare(n.path, p) })
			if ok {
				return fmt.Errorf("lies below %q, a %s", parent, l.names[i].Type)
			}
			if err := l.add(named{parent, missing(parent)}); err != nil {
				return err
			}
		}
		out = l.dirs[parent] || l.drop != nil && l.drop(n.path, n.Type == image.Dir)
	}
	if n.Type == image.Dir {
		l.dirs[n.path] = out
	}
	switch {
	case out:
	case l.first[n.inode]:
		l.entries = append(l.entries, image.Entry{Path: n.path, Type: image.Hardlink, Link: n.Path})
	default:
		l.first[n.inode] = true
		n.Path = n.path
		l.entries = append(l.entries, n.Entry)
	}
	return nil
}

// dirOf is the directory of a clean path.
func dirOf(p string) string {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i]
	}
	return "."
}

// missing is a directory that a tarball uses and does not list.
func missing(name string) *inode {
	return &inode{Entry: image.Entry{Path: name, Type: image.Dir, Mode: 0o755, MTime: time.Unix(0, 0)}}
}

// keeps says whether an extended attribute is part of an image. Others are
// views of a filesystem's own (NFS ACLs, btrfs properties, overlay's marks).
func keeps(xattr string) bool {
	switch xattr {
	case aclAccess, aclDefault:
		return true
	}
	return strings.HasPrefix(xattr, "user.") || strings.HasPrefix(xattr, "security.") ||
		strings.HasPrefix(xattr, "trusted.") && !strings.HasPrefix(xattr, "trusted.overlay.")
}
