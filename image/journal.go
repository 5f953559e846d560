package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Unfinished is where a command that extracts into a directory of its user's
// keeps the journal: in that directory, for all to see as long as the tree is
// not whole.
const Unfinished = ".rookery-unfinished"

// A journal says which frames are in their files. It is a head - magic, what is
// extracted, CRC - and records of 16 bytes: kind and layer, a number, CRC. What
// follows the first wrong CRC is what a crash left of the last records, and is
// cut off.
//
// Records outlive the data they speak of when the machine dies. So they count
// in the boot that wrote them, and in others only when a synced record covers them.
type journal struct {
	file *os.File
	root int // of the filesystem to sync

	mu      sync.Mutex
	records int64
	synced  time.Time
	syncing bool
}

const (
	journalMagic = "RKJL\x01"
	journalHead  = len(journalMagic) + sha256.Size + 4
	recordSize   = 16
)

// Kinds of records and what their number is.
const (
	recordFrame   = 'F' // the frame, which is written
	recordDropped = 'D' // the frame, which has to be written again
	recordSynced  = 'S' // how many records before this one are of what the disk has
	recordBoot    = 'B' // the boot that writes what follows
)

// syncEvery bounds what the loss of power costs. The kernel leaves nothing
// unwritten for much longer anyway.
var syncEvery = 30 * time.Second // a variable for tests

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sealed(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// unseal is the opposite; ok is false when b was never sealed, or torn since.
func unseal(b []byte) (inner []byte, ok bool) {
	inner = b[:len(b)-4]
	return inner, crc32.Checksum(inner, castagnoli) == binary.LittleEndian.Uint32(b[len(inner):])
}

func head(id [sha256.Size]byte) []byte { return sealed(append([]byte(journalMagic), id[:]...)) }

func record(kind byte, layer int, number uint64) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(kind)<<24|uint32(layer))
	return sealed(binary.LittleEndian.AppendUint64(b, number))
}

// A frameID is a frame of one of a view's layers.
type frameID struct{ layer, frame int }

// parseJournal says which frames count in this boot, and how long the journal
// is without what was torn. frames are how many each layer has.
func parseJournal(b []byte, id [sha256.Size]byte, boot uint64, frames []int) (done map[frameID]int64, length int64, err error) {
	want := head(id)
	if n := min(len(b), len(journalMagic)); string(b[:n]) != journalMagic[:n] {
		return nil, 0, errors.New("is no journal of an extraction")
	}
	if len(b) < len(want) {
		return nil, 0, nil // died young
	}
	if _, ok := unseal(b[:len(want)]); !ok {
		return nil, 0, errors.New("has a damaged head")
	}
	if !bytes.Equal(b[:len(want)], want) {
		return nil, 0, errors.New("is of another image, or of other options: the directory holds a part of that")
	}
	done = make(map[frameID]int64) // to the place of the record
	var covered, at int64
	var writer uint64
	changed := func(next uint64) {
		if next != writer {
			for p, n := range done {
				if n >= covered {
					delete(done, p)
				}
			}
		}
		writer = next
	}
	for b = b[len(want):]; len(b) >= recordSize; b = b[recordSize:] {
		inner, ok := unseal(b[:recordSize])
		if !ok {
			break
		}
		word, number := binary.LittleEndian.Uint32(inner), binary.LittleEndian.Uint64(inner[4:])
		layer := int(word & 0xffffff)
		switch kind := word >> 24; kind {
		case recordFrame, recordDropped:
			if layer >= len(frames) || number >= uint64(frames[layer]) {
				return nil, 0, fmt.Errorf("says that layer %d has a frame %d", layer, number)
			}
			if p := (frameID{layer, int(number)}); kind == recordFrame {
				done[p] = at
			} else {
				delete(done, p)
			}
		case recordSynced:
			covered = max(covered, int64(min(number, uint64(at))))
		case recordBoot:
			changed(number)
		default:
			return nil, 0, fmt.Errorf("has a record of kind %d", kind)
		}
		at++
	}
	changed(boot)
	return done, int64(len(want)) + at*recordSize, nil
}

