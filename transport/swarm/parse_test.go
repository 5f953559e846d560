package swarm

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
	"rookery/transport/swarm/rules"
	"rookery/transport/transporttest"
)

// tape is a connection of which the other side has said everything already.
type tape struct {
	net.Conn
	said []byte
}

func (w *tape) Read(b []byte) (int, error) {
	n := copy(b, w.said)
	w.said = w.said[n:]
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// FuzzConn lets a stranger say anything after the greetings.
func FuzzConn(f *testing.F) {
	content, info := transporttest.Layer(f, 1, 5*64<<10)
	messages := func(ms ...pp.Message) (b []byte) {
		for _, m := range ms {
			b = append(b, m.MustMarshalBinary()...)
		}
		return b
	}
	f.Add(messages(pp.Message{Type: pp.HaveAll}, pp.Message{Type: pp.Unchoke}, pp.Message{Type: pp.Choke}), true)
	f.Add(messages(pp.Message{Type: pp.Bitfield, Bitfield: make([]bool, 8)}, pp.Message{Type: pp.Have, Index: 4}), false)
	f.Add(messages(pp.Message{Type: pp.Request, Length: stockBlock}, pp.MakeCancelMessage(0, 0, stockBlock)), true)
	f.Add(messages(pp.Message{Type: pp.HaveAll}, pp.Message{Type: pp.Unchoke}, pp.Message{Type: pp.Piece, Piece: content[:stockBlock]}), true)
	f.Add(messages(pp.Message{Type: pp.Extended, ExtendedPayload: []byte("d1:mde1:pi6881ee")}), true)
	f.Add(messages(pp.Message{Type: pp.Extended, ExtendedPayload: []byte("d12:rookery_rack2:r1e")}), true)
	f.Add(messages(pp.Message{Type: pp.Reject, Length: stockBlock}), true)
	f.Fuzz(func(t *testing.T, said []byte, fast bool) {
		here, there := net.Pipe()
		defer there.Close()
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		p := NewPeer(ln, slog.New(slog.DiscardHandler))
		pieces := transport.NewPieces(info, transporttest.NewMemory(nil))
		if err := pieces.Put(0, content[:info.PieceLength], transport.FromServer); err != nil {
			t.Fatal(err)
		}
		torrent := p.Add(pieces, Options{})
		theirs := greeting{bits: extensions, infohash: info.InfoHash, id: newID(false)}
		if !fast {
			theirs.bits = pp.PeerExtensionBits{}
		}
		c := newConn(torrent, &tape{Conn: here, said: said}, theirs, remote(here))
		if !torrent.attach(c) {
			t.Fatal("not admitted")
		}
		t.Log(c.read(t.Context()))
		_, most := rules.Asking(0, torrent.info.PieceLength, false)
		if len(c.requests) > maxRequests || c.hasN > len(torrent.copies) || c.Useful > c.hasN || c.Useful < 0 || c.queued < 0 || len(c.open) > most {
			t.Fatalf("counts: %d requests, %d bytes, has %d, useful %d, %d pieces asked for", len(c.requests), c.queued, c.hasN, c.Useful, len(c.open))
		}
		torrent.detach(c)
		for n, copies := range torrent.copies {
			if copies != 0 {
				t.Fatalf("%d copies of piece %d after the only peer left", copies, n)
			}
		}
		if torrent.open != 0 {
			t.Fatalf("%d pieces still open", torrent.open)
		}
	})
}

// Who says things without end, a byte a second, is heard for a bounded time.
func TestEndlessTalkers(t *testing.T) {
	_, info := transporttest.Layer(t, 1, 64<<10)
	greet := greeting{extensions, info.InfoHash, newID(false)}
	for name, tt := range map[string]struct {
		said  string
		limit time.Duration
		hear  func(ctx context.Context, t *Torrent, nc net.Conn) error
	}{
		"greeting": {string(greet.encode()), shake, func(ctx context.Context, t *Torrent, nc net.Conn) error {
			_, err := t.peer.greet(ctx, nc)
			return err
		}},
		"message": {"\x00\x00\x30\x00\x14\x00" + strings.Repeat("d", 0x3000-2), silence, func(ctx context.Context, t *Torrent, nc net.Conn) error {
			return newConn(t, nc, greet, netip.AddrPort{}).read(ctx)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				here, there := net.Pipe()
				ln, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
				torrent := NewPeer(ln, slog.New(slog.DiscardHandler)).Add(transport.NewPieces(info, transporttest.NewMemory(nil)), Options{})
				var talking sync.WaitGroup
				talking.Go(func() {
					for _, b := range []byte(tt.said) {
						if _, err := there.Write([]byte{b}); err != nil {
							return
						}
						time.Sleep(time.Second)
					}
				})
				start := time.Now()
				err = tt.hear(t.Context(), torrent, here)
				took := time.Since(start)
				here.Close()
				talking.Wait()
				if !errors.Is(err, os.ErrDeadlineExceeded) || took > tt.limit {
					t.Errorf("heard for %s: %v, want at most %s", took, err, tt.limit)
				}
			})
		})
	}
}

