package initramfs

import (
	"io"
	"os"
	"slices"
	"testing"
)

// What `make build kernel` leaves behind.
const (
	realAgent   = "../out/bin/rookery-agent"
	realKernel  = "../out/cache/kernel/vmlinuz"
	realModules = "../out/cache/kernel/modules"
)

// A machine's boot is the one thing that no other machine helps to serve, so it
// stays small: DESIGN 11. Measured on 22 Nov 2026 with Debian's 6.1.0-56-cloud:
// kernel 14,186,432 + initramfs 6,870,118 with 9,715,874 bytes of agent, 20.1 MiB;
// on 26 Nov, with 10,170,530 of agent, 7,193,072, and with rsync 9,867,790: 22.9 MiB;
// on 27 Nov, with 12,046,498 of agent, of which 339,968 speak ssh, 7,618,859, and with
// rsync 10,283,311: 23.3 MiB.
func TestSize(t *testing.T) {
	const limit = 24 << 20
	vmlinuz, err := os.Stat(realKernel)
	if err != nil {
		t.Skipf("%v: `make kernel` fetches it", err)
	}
	if _, err := os.Stat(realAgent); err != nil {
		t.Skipf("%v: `make build` makes it", err)
	}
	for _, more := range [][]string{nil, {"rsync"}} {
		sum, err := Build(io.Discard, Config{Agent: realAgent, Modules: realModules, Profile: VM, Site: testSite(t), Tools: slices.Concat(DefaultTools, more)})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%v: %+v", more, sum)
		if total := vmlinuz.Size() + sum.Size; total > limit {
			t.Errorf("%v: kernel %d + initramfs %d = %d bytes, want at most %d", more, vmlinuz.Size(), sum.Size, total, limit)
		}
	}
}
