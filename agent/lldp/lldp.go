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
	fresh bool      // it is another than was told
	told  time.Time // last
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
	h.fresh = h.fresh || f.Neighbor != h.Neighbor
	h.Frame, h.until = f, now.Add(f.TTL)
	return h
}

// pause is how long a card that had news has none. Each makes the machine say hello,
// and frames whose names alternate, by mistake or ill will, come at any rate.
const pause = 10 * time.Second

// due says whether there is something to tell by now.
func (h heard) due(now time.Time) bool { return h.fresh && now.Sub(h.told) >= pause }

// A Listener hears the neighbors of all Ethernet cards of its network namespace.
// What a card heard it has until it hears another: a switch that is silent, or
// starts anew, is still where the cable goes.
type Listener struct {
	News <-chan struct{} // has an element when a neighbor is another than it was; of each card once in 10 s at the most

	news chan<- struct{}
	ear  ear
	log  *slog.Logger

	mu    sync.Mutex
	heard map[string]heard // by the card's MAC address
}

// An ear is where frames come from.
type ear interface {
	// join returns the cards, by index, of which those known have joined already.
	join(known map[int]net.Interface) (map[int]net.Interface, error)
	// receive waits for a frame until then, os.ErrDeadlineExceeded, and says by which card it came.
	receive(frame []byte, until time.Time) (n, card int, err error)
	Close() error
}

// Listen opens a listener, which needs CAP_NET_RAW. Run closes it.
func Listen(log *slog.Logger) (*Listener, error) {
	protocol := binary.NativeEndian.Uint16([]byte{etherType >> 8, etherType & 0xff})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(protocol))
	if err != nil {
		return nil, fmt.Errorf("lldp: socket: %w", err)
	}
	file := os.NewFile(uintptr(fd), "lldp")
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lldp: %w", err), file.Close())
	}
	return newListener(socket{file, raw}, log), nil
}

func newListener(ear ear, log *slog.Logger) *Listener {
	news := make(chan struct{}, 1)
	return &Listener{News: news, news: news, ear: ear, log: log, heard: map[string]heard{}}
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
	defer l.ear.Close()
	defer context.AfterFunc(ctx, func() { l.ear.Close() })()
	cards := map[int]net.Interface{}
	for frame := make([]byte, 2048); ; {
		var err error
		if cards, err = l.ear.join(cards); err == nil {
			err = l.listen(frame, cards, time.Now().Add(look))
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("lldp: %w", err)
		}
		for _, card := range cards {
			l.tell(card)
		}
	}
}

// listen hears what cards hear until then, os.ErrDeadlineExceeded.
func (l *Listener) listen(frame []byte, cards map[int]net.Interface, until time.Time) error {
	for {
		n, i, err := l.ear.receive(frame, until)
		if err != nil {
			return err
		}
		if card, ok := cards[i]; ok { // else it has just come
			l.hear(card, frame[:n])
			l.tell(card)
		}
	}
}

// hear notes what a card heard.
func (l *Listener) hear(card net.Interface, frame []byte) {
	f, err := Parse(frame)
	if err != nil {
		l.log.Debug("lldp: frame ignored", "nic", card.Name, "err", err)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	mac := card.HardwareAddr.String()
	l.heard[mac] = l.heard[mac].after(f, time.Now())
}

// tell makes known what a card has heard, when it is due.
func (l *Listener) tell(card net.Interface) {
	l.mu.Lock()
	defer l.mu.Unlock()
	mac, now := card.HardwareAddr.String(), time.Now()
	h := l.heard[mac]
	if !h.due(now) {
		return
	}
	h.fresh, h.told = false, now
	l.heard[mac] = h
	l.log.Info("lldp: neighbor", "nic", card.Name, "switch", h.Neighbor.Switch, "port", h.Neighbor.Port)
	select {
	case l.news <- struct{}{}:
	default:
	}
}

// A socket hears all cards of its network namespace.
type socket struct {
	*os.File
	raw syscall.RawConn
}

// join has the cards that are new let the group in, up or not: a switch may say its
// first word when it sees the link.
func (s socket) join(known map[int]net.Interface) (map[int]net.Interface, error) {
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
			err := s.raw.Control(func(fd uintptr) {
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

func (s socket) receive(frame []byte, until time.Time) (n, card int, err error) {
	if err := s.SetReadDeadline(until); err != nil {
		return 0, 0, err
	}
	var from unix.Sockaddr
	wait := s.raw.Read(func(fd uintptr) bool {
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
