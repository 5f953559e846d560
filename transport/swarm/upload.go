package swarm

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"slices"
	"syscall"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"
	"golang.org/x/sys/unix"

	"rookery/transport/swarm/rules"
)

// What is sent to whom is decided in package rules. A node feeds few others, says
// no to the rest, and unchokes who was turned away when there is a place.
const (
	maxRequest  = 128 << 10        // bytes of one request
	maxRequests = 1024             // waiting requests of one peer
	reqq        = 250              // what we say of that: stock clients keep it
	takeFor     = 45 * time.Second // who takes nothing for so long is gone
	unsent      = 32 << 10         // bytes of a connection that the kernel keeps unsent
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
		// The rest of a piece is treated as its first block is; holes are filled for
		// whoever asks.
		if r.Begin == 0 && int(r.Length) == min(ownBlock, t.info.PieceSize(int(r.Index))) {
			c.denied = -1
			if !t.takesOn(c, time.Now()) {
				c.denied = int(r.Index)
			}
		}
		if c.denied == int(r.Index) {
			c.send(reject(r))
			if int(r.Begin+r.Length) == t.info.PieceSize(c.denied) {
				c.denied = -1
				t.turnedAway(c)
			}
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

// takesOn says whether a peer gets the piece that it asks for.
func (t *Torrent) takesOn(c *conn, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return rules.TakesOn(c, maps.Keys(t.conns), now)
}

// Takes is for rules.TakesOn.
func (c *conn) Takes() *rules.Place { return &c.Place }

// Fed says whether a peer has a place. Strangers need none: they do not take a no.
func (c *conn) Fed(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ours && rules.Fed(c.queued, c.writing, c.left, now)
}

// turnedAway notes who is to hear when there is room. It has been told no of a
// whole piece: a no that came after the invitation would be one to what it asks then.
func (t *Torrent) turnedAway(c *conn) {
	t.mu.Lock()
	if t.conns[c] && !slices.Contains(t.denied, c) {
		t.denied = append(t.denied, c)
	}
	t.mu.Unlock()
	t.invite(time.Now()) // there may be, by now
}

// invite lets those who were turned away ask again when there is a place: only
// they know whether they still want it.
func (t *Torrent) invite(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.denied) == 0 || rules.Places(maps.Keys(t.conns), now) <= 0 {
		return
	}
	for _, c := range t.denied {
		c.send(pp.Message{Type: pp.Unchoke})
	}
	t.denied = nil
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

// write sends what is queued until the connection ends: messages at once, a
// block when it is its turn.
func (c *conn) write(ctx context.Context) error {
	turns := c.t.peer.turns
	var turn *time.Timer // of the block that is leaving; nil: none is
	end := func() {
		if turn != nil && turn.Stop() {
			<-turns
		}
		turn = nil
	}
	defer end()
	// It may have been the last block that the peer wants.
	invite := time.AfterFunc(time.Hour, func() { c.t.invite(time.Now()) })
	defer invite.Stop()
	idle := time.NewTimer(keepAlive)
	defer idle.Stop()
	var buf []byte
	for {
		c.mu.Lock()
		closed, blocks := c.closed, len(c.requests) > 0
		buf, c.out = append(buf[:0], c.out...), c.out[:0]
		c.mu.Unlock()
		if closed {
			return nil
		}
		if len(buf) > 0 {
			idle.Reset(keepAlive)
			c.nc.SetWriteDeadline(time.Now().Add(writeFor))
			if _, err := c.nc.Write(buf); err != nil {
				return err
			}
		}
		switch {
		case turn != nil:
			wait := c.leaving()
			if wait == 0 {
				c.mark(time.Time{})
				end()
				invite.Reset(rules.FedFor)
				continue
			}
			poll := time.NewTimer(wait)
			select {
			case <-poll.C:
			case <-c.woken:
			}
			poll.Stop()
		case blocks:
			select {
			case turns <- struct{}{}:
				// Who is too slow loses its turn.
				turn = time.AfterFunc(rules.StuckAfter, func() { <-turns })
				if err := c.putBlock(ctx, &buf); err != nil {
					return err
				}
				idle.Reset(keepAlive)
			case <-c.woken:
			}
		default:
			select {
			case <-c.woken:
			case <-idle.C:
				c.enqueue(make([]byte, 4))
			}
		}
	}
}

// mark notes when a block began to leave; zero: it has.
func (c *conn) mark(began time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writing = began
	if began.IsZero() {
		c.queued -= c.taken
		c.taken, c.left = 0, time.Now()
	}
}

// putBlock writes the block that was asked for first. It stays in queued until
// it has left.
func (c *conn) putBlock(ctx context.Context, buf *[]byte) error {
	c.mu.Lock()
	if len(c.requests) == 0 {
		c.mu.Unlock()
		return nil // cancelled
	}
	var r pp.RequestSpec
	r, c.requests = c.requests[0], c.requests[1:]
	c.taken = int64(r.Length)
	c.mu.Unlock()
	if err := c.t.peer.upload.Wait(ctx, int(r.Length)); err != nil {
		return err
	}
	c.mark(time.Now())
	c.nc.SetWriteDeadline(time.Now().Add(writeFor))
	b := binary.BigEndian.AppendUint32((*buf)[:0], uint32(9+r.Length))
	b = append(b, byte(pp.Piece))
	b = binary.BigEndian.AppendUint32(b, uint32(r.Index))
	b = binary.BigEndian.AppendUint32(b, uint32(r.Begin))
	off := int64(r.Index)*c.t.info.PieceLength + int64(r.Begin)
	err := func() error {
		if c.raw != nil {
			if from, err := c.t.pieces.File(off, int64(r.Length)); err == nil {
				return sendFile(c.raw, b, from, off, int(r.Length))
			}
		}
		head := len(b)
		b = slices.Grow(b, int(r.Length))[:head+int(r.Length)]
		if _, err := c.t.pieces.ReadAt(b[head:], off); err != nil {
			return err
		}
		_, err := c.nc.Write(b)
		return err
	}()
	*buf = b
	if err == nil {
		c.t.pieces.Sent(int(r.Length))
	}
	return err
}

// leaving is how long what was written may need to arrive, but for a rest that
// does not count; 0 when it has arrived. The kernel does not tell, it is asked.
func (c *conn) leaving() time.Duration {
	c.t.mu.Lock()
	rate := c.t.up
	c.t.mu.Unlock()
	rest := rules.Rest(c.unacked(), rate)
	if rest <= 0 {
		return 0
	}
	wait := 5 * time.Millisecond
	if rate > 0 {
		wait = time.Duration(float64(rest) / float64(rate) * float64(time.Second))
	}
	return min(max(wait, time.Millisecond), 250*time.Millisecond)
}

// unacked is how many bytes were written and have not arrived; 0 when unknown.
func (c *conn) unacked() (n int) {
	switch nc := c.nc.(type) {
	case *net.TCPConn:
		if c.raw != nil {
			_ = c.raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		}
	case interface{ unacked() int }: // in virtual time
		n = nc.unacked()
	}
	return n
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
		// Keep-alives are for connections on which nothing is on its way.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(takeFor/time.Millisecond))
	})
}
