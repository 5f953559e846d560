package image

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Room is what the tree takes in a filesystem with blocks of that size, about:
// sparse files take less, when their holes are smaller than frames.
func (v *View) Room(block int64) (bytes, inodes int64) {
	for i := range v.Entries {
		e := &v.Entries[i]
		if e.Type == Hardlink {
			continue
		}
		inodes++
		if e.Type == Dir {
			bytes += block
		}
		if e.Size == 0 {
			continue
		}
		bytes += (e.Size+block-1)/block*block - v.Layers[e.Layer].holes(e)
	}
	return bytes, inodes
}

// nothing is how many times smaller a frame is for there to be hardly anything
// but zeros in it: those shrink 30,000 times.
const nothing = 1000

// holes is how much of e's content lies in frames of zeros.
func (x *Index) holes(e *Entry) (n int64) {
	first, last := x.span(e)
	for _, f := range x.Frames[first : last+1] {
		if f.Size < f.PlainSize/nothing {
			n += min(f.Plain+f.PlainSize, e.Offset+e.Size) - max(f.Plain, e.Offset)
		}
	}
	return n
}

// CheckRoom says whether the filesystem of dir has too few bytes or inodes for
// what v is yet to bring.
func CheckRoom(dir string, v *View) error {
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(dir, &fs) }); err != nil {
		return fmt.Errorf("%s: statfs: %w", dir, err)
	}
	bytes, inodes := v.Room(fs.Bsize)
	if room := free(&fs); fs.Blocks > 0 && room < bytes {
		return fmt.Errorf("%s: no space: %d bytes are free, the tree takes %d", dir, room, bytes)
	}
	if fs.Files > 0 && int64(fs.Ffree) < inodes { // 0: as many as there is space for
		return fmt.Errorf("%s: no space: %d inodes are free, the tree takes %d", dir, fs.Ffree, inodes)
	}
	return nil
}

// CheckFree says whether the filesystem of dir has too few bytes for files of so many.
func CheckFree(dir string, bytes int64) error {
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(dir, &fs) }); err != nil {
		return fmt.Errorf("%s: statfs: %w", dir, err)
	}
	if room := free(&fs); fs.Blocks > 0 && room < bytes {
		return fmt.Errorf("%s: no space: %d bytes are free, want %d", dir, room, bytes)
	}
	return nil
}

func free(fs *unix.Statfs_t) int64 {
	if os.Geteuid() == 0 {
		return int64(fs.Bfree) * fs.Bsize // with what is set aside for root
	}
	return int64(fs.Bavail) * fs.Bsize
}

// empty says whether there is nothing in dir that what is extracted could
// replace, and so make room.
func empty(dir string) bool {
	d, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer d.Close()
	names, _ := d.Readdirnames(3)
	for _, name := range names {
		if name != Unfinished && name != "lost+found" {
			return false
		}
	}
	return true
}
