// Package lldp hears from the switches that this machine's cards are connected to
// which switch and which port that is, by the Link Layer Discovery Protocol (IEEE
// 802.1AB). It says nothing itself.
package lldp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"rookery/wire"
)

// heard is the neighbor of one card.
type heard struct {
	Frame
	until time.Time
}

// after is what is known of a neighbor when a frame has come. Switches that do not
// know the group pass on what others say: then the one that was heard first stays,
// as long as it speaks.
func (h heard) after(f Frame, now time.Time) heard {
	switch {
	case f.Station, f.ID != h.ID && now.Before(h.until):
		return h
	case f.TTL == 0:
		h.until = time.Time{}
		return h
	}
	return heard{f, now.Add(f.TTL)}
}

// A Listener hears the neighbors of all Ethernet cards of its network namespace.
// What a card heard it has until it hears another: a switch that is silent, or
// starts anew, is still where the cable goes.
type Listener struct {
	News <-chan struct{} // has an element when a neighbor is another than it was

	news   chan<- struct{}
	socket *os.File
	log    *slog.Logger

	complaint string // the last one, to make it once

	mu    sync.Mutex
	heard map[string]heard // by the card's MAC address
}

// Listen opens a listener, which needs CAP_NET_RAW. Run closes it.
func Listen(log *slog.Logger) (*Listener, error) {
	protocol := binary.NativeEndian.Uint16([]byte{etherType >> 8, etherType & 0xff})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(protocol))
	if err != nil {
		return nil, fmt.Errorf("lldp: socket: %w", err)
	}
	news := make(chan struct{}, 1)
	return &Listener{News: news, news: news, socket: os.NewFile(uintptr(fd), "lldp"), log: log, heard: map[string]heard{}}, nil
}

// Neighbor is what the card with a MAC address heard last, or nil.
func (l *Listener) Neighbor(mac string) *wire.Neighbor {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.heard[mac]; h.ID != "" {
		return &h.Neighbor
	}
	return nil
}

// look is how often Run looks for cards that have come.
const look = time.Second

// Run hears until ctx ends.
func (l *Listener) Run(ctx context.Context) error {
	defer l.socket.Close()
	defer context.AfterFunc(ctx, func() { l.socket.Close() })()
	raw, err := l.socket.SyscallConn()
	if err != nil {
		return fmt.Errorf("lldp: %w", err)
	}
	cards := map[int]net.Interface{}
	for frame := make([]byte, 2048); ; {
		var n, card int
		if cards, err = join(raw, cards); err == nil {
			err = l.socket.SetReadDeadline(time.Now().Add(look))
		}
		if err == nil {
			n, card, err = receive(raw, frame)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
		case err != nil:
			return fmt.Errorf("lldp: %w", err)
		case cards[card].Index != 0: // else it has just come
			l.hear(cards[card], frame[:n])
		}
	}
}

// hear notes what a card heard.
func (l *Listener) hear(card net.Interface, frame []byte) {
	f, err := Parse(frame)
	if err != nil {
		if err.Error() != l.complaint {
			l.complaint = err.Error()
			l.log.Info("lldp: frame ignored", "nic", card.Name, "err", err)
		}
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	mac := card.HardwareAddr.String()
	was := l.heard[mac]
	is := was.after(f, time.Now())
	l.heard[mac] = is
	if is.Neighbor == was.Neighbor {
		return
	}
	l.log.Info("lldp: neighbor", "nic", card.Name, "switch", is.Neighbor.Switch, "port", is.Neighbor.Port)
	select {
	case l.news <- struct{}{}:
	default:
	}
}

// join has the cards that are new let the group in, up or not: a switch may say its
// first word when it sees the link.
func join(raw syscall.RawConn, known map[int]net.Interface) (map[int]net.Interface, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	cards := map[int]net.Interface{}
	for _, card := range all {
		if len(card.HardwareAddr) != len(group) || card.Flags&net.FlagLoopback != 0 {
			continue
		}
		_, joined := known[card.Index]
		if !joined {
			member := &unix.PacketMreq{Ifindex: int32(card.Index), Type: unix.PACKET_MR_MULTICAST, Alen: uint16(len(group))}
			copy(member.Address[:], group[:])
			err := raw.Control(func(fd uintptr) {
				joined = unix.SetsockoptPacketMreq(int(fd), unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, member) == nil
			})
			if err != nil {
				return nil, err
			}
		}
		if joined { // else it has just gone
			cards[card.Index] = card
		}
	}
	return cards, nil
}

// receive waits for a frame, and says by which card it came.
func receive(raw syscall.RawConn, frame []byte) (n, card int, err error) {
	var from unix.Sockaddr
	wait := raw.Read(func(fd uintptr) bool {
		n, from, err = unix.Recvfrom(int(fd), frame, 0)
		return err != unix.EAGAIN
	})
	if wait != nil {
		return 0, 0, wait
	}
	if link, ok := from.(*unix.SockaddrLinklayer); ok {
		card = link.Ifindex
	}
	return n, card, err
}