var bootFile = "/proc/sys/kernel/random/boot_id" // tests have others

// thisBoot names the kernel that runs: its page cache has what it was given.
func thisBoot() (uint64, error) {
	id, err := os.ReadFile(bootFile)
	if err != nil {
		return 0, err
	}
	sum := sha256.Sum256(id)
	return binary.LittleEndian.Uint64(sum[:]), nil
}

// openJournal opens or begins the journal of an extraction of v into the
// directory root. done are the frames that count already.
func openJournal(path string, root int, v *View, opts Options) (j *journal, done map[frameID]int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("journal %s: %w", path, err)
		}
	}()
	if _, ok := v.entry(filepath.Base(path)); ok { // it may lie in the root
		return nil, nil, errors.New("the tree has an entry of that name")
	}
	boot, err := thisBoot()
	if err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, nil, errors.Unwrap(err) // the path is said already
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		return nil, nil, errors.New("another process is extracting")
	} else if err != nil {
		return nil, nil, fmt.Errorf("lock: %w", err)
	}
	frames, needed := make([]int, len(v.Layers)), 0
	for n, x := range v.Layers {
		frames[n] = len(x.Frames)
		needed += len(x.Frames)
	}
	// A frame is written and dropped a few times at the most.
	limit := int64(journalHead + 1<<20 + 16*recordSize*needed)
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, nil, err
	}
	if int64(len(b)) > limit {
		return nil, nil, fmt.Errorf("has more than %d bytes", limit)
	}
	id := v.identity(opts)
	done, length, err := parseJournal(b, id, boot, frames)
	if err != nil {
		return nil, nil, err
	}
	j = &journal{file: f, root: root, synced: time.Now()}
	if err := f.Truncate(length); err != nil {
		return nil, nil, err
	}
	if length == 0 {
		if _, err := f.WriteAt(head(id), 0); err != nil {
			return nil, nil, err
		}
		length = int64(journalHead)
	}
	j.records = (length - int64(journalHead)) / recordSize
	return j, done, j.append(record(recordBoot, 0, boot))
}

// identity is what a journal is about.
func (v *View) identity(opts Options) [sha256.Size]byte {
	h := sha256.New()
	fmt.Fprintf(h, "%v\n", opts.Unprivileged)
	for _, x := range v.Layers {
		body := sha256.Sum256(x.body())
		h.Write(body[:])
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// append is for the holder of mu, or the only one there is.
func (j *journal) append(b []byte) error {
	if _, err := j.file.WriteAt(b, int64(journalHead)+j.records*recordSize); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	j.records += int64(len(b) / recordSize)
	return nil
}

// wrote notes a frame whose data are in their files, and now and then has the
// disk catch up.
func (j *journal) wrote(layer, frame int) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.append(record(recordFrame, layer, uint64(frame))); err != nil {
		return err
	}
	if j.syncing || time.Since(j.synced) < syncEvery {
		return nil
	}
	return j.sync()
}

// sync is for the holder of mu, and lets go of it meanwhile.
func (j *journal) sync() error {
	j.syncing = true
	covered := j.records
	j.mu.Unlock()
	err := unix.Syncfs(j.root)
	j.mu.Lock()
	j.syncing, j.synced = false, time.Now()
	if err != nil {
		return fmt.Errorf("journal: syncfs: %w", err)
	}
	return j.append(record(recordSynced, 0, uint64(covered)))
}

// dropped notes frames of which something is gone. It must not be lost when
// files are made anew: the old records would count for them.
func (j *journal) dropped(frames []frameID) error {
	var b []byte
	for _, p := range frames {
		b = append(b, record(recordDropped, p.layer, uint64(p.frame))...)
	}
	if err := j.append(b); err != nil {
		return err
	}
	return unix.Fdatasync(int(j.file.Fd()))
}

// close leaves the journal to whoever continues.
func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return errors.Join(j.sync(), j.file.Close())
}

// remove ends it.
func (j *journal) remove() error {
	if err := os.Remove(j.file.Name()); err != nil {
		return err
	}
	return j.file.Close()
}
