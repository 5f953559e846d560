package multicast

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// GroupOf is the address that a layer is sent to at a rate, one of a range such as
// "239.192.0.0/16". Layers that share one are told apart by their datagrams.
func GroupOf(base string, infohash [20]byte, rate int64) (netip.Addr, error) {
	p, err := netip.ParsePrefix(base)
	if err != nil || !p.Addr().IsMulticast() {
		return netip.Addr{}, fmt.Errorf("%.80q is not a range of multicast addresses", base)
	}
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(infohash[:], uint64(rate)))
	a := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < len(a)*8; bit++ {
		a[bit/8] |= sum[bit/8] & (0x80 >> (bit % 8))
	}
	addr, _ := netip.AddrFromSlice(a)
	return addr, nil
}

// Via is the interface by which an address is reached.
func Via(to netip.Addr) (*net.Interface, error) {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 9)))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	own := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range all {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if p, ok := a.(*net.IPNet); ok && p.IP.Equal(own.WithZone("").AsSlice()) {
				return &i, nil
			}
		}
	}
	return nil, fmt.Errorf("no interface has %s", own)
}

const (
	rcvbuf   = 16 << 20 // bytes: a tenth of a second at 1 Gbit/s
	maxBatch = 64 << 10 // bytes that the kernel gives, or takes, as one datagram
	reads    = 8        // of these at a time

	// Who reads each datagram when it comes pays most for waking up. What comes
	// meanwhile fits into rcvbuf even at 10 Gbit/s.
	gather = 5 * time.Millisecond
)

// A receiver is a socket that is in a group.
type receiver struct {
	conn   *net.UDPConn
	server netip.Addr
	batch  []ipv4.Message // of both families: they are the same type
	list   [][]byte
	read4  *ipv4.PacketConn
	read6  *ipv6.PacketConn
	roomy  bool // the kernel keeps what comes in a while
	few    bool // were there last time, and no more
}

// listen joins a group and takes what server sends; an address that is not valid
// is anyone's.
func listen(group netip.AddrPort, server netip.Addr, via string) (*receiver, error) {
	var (
		card *net.Interface
		err  error
	)
	if via != "" {
		card, err = net.InterfaceByName(via)
	} else {
		card, err = Via(server)
	}
	if err != nil {
		return nil, err
	}
	zone := ""
	if a := group.Addr(); a.Is6() && (a.IsLinkLocalMulticast() || a.IsInterfaceLocalMulticast()) {
		zone = card.Name
	}
	size := 0
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		e := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, rcvbuf) != nil { // needs CAP_NET_ADMIN
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, rcvbuf)
			}
			size, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF)
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1) // Linux 5.0; without it, one by one
		})
		return errors.Join(err, e)
	}}
	network := "udp4"
	if group.Addr().Is6() {
		network = "udp6"
	}
	// A socket that is bound to the group gets nothing else.
	at := netip.AddrPortFrom(group.Addr().WithZone(zone), group.Port())
	c, err := lc.ListenPacket(context.Background(), network, at.String())
	if err != nil {
		return nil, err
	}
	r := &receiver{conn: c.(*net.UDPConn), server: server, roomy: size >= rcvbuf}
	for range reads {
		r.batch = append(r.batch, ipv4.Message{Buffers: [][]byte{make([]byte, maxBatch)}, OOB: make([]byte, 64)})
	}
	to := &net.UDPAddr{IP: group.Addr().AsSlice()}
	if group.Addr().Is4() {
		r.read4 = ipv4.NewPacketConn(c)
		err = r.read4.JoinGroup(card, to)
	} else {
		r.read6 = ipv6.NewPacketConn(c)
		err = r.read6.JoinGroup(card, to)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("join %s on %s: %w", group.Addr(), card.Name, err)
	}
	return r, nil
}

func (r *receiver) Close() error { return r.conn.Close() }

