package swarm

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	pp "github.com/anacrolix/torrent/peer_protocol"

	"rookery/transport"
	"rookery/transport/swarm/rules"
	"rookery/transport/transporttest"
)

// BenchmarkLoopback is a server and some nodes that start together on this
// machine, and how many copies the server sent.
func BenchmarkLoopback(b *testing.B) {
	const size = 256 << 20
	content, info := transporttest.Layer(b, 1, size)
	for _, nodes := range []int{1, 3, 8} {
		b.Run(fmt.Sprint(nodes), func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				b.StopTimer()
				ctx, cancel := context.WithCancel(b.Context())
				var ran sync.WaitGroup
				peer := func(host int) *Peer {
					ln, err := net.Listen("tcp", fmt.Sprintf("127.88.0.%d:0", host))
					if err != nil {
						b.Fatal(err)
					}
					p := NewPeer(ln, slog.New(slog.DiscardHandler))
					ran.Go(func() { p.Run(ctx) })
					return p
				}
				seed := transporttest.Seed(info, content)
				server := peer(1)
				at := server.ln.Addr().(*net.TCPAddr).AddrPort()
				server.Add(seed, Options{Seeder: true})
				known := append(addrs("", 4), at)
				b.StartTimer()
				var all []*transport.Pieces
				for n := range nodes {
					f, err := os.Create(filepath.Join(b.TempDir(), "layer"))
					if err != nil {
						b.Fatal(err)
					}
					defer f.Close()
					pieces := transport.NewPieces(info, f)
					p := peer(2 + n)
					t := p.Add(pieces, Options{})
					t.learn(known)
					known = append(known, p.ln.Addr().(*net.TCPAddr).AddrPort())
					all = append(all, pieces)
				}
				for _, pieces := range all {
					<-pieces.Done()
				}
				b.StopTimer()
				cancel()
				ran.Wait()
				_, _, _, sent := seed.Transfer()
				b.ReportMetric(float64(sent)/size, "copies/op")
				b.StartTimer()
			}
		})
	}
}

// BenchmarkHave is what a message costs a server of a thousand peers: each says
// of each piece that it has it.
func BenchmarkHave(b *testing.B) {
	const pieces, peers = 4000, rules.MaxServed
	_, info := transporttest.Layer(b, 1, 64<<10)
	info.Length, info.Hashes = pieces*info.PieceLength, slices.Repeat(info.Hashes, pieces)
	for _, rate := range []int64{1 << 20, 125 << 20} {
		b.Run(fmt.Sprint(rate>>20), func(b *testing.B) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer ln.Close()
			t := NewPeer(ln, slog.New(slog.DiscardHandler)).Add(transporttest.Seed(info, nil), Options{Seeder: true})
			t.up = rate
			var all []*conn
			for n := range peers {
				nc, _ := net.Pipe()
				c := newConn(t, nc, greeting{id: [20]byte([]byte(fmt.Sprintf("%s%014d", nodePrefix, n)))}, lanAddr(n))
				t.attach(c)
				all = append(all, c)
			}
			for i := 0; b.Loop(); i++ {
				c := all[i%peers]
				if err := c.handle(&pp.Message{Type: pp.Have, Index: pp.Integer(i / peers % pieces)}); err != nil {
					b.Fatal(err)
				}
				c.out = c.out[:0] // nobody writes it
			}
		})
	}
}
