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
)

// sendsOnly marks a second life of the test binary that only sends.
const sendsOnly = "ROOKERY_MULTICAST_SENDS"

const benchSize = 256 << 20

// BenchmarkReceive is what a receiver costs, without the sender, which is a process
// of its own. It makes an interface, so run it as
// unshare -rn go test -run '^$' -bench Receive ./transport/multicast
func BenchmarkReceive(b *testing.B) {
	m := families["IPv4"]
	content, info := transporttest.Layer(b, 1, benchSize)
	group, err := GroupOf(m.Group, info.InfoHash, m.Rate)
	if err != nil {
		b.Fatal(err)
	}
	if os.Getenv(sendsOnly) != "" {
		s := &Sender{Info: info, Layer: bytes.NewReader(content), Demand: &Demand{}, Rate: 300 << 20, Always: true, Parity: 0.01, Log: slog.New(slog.DiscardHandler),
			Out: Outlet{From: netip.MustParseAddr(m.Server), Via: card, TTL: 1}, To: netip.AddrPortFrom(group, m.Port)}
		ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
		defer cancel()
		if err := s.Run(ctx); err != nil {
			b.Fatal(err)
		}
		return
	}
	for _, mtu := range []int{1500, 9000} {
		b.Run(fmt.Sprint("MTU ", mtu), func(b *testing.B) {
			loop(b)
			for _, dev := range []string{card, "end"} {
				if out, err := exec.Command("ip", "link", "set", dev, "mtu", fmt.Sprint(mtu)).CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
			}
			sender := exec.Command("/proc/self/exe", "-test.run=^$", "-test.bench=Receive", "-test.benchtime=1x")
			sender.Env = append(os.Environ(), sendsOnly+"=1")
			if err := sender.Start(); err != nil {
				b.Fatal(err)
			}
			defer func() { sender.Process.Kill(); sender.Wait() }()
			var before, after unix.Rusage
			unix.Getrusage(unix.RUSAGE_SELF, &before)
			began, passes := time.Now(), 0
			for b.Loop() {
				p := transport.NewPieces(info, transporttest.NewMemory(nil))
				if err := (&Source{Config: m, Via: card, Alone: true}).Fetch(b.Context(), p); err != nil {
					b.Fatal(err)
				}
				passes++
			}
			unix.Getrusage(unix.RUSAGE_SELF, &after)
			gib := float64(passes) * benchSize / (1 << 30)
			b.ReportMetric((seconds(after)-seconds(before))/gib, "cpu-s/GiB")
			b.ReportMetric(float64(passes)*benchSize/1e6/time.Since(began).Seconds(), "MB/s")
		})
	}
}

func seconds(u unix.Rusage) float64 {
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}
