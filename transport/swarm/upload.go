package swarm

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"syscall"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"
	"golang.org/x/sys/unix"
)

// What is sent to whom. A node takes on only what it can send soon: what waits
// here could come from a node that has nothing to do. It says no to the rest,
// and is asked again.
const (
	maxRequest  = 128 << 10             // bytes of one request
	maxRequests = 1024                  // waiting requests of one peer
	reqq        = 250                   // what we say of that: stock clients keep it
	minQueue    = 4                     // pieces that a node takes on, or
	queueAhead  = 50 * time.Millisecond // what leaves in that time, when that is more
	stuckAfter  = time.Second           // who takes nothing for so long keeps nobody else out

	// Blocks that leave at a time, of all torrents: each has its turn until it has
	// left, so that pieces are complete one after the other, and fifty
	// connections do not overflow the queues on the way.
	maxTurns  = 3
	turnAhead = 50 * time.Millisecond // what leaves in that time needs no turn
	unsent    = 32 << 10              // bytes of a connection that the kernel keeps unsent
)

// ask queues what the peer wants.
func (c *conn) ask(r pp.RequestSpec) error {
	t := c.t
	if int64(r.Index) >= int64(len(t.info.Hashes)) || r.Length == 0 || r.Length > maxRequest ||
		int64(r.Begin)+int64(r.Length) > int64(t.info.PieceSize(int(r.Index))) {
		return fmt.Errorf("%d bytes at %d of piece %d", r.Length, r.Begin, r.Index)
	}
	if !t.pieces.Has(int(r.Index)) {
		if !c.fast {
			return fmt.Errorf("piece %d is not here", r.Index)
		}
		c.send(reject(r))
		return nil
	}
	if c.ours && c.fast && !t.seeder {
		if r.Begin == 0 { // the rest of a piece is treated as its first block is
			c.denied = -1
			if t.busy(time.Now()) {
				c.denied = int(r.Index)
			}
		}
		if c.denied == int(r.Index) {
			c.send(reject(r))
			return nil
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.requests) >= maxRequests {
		return fmt.Errorf("more than %d at a time", maxRequests)
	}
	c.requests = append(c.requests, r)
	c.queued += int64(r.Length)
	c.wake()
	return nil
}

// busy says whether there is enough to send.
func (t *Torrent) busy(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	var queued int64
	for c := range t.conns {
		c.mu.Lock()
		if c.writing.IsZero() || now.Sub(c.writing) < stuckAfter {
			queued += c.queued
		}
		c.mu.Unlock()
	}
	return queued >= int64(t.ahead(minQueue, queueAhead, t.up))*t.info.PieceLength
}

// cancel forgets what the peer no longer wants.
func (c *conn) cancel(r pp.RequestSpec) {
	c.mu.Lock()
	i := slices.Index(c.requests, r)
	if i >= 0 {
		c.requests = slices.Delete(c.requests, i, i+1)
		c.queued -= int64(r.Length)
	}
	c.mu.Unlock()
	if i >= 0 && c.fast {
		c.send(reject(r)) // BEP 6: every request gets an answer
	}
}

func reject(r pp.RequestSpec) pp.Message {
	return pp.Message{Type: pp.Reject, Index: r.Index, Begin: r.Begin, Length: r.Length}
}

// write sends what is queued: first the messages, then one block at a time.
func (c *conn) write(ctx context.Context) error {
	var buf []byte
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil
		}
		buf, c.out = append(buf[:0], c.out...), c.out[:0]
		var r pp.RequestSpec
		if len(c.requests) > 0 {
			r, c.requests = c.requests[0], c.requests[1:]
		}
		c.mu.Unlock()

		if len(buf) == 0 && r.Length == 0 {
			timer := time.NewTimer(keepAlive)
			select {
			case <-c.woken:
				timer.Stop()
				continue
			case <-timer.C:
				buf = append(buf, 0, 0, 0, 0)
			}
		}
		if err := c.t.peer.upload.Wait(ctx, int(r.Length)); err != nil {
			return err
		}
		var err error
		if buf, err = c.put(ctx, buf, r); err != nil {
			return err
		}
		c.t.pieces.Sent(int(r.Length))
	}
}

// mark notes when a write began, or that it is over and what has left.
func (c *conn) mark(began time.Time, sent int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writing = began
	c.queued -= sent
}

