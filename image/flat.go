package image

import (
	"bytes"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
)

// WriteTar writes the tree as one plain PAX tarball. Layers are those that v was
// read of. Large holes become holes of the tarball, in GNU's sparse format 1.0.
func (v *View) WriteTar(w io.Writer, layers ...Layer) error {
	contents, err := NewContents(v, layers...)
	if err != nil {
		return err
	}
	defer contents.Close()
	for i := range v.Entries {
		e := &v.Entries[i]
		if err := v.writeTar(w, e, contents); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	_, err = w.Write(zeros[:2*tarBlock])
	return err
}

func (v *View) writeTar(w io.Writer, e *Entry, contents *Contents) error {
	target := *e
	if e.Type == Hardlink {
		target, _ = v.entry(e.Link)
	}
	if e.Size == 0 {
		header, err := tarHeader(e, &target, nil)
		if err != nil {
			return err
		}
		_, err = w.Write(header)
		return err
	}
	data, err := dataRuns(e, contents)
	if err != nil {
		return err
	}
	var header []byte
	size := e.Size
	if len(data) == 1 && data[0] == (run{0, e.Size}) {
		header, err = tarHeader(e, e, nil)
	} else {
		header, size, err = sparseHeader(e, data)
	}
	if err != nil {
		return err
	}
	if _, err := w.Write(header); err != nil {
		return err
	}
	r, err := contents.Open(*e)
	if err != nil {
		return err
	}
	at := int64(0)
	for _, d := range data {
		if _, err := io.CopyN(io.Discard, r, d.at-at); err != nil {
			return err
		}
		if _, err := io.CopyN(w, r, d.n); err != nil {
			return err
		}
		at = d.at + d.n
	}
	_, err = w.Write(zeros[:-size&(tarBlock-1)])
	return err
}

// A run is a part of a file that is no hole.
type run struct{ at, n int64 }

// leastHole is how many zeros are worth a hole: the tools that do not know
// sparse members are to read as many files as possible.
const leastHole = 16 * hole

// dataRuns finds the holes of a file. The last run is empty when the file ends
// in a hole, as GNU tar has it.
func dataRuns(e *Entry, contents *Contents) ([]run, error) {
	if e.Size < leastHole {
		return []run{{0, e.Size}}, nil
	}
	r, err := contents.Open(*e)
	if err != nil {
		return nil, err
	}
	var runs []run
	var block [hole]byte
	start, zero := int64(0), int64(0) // of the run, of the zeros that end it
	for at := int64(0); at < e.Size; {
		b := block[:min(hole, e.Size-at)]
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		if !bytes.Equal(b, zeros[:len(b)]) {
			if at-zero >= leastHole {
				if zero > start {
					runs = append(runs, run{start, zero - start})
				}
				start = at
			}
			zero = at + int64(len(b))
		}
		at += int64(len(b))
	}
	if e.Size-zero < leastHole {
		return append(runs, run{start, e.Size - start}), nil
	}
	if zero > start {
		runs = append(runs, run{start, zero - start})
	}
	return append(runs, run{e.Size, 0}), nil
}

// sparseHeader is the header of e and its map of data, and how long map and
// data are together (GNU tar manual, "PAX Format, Version 1.0").
func sparseHeader(e *Entry, data []run) (header []byte, size int64, err error) {
	list := strconv.AppendInt(nil, int64(len(data)), 10)
	list = append(list, '\n')
	for _, d := range data {
		list = fmt.Appendf(list, "%d\n%d\n", d.at, d.n)
		size += d.n
	}
	list = append(list, zeros[:-len(list)&(tarBlock-1)]...)
	size += int64(len(list))

	stored := *e
	stored.Size = size
	dir, name := split(e.Path)
	stored.Path = path.Join(dir, "GNUSparseFile.0", name)
	header, err = tarHeader(&stored, &stored, map[string]string{
		"AAA.sparse.major":    "1",
		"AAA.sparse.minor":    "0",
		"AAA.sparse.realsize": strconv.FormatInt(e.Size, 10),
		"AAB.sparse.name":     e.Path,
	})
	if err != nil {
		return nil, 0, err
	}
	// archive/tar reads GNU's keys and drops them when it writes. These are as
	// long, and of all records the first: what is replaced is never in a name.
	records := strings.Replace(string(header[tarBlock:]), "AAA.sparse.", "GNU.sparse.", 3)
	records = strings.Replace(records, "AAB.sparse.", "GNU.sparse.", 1)
	return slices.Concat(header[:tarBlock], []byte(records), list), size, nil
}
