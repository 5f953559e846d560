package multicast

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"rookery/transport"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// sendsOnly marks a second life of the test binary that only sends.
const sendsOnly = "ROOKERY_MULTICAST_SENDS"

const benchSize = 256 << 20

// BenchmarkReceive is what a receiver costs that is sent 100 MiB/s into a file in
// memory, without the sender, which is a process of its own, and without what the kernel
// does before the datagrams are in the socket. It makes an interface, so run it as
// unshare -rn go test -run '^$' -bench Receive ./transport/multicast
func BenchmarkReceive(b *testing.B) {
	m := families["IPv4"]
	content, info := transporttest.Layer(b, 1, benchSize)
	group, err := GroupOf(m.Group, info.InfoHash, m.Rate)
	if err != nil {
		b.Fatal(err)
	}
	if os.Getenv(sendsOnly) != "" {
		s := &Sender{Info: info, Layer: bytes.NewReader(content), Demand: &Demand{}, Rate: 100 << 20, Always: true, Parity: 0.15, Log: slog.New(slog.DiscardHandler),
			Out: Outlet{From: netip.MustParseAddr(m.Server), Via: card, TTL: 1}, To: netip.AddrPortFrom(group, m.Port)}
		ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
		defer cancel()
		if err := s.Run(ctx); err != nil {
			b.Fatal(err)
		}
		return
	}
	for _, tt := range []struct {
		mtu, loss int // bytes, percent
	}{{1500, 0}, {1500, 5}, {9000, 0}, {9000, 5}} {
		b.Run(fmt.Sprintf("MTU %d, %d %% lost", tt.mtu, tt.loss), func(b *testing.B) {
			loop(b)
			for _, args := range [][]string{
				{"ip", "link", "set", card, "mtu", fmt.Sprint(tt.mtu)},
				{"ip", "link", "set", "end", "mtu", fmt.Sprint(tt.mtu)},
				{"iptables", "-F"},
				{"iptables", "-A", "INPUT", "-m", "statistic", "--mode", "random", "--probability", fmt.Sprint(float64(tt.loss) / 100), "-j", "DROP"},
			} {
				if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
					b.Fatalf("%v: %v: %s", args, err, out)
				}
			}
			var before, after unix.Rusage
			unix.Getrusage(unix.RUSAGE_SELF, &before)
			rounds := 0
			for b.Loop() {
				receiveOnce(b, m, info)
				rounds++
			}
			unix.Getrusage(unix.RUSAGE_SELF, &after)
			b.ReportMetric((seconds(after)-seconds(before))/(float64(rounds)*benchSize/(1<<30)), "cpu-s/GiB")
		})
	}
}

// receiveOnce has a sender begin, which takes longer to do so than a receiver.
func receiveOnce(b *testing.B, m wire.Multicast, info transport.Info) {
	file, err := os.CreateTemp("/dev/shm", "receive")
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	if err := os.Remove(file.Name()); err != nil {
		b.Fatal(err)
	}
	sender := exec.Command("/proc/self/exe", "-test.run=^$", "-test.bench=Receive", "-test.benchtime=1x")
	sender.Env = append(os.Environ(), sendsOnly+"=1")
	if err := sender.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { sender.Process.Kill(); sender.Wait() }()
	if err := (&Source{Config: m, Via: card, Alone: true}).Fetch(b.Context(), transport.NewPieces(info, file)); err != nil {
		b.Fatal(err)
	}
}

func seconds(u unix.Rusage) float64 {
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}