// put writes messages and a block, if there is one, and returns its buffer.
func (c *conn) put(ctx context.Context, buf []byte, r pp.RequestSpec) ([]byte, error) {
	if r.Length == 0 {
		c.nc.SetWriteDeadline(time.Now().Add(writeFor))
		_, err := c.nc.Write(buf)
		return buf, err
	}
	select {
	case c.t.peer.turns <- struct{}{}:
	case <-ctx.Done():
		return buf, ctx.Err()
	}
	defer func() { <-c.t.peer.turns }()
	c.mark(time.Now(), 0)
	defer c.mark(time.Time{}, int64(r.Length))
	c.nc.SetWriteDeadline(time.Now().Add(writeFor))
	buf, err := c.putBlock(buf, r)
	if err == nil {
		c.leave()
	}
	return buf, err
}

func (c *conn) putBlock(buf []byte, r pp.RequestSpec) ([]byte, error) {
	buf = binary.BigEndian.AppendUint32(buf, uint32(9+r.Length))
	buf = append(buf, byte(pp.Piece))
	buf = binary.BigEndian.AppendUint32(buf, uint32(r.Index))
	buf = binary.BigEndian.AppendUint32(buf, uint32(r.Begin))
	off := int64(r.Index)*c.t.info.PieceLength + int64(r.Begin)
	if c.raw != nil {
		if from, err := c.t.pieces.File(off, int64(r.Length)); err == nil {
			return buf, sendFile(c.raw, buf, from, off, int(r.Length))
		}
	}
	head := len(buf)
	buf = slices.Grow(buf, int(r.Length))[:head+int(r.Length)]
	if _, err := c.t.pieces.ReadAt(buf[head:], off); err != nil {
		return buf, err
	}
	_, err := c.nc.Write(buf)
	return buf, err
}

// leave returns when most of what was written has arrived, or when the peer is
// too slow to be waited for.
func (c *conn) leave() {
	if c.raw == nil {
		return
	}
	for end := time.Now().Add(stuckAfter); ; {
		c.t.mu.Lock()
		rate := c.t.up
		c.t.mu.Unlock()
		ahead := max(stockBlock, rate*int64(turnAhead)/int64(time.Second))
		unacked := 0
		_ = c.raw.Control(func(fd uintptr) { unacked, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }) // 0: do not wait
		if int64(unacked) <= ahead || time.Now().After(end) {
			return
		}
		// The kernel does not tell; it is asked when that much should have left.
		wait := 5 * time.Millisecond
		if rate > 0 {
			wait = time.Duration((int64(unacked) - ahead) * int64(time.Second) / rate)
		}
		time.Sleep(min(max(wait, time.Millisecond), 50*time.Millisecond))
	}
}

// sendFile writes head and then n bytes of a file from off, which the kernel
// takes from its page cache.
func sendFile(to syscall.RawConn, head []byte, from syscall.RawConn, off int64, n int) error {
	var failed error
	wait := func(do func(fd int) (int, error), done func(int) (more bool)) error {
		err := to.Write(func(fd uintptr) bool {
			for {
				n, err := do(int(fd))
				switch {
				case err == unix.EINTR:
				case err == unix.EAGAIN:
					return false
				case err != nil || !done(n):
					failed = err
					return true
				}
			}
		})
		if err == nil {
			err = failed
		}
		return err
	}
	err := wait(func(fd int) (int, error) {
		return unix.SendmsgN(fd, head, nil, nil, unix.MSG_MORE|unix.MSG_NOSIGNAL)
	}, func(n int) bool {
		head = head[n:]
		return len(head) > 0
	})
	if err != nil {
		return err
	}
	ended := from.Control(func(src uintptr) {
		err = wait(func(fd int) (int, error) {
			sent, err := unix.Sendfile(fd, int(src), &off, n)
			if sent == 0 && err == nil {
				err = fmt.Errorf("file ends %d bytes early", n)
			}
			return sent, err
		}, func(sent int) bool {
			n -= sent
			return n > 0
		})
	})
	if ended != nil {
		return ended
	}
	return err
}

// tune keeps the queue of a connection here, where it can be seen.
func (c *conn) tune() {
	tcp, ok := c.nc.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	c.raw = raw
	_ = raw.Control(func(fd uintptr) { // without it, we are slower
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsent)
	})
}
