package swarm

import (
	"io"
	"log/slog"
	"net"
	"testing"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
	"rookery/transport/transporttest"
)

// wire is a connection of which the other side has said everything already.
type wire struct {
	net.Conn
	said []byte
}

func (w *wire) Read(b []byte) (int, error) {
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
	f.Add(messages(pp.Message{Type: pp.Request, Length: blockSize}, pp.MakeCancelMessage(0, 0, blockSize)), true)
	f.Add(messages(pp.Message{Type: pp.HaveAll}, pp.Message{Type: pp.Unchoke}, pp.Message{Type: pp.Piece, Piece: content[:blockSize]}), true)
	f.Add(messages(pp.Message{Type: pp.Extended, ExtendedPayload: []byte("d1:mde1:pi6881ee")}), true)
	f.Add(messages(pp.Message{Type: pp.Reject, Length: blockSize}), true)
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
		c := newConn(torrent, &wire{Conn: here, said: said}, theirs, remote(here))
		if !torrent.attach(c) {
			t.Fatal("not admitted")
		}
		t.Log(c.read())
		if len(c.requests) > maxRequests || c.hasN > len(torrent.copies) || c.useful > c.hasN || c.useful < 0 || c.inflight < 0 || c.inflight > maxDepth {
			t.Fatalf("counts: %d requests, has %d, useful %d, in flight %d", len(c.requests), c.hasN, c.useful, c.inflight)
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

func FuzzReply(f *testing.F) {
	f.Add([]byte("d8:intervali5e5:peers6:\x7f\x00\x00\x01\x1a\xe1e"))
	f.Add([]byte("d14:failure reason2:noe"))
	f.Add([]byte("d5:peersld2:ip9:127.0.0.14:porti1eeee"))
	f.Add([]byte("d8:intervali-5e6:peers618:aaaaaaaaaaaaaaaabbe"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseReply(b)
		if err != nil {
			return
		}
		if len(r.peers) > maxTold || r.incomplete < 0 {
			t.Fatalf("%d peers, %d incomplete", len(r.peers), r.incomplete)
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
