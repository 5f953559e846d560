package tree

import (
	"io"
	"strings"

	"rookery/image"
)

// Drop says whether x leaves out a file.
func Drop(x Excludes, path string) bool { return x.drop(path, false) }

// New is a tree of these entries.
func New(entries []image.Entry, open func(image.Entry) (io.ReadCloser, error)) *Tree {
	return &Tree{Entries: entries, open: open, close: func() error { return nil }}
}

// ACL is an ACL in text as the kernel has it, for a tree with this etc/passwd.
func ACL(text, passwd string) (string, error) {
	u := &users{
		source: source{"etc/passwd": {Entry: image.Entry{Type: image.Regular}}},
		open:   func(*inode) io.Reader { return strings.NewReader(passwd) },
		known:  make(map[string]map[string]uint32),
	}
	return acl{aclAccess, text}.binary(u)
}
