package dhcpd

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"time"
)

// maxPool bounds the memory and the time that a flood of invented clients can
// take: a full pool is searched from end to end.
const maxPool = 1 << 16

// How long an address is kept for what was offered, and from what was declined.
const (
	offerTime   = 30 * time.Second
	declineTime = 10 * time.Minute
)

// A slot is one address of a pool. The zero slot was never used.
type slot struct {
	mac     string    // of who has it, was offered it, or had it last
	expires time.Time // of the lease, the offer or the decline
	offered bool      // not yet taken
}

// held says whether the slot is somebody's now, and not just offered.
func (s slot) held(now time.Time) bool { return !s.offered && now.Before(s.expires) }

// A pool is the state of the addresses of one subnet.
type pool struct {
	Subnet
	slots    []slot         // by distance from First
	byMAC    map[string]int // the one slot of each mac in slots
	reserved map[netip.Addr]bool
}

func newPool(s Subnet) (*pool, error) {
	p := &pool{Subnet: s, byMAC: map[string]int{}, reserved: map[netip.Addr]bool{}}
	if !s.Prefix.IsValid() || !s.Prefix.Addr().Is4() || s.Prefix != s.Prefix.Masked() {
		return nil, fmt.Errorf("subnet %s: want an IPv4 network", s.Prefix)
	}
	if p.Lease == 0 {
		p.Lease = time.Hour
	}
	if s.First == (netip.Addr{}) && s.Last == (netip.Addr{}) {
		return p, nil
	}
	if !s.Prefix.Contains(s.First) || !s.Prefix.Contains(s.Last) || s.Last.Less(s.First) {
		return nil, fmt.Errorf("subnet %s: pool %s to %s is not a range of it", s.Prefix, s.First, s.Last)
	}
	size := int64(number(s.Last)) - int64(number(s.First)) + 1
	if size > maxPool {
		return nil, fmt.Errorf("subnet %s: pool has %d addresses, at most %d are supported", s.Prefix, size, maxPool)
	}
	p.slots = make([]slot, size)
	p.reserve(s.Prefix.Addr(), s.broadcast(), s.Router)
	p.reserve(s.DNS...)
	return p, nil
}

// reserve keeps addresses from being given.
func (p *pool) reserve(addrs ...netip.Addr) {
	for _, a := range addrs {
		p.reserved[a] = true
	}
}

// index is the slot of addr, if it is one the pool may give.
func (p *pool) index(addr netip.Addr) (int, bool) {
	if !addr.Is4() || len(p.slots) == 0 || p.reserved[addr] {
		return 0, false
	}
	i := int64(number(addr)) - int64(number(p.First))
	return int(i), i >= 0 && i < int64(len(p.slots))
}

func (p *pool) addr(i int) netip.Addr {
	return address(number(p.First) + uint32(i))
}

// set makes slot i mac's, and frees any other slot that mac had.
func (p *pool) set(i int, mac string, expires time.Time, offered bool) {
	if old, ok := p.byMAC[mac]; ok {
		p.slots[old] = slot{}
	}
	delete(p.byMAC, p.slots[i].mac)
	p.slots[i] = slot{mac: mac, expires: expires, offered: offered}
	if mac != "" {
		p.byMAC[mac] = i
	}
}

// choose finds an address for mac: the one it has or had, the one it wants, one
// never used, one whose lease ended first, and at last the oldest that was
// offered and not taken. barred says which addresses belong to somebody else.
func (p *pool) choose(mac string, want netip.Addr, now time.Time, barred func(netip.Addr) bool) (int, bool) {
	if i, ok := p.byMAC[mac]; ok && !p.reserved[p.addr(i)] && !barred(p.addr(i)) {
		return i, true
	}
	if i, ok := p.index(want); ok && now.After(p.slots[i].expires) && !barred(want) {
		return i, true
	}
	if len(p.slots) == 0 {
		return 0, false
	}
	// From a place of its own each MAC finds the same address in an empty pool,
	// whatever the order of the requests.
	h := fnv.New32a()
	h.Write([]byte(mac))
	start := int(h.Sum32() % uint32(len(p.slots)))
	best, found := 0, false
	for n := range p.slots {
		i := (start + n) % len(p.slots)
		s := p.slots[i]
		if s.held(now) || p.reserved[p.addr(i)] {
			continue
		}
		if found && !s.expires.Before(p.slots[best].expires) {
			continue
		}
		if barred(p.addr(i)) {
			continue
		}
		best, found = i, true
		if s.expires.IsZero() {
			break
		}
	}
	return best, found
}

func (s Subnet) broadcast() netip.Addr {
	return address(number(s.Prefix.Addr()) | ^uint32(0)>>s.Prefix.Bits())
}

func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func address(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}
