package main

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// opens counts the files, not the directories, on the filesystem of dir that this
// process opens while f runs. The kernel counts.
func opens(dir string, f func() error) (n int, err error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY)
	if err != nil {
		return 0, fmt.Errorf("fanotify: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_OPEN, unix.AT_FDCWD, dir); err != nil {
		return 0, fmt.Errorf("fanotify: %s: %w", dir, err)
	}
	if err := f(); err != nil {
		return 0, err
	}
	b := make([]byte, 64<<10)
	for {
		size, err := unix.Read(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN {
			return n, nil
		}
		if err != nil {
			return n, fmt.Errorf("fanotify: %w", err)
		}
		// struct fanotify_event_metadata: length u32, version, metadata length
		// u16, mask u64, descriptor i32, process i32
		for event := b[:size]; len(event) > 0; event = event[binary.NativeEndian.Uint32(event):] {
			unix.Close(int(int32(binary.NativeEndian.Uint32(event[16:]))))
			if int(binary.NativeEndian.Uint32(event[20:])) == os.Getpid() {
				n++
			}
		}
	}
}
