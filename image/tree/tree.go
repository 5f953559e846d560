// Package tree captures trees: it lists what a tarball or a directory holds as
// the entries of a layer.
package tree

import (
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"rookery/image"
)

// A Tree is a captured tree, for image.Write.
type Tree struct {
	Entries []image.Entry // sorted; hard links after what they name

	open  func(*inode) (io.ReadCloser, error)
	files map[string]*inode
	close func() error
}

// Open opens the content of one of the Entries.
func (t *Tree) Open(e image.Entry) (io.ReadCloser, error) {
	n := t.files[e.Path]
	if n == nil {
		return nil, errors.New("is no file of the tree")
	}
	return t.open(n)
}

// Close lets go of the source. Files still open become unreadable.
func (t *Tree) Close() error { return t.close() }

// An inode is a file, whatever its names.
type inode struct {
	image.Entry        // Path is any of the names
	place       *place // in the tarball, for content
}

// A source is a tree being captured: names and what they stand for. As in a
// filesystem, a hard link is a second name of an inode, and a name that comes
// again stands for something new.
type source map[string]*inode

// emptied are directories whose content belongs to a running system, never to
// an image.
var emptied = []string{"dev", "proc", "run", "sys", "tmp"}

// excluded says whether p lies in one of them.
func excluded(p string) bool {
	top, _, below := strings.Cut(p, "/")
	return below && slices.Contains(emptied, top)
}

// entries lists the source: sorted, with every parent, and of the names of an
// inode the first as the file and the others as hard links to it.
func (s source) entries() ([]image.Entry, error) {
	if s["."] == nil {
		s["."] = &inode{Entry: missing(".")}
	}
	var names []string
	for name := range s {
		if !excluded(name) {
			names = append(names, name)
		}
	}
	for _, name := range names {
		for p := path.Dir(name); s[p] == nil; p = path.Dir(p) {
			s[p] = &inode{Entry: missing(p)}
			names = append(names, p)
		}
	}
	slices.SortFunc(names, image.Compare)
	first := make(map[*inode]string)
	entries := make([]image.Entry, 0, len(names))
	for _, name := range names {
		n := s[name]
		if p := path.Dir(name); s[p].Type != image.Dir {
			return nil, fmt.Errorf("%q: lies below %q, a %s", name, p, s[p].Type)
		}
		if link, ok := first[n]; ok {
			entries = append(entries, image.Entry{Path: name, Type: image.Hardlink, Link: link})
			continue
		}
		first[n] = name
		e := n.Entry
		e.Path = name
		entries = append(entries, e)
	}
	return entries, nil
}

// missing is a directory that a tarball uses and does not list.
func missing(name string) image.Entry {
	return image.Entry{Path: name, Type: image.Dir, Mode: 0o755, MTime: time.Unix(0, 0)}
}

// keeps says whether an extended attribute is part of an image. Others are
// views of a filesystem's own (NFS ACLs, btrfs properties, overlay's marks).
func keeps(xattr string) bool {
	switch xattr {
	case "system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	return strings.HasPrefix(xattr, "user.") || strings.HasPrefix(xattr, "security.") ||
		strings.HasPrefix(xattr, "trusted.") && !strings.HasPrefix(xattr, "trusted.overlay.")
}