func TestWhomToConnectTo(t *testing.T) {
	_, info := transporttest.Layer(t, 1, 64<<10)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	torrent := NewPeer(ln, slog.New(slog.DiscardHandler)).Add(transport.NewPieces(info, transporttest.NewMemory(nil)), Options{})
	at := func(n int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 6881)
	}
	torrent.learn([]netip.AddrPort{at(1), at(2)})
	torrent.learn([]netip.AddrPort{at(3), at(2), at(3), at(4)})
	torrent.peer.ban(at(4).Addr())
	var got []netip.AddrPort
	for _, c := range torrent.candidates(time.Now()) {
		got = append(got, c.addr)
	}
	if want := []netip.AddrPort{at(3), at(2), at(1)}; !slices.Equal(got, want) {
		t.Fatalf("connects to %v, want %v", got, want)
	}
	if again := torrent.candidates(time.Now()); len(again) != 0 {
		t.Fatalf("and %d of them once more", len(again))
	}
	for n := range 250 {
		torrent.learn([]netip.AddrPort{netip.AddrPortFrom(at(9).Addr(), uint16(n+1)), at(n)})
	}
	if n := len(torrent.known); n != 256 {
		t.Fatalf("%d peers are remembered, want 256", n)
	}
	if n := len(torrent.candidates(time.Now())); n > rules.Wanted {
		t.Fatalf("%d connections at once, want %d", n, rules.Wanted)
	}
}

func FuzzReply(f *testing.F) {
	f.Add([]byte("d8:intervali5e5:peers6:\x7f\x00\x00\x01\x1a\xe1e"))
	f.Add([]byte("d14:failure reason2:noe"))
	f.Add([]byte("d4:rack2:r7e"))
	f.Add([]byte("d5:peersld2:ip9:127.0.0.14:porti1eeee"))
	f.Add([]byte("d8:intervali-5e6:peers618:aaaaaaaaaaaaaaaabbe"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseReply(b)
		if err != nil {
			return
		}
		if len(r.peers) > maxTold || r.incomplete < 0 || len(r.rack) > rules.MaxRack {
			t.Fatalf("%d peers, %d incomplete, rack %q", len(r.peers), r.incomplete, r.rack)
		}
		for _, p := range r.peers {
			if !p.IsValid() || p.Port() == 0 {
				t.Fatalf("told of %s", p)
			}
		}
	})
}

func FuzzGreeting(f *testing.F) {
	f.Add(greeting{extensions, [20]byte{1}, newID(true)}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) != handshakeSize {
			return
		}
		g, err := decodeGreeting([handshakeSize]byte(b))
		if err == nil && string(g.encode()) != string(b) {
			t.Fatalf("%x was read as %x", b, g.encode())
		}
	})
}
