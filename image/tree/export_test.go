package tree

import (
	"io"

	"rookery/image"
)

// Drop says whether x leaves out a file.
func Drop(x Excludes, path string) bool { return x.drop(path, false) }

// New is a tree of these entries.
func New(entries []image.Entry, open func(image.Entry) (io.ReadCloser, error)) *Tree {
	return &Tree{Entries: entries, open: open, close: func() error { return nil }}
}