// read waits for datagrams and calls take with them. They are gone when it returns.
func (r *receiver) read(take func([][]byte)) error {
	if r.few && r.roomy {
		time.Sleep(gather)
	}
	for i := range r.batch {
		r.batch[i].OOB = r.batch[i].OOB[:cap(r.batch[i].OOB)]
	}
	var n int
	var err error
	if r.read4 != nil {
		n, err = r.read4.ReadBatch(r.batch, 0)
	} else {
		n, err = r.read6.ReadBatch(r.batch, 0)
	}
	if err != nil {
		return err
	}
	r.list, r.few = r.list[:0], n < reads
	for _, m := range r.batch[:n] {
		r.few = r.few && m.N < maxBatch/2
		from, ok := m.Addr.(*net.UDPAddr)
		if !ok || r.server.IsValid() && from.AddrPort().Addr().Unmap().WithZone("") != r.server {
			continue
		}
		b := m.Buffers[0][:m.N]
		size := segment(m.OOB[:m.NN])
		for size > 0 && len(b) > size {
			r.list = append(r.list, b[:size])
			b = b[size:]
		}
		r.list = append(r.list, b)
	}
	if len(r.list) > 0 {
		take(r.list)
	}
	return nil
}

// segment is the size of the datagrams that the kernel gave as one, or 0.
func segment(oob []byte) int {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0
	}
	for _, m := range messages {
		if m.Header.Level == unix.IPPROTO_UDP && m.Header.Type == unix.UDP_GRO && len(m.Data) >= 4 {
			return int(binary.NativeEndian.Uint32(m.Data))
		}
	}
	return 0
}

// An Out is a socket that sends to groups, from one address.
type Out struct {
	conn *net.UDPConn
	mtu  int
	gso  bool
}

// Outlet is how to send: from which address, on which interface, and how many
// routers far.
type Outlet struct {
	From netip.Addr
	Via  string
	TTL  int
}

// Open makes a socket for the outlet.
func (o Outlet) Open() (*Out, error) {
	card, err := net.InterfaceByName(o.Via)
	if err != nil {
		return nil, err
	}
	at := o.From
	if at.Is6() && at.IsLinkLocalUnicast() {
		at = at.WithZone(o.Via)
	}
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
	if err != nil {
		return nil, err
	}
	if o.From.Is4() {
		p := ipv4.NewPacketConn(c)
		err = errors.Join(p.SetMulticastInterface(card), p.SetMulticastTTL(o.TTL))
	} else {
		p := ipv6.NewPacketConn(c)
		err = errors.Join(p.SetMulticastInterface(card), p.SetMulticastHopLimit(o.TTL))
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	out := &Out{conn: c, mtu: card.MTU}
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT) // Linux 4.18
			out.gso = err == nil
		})
	}
	return out, nil
}

// Close closes the socket.
func (o *Out) Close() error { return o.conn.Close() }

// most is how many datagrams of a size can be sent at a time.
func (o *Out) most(size int) int {
	const maxSegments = 64 // UDP_MAX_SEGMENTS of older kernels
	return max(1, min(maxSegments, (maxBatch-1-ipv6Header-udpHeader)/size))
}

// write sends b to a group as datagrams of a size, one after another where the
// kernel or the card cannot cut them.
func (o *Out) write(b []byte, size int, to netip.AddrPort) error {
	if len(b) > size && o.gso {
		_, _, err := o.conn.WriteMsgUDPAddrPort(b, segmentMessage(size), to)
		if err == nil || !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EMSGSIZE) {
			return err
		}
		o.gso = false // a card without checksums
	}
	for len(b) > 0 {
		n := min(size, len(b))
		if _, err := o.conn.WriteToUDPAddrPort(b[:n], to); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func segmentMessage(size int) []byte {
	b := make([]byte, unix.CmsgSpace(2))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(b[unix.CmsgLen(0):], uint16(size))
	return b
}

// wireSize is what a datagram of a size takes on an Ethernet.
func wireSize(to netip.Addr, size int) int {
	if to.Is4() {
		return size + udpHeader + ipv4Header + ethernet
	}
	return size + udpHeader + ipv6Header + ethernet
}
