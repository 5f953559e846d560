package swarm

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"rookery/transport"
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
