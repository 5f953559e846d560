package lab

import (
	"context"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"
)

// Accel is how virtual machines run here: "kvm" where it works, else "tcg". A
// /dev/kvm that can be opened proves nothing: nested and emulated ones start
// a machine and then hang or give up. So firmware has to come all the way to
// 64-bit code and its boot menu first, soon.
var Accel = sync.OnceValue(func() string {
	dev, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg"
	}
	dev.Close()
	if _, ok := boots(5*time.Second, "BdsDxe", "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "64",
		"-drive", "if=pflash,unit=0,readonly=on,format=raw,file="+ovmfCode,
		"-drive", "if=pflash,unit=1,snapshot=on,format=raw,file="+ovmfVars); !ok {
		return "tcg"
	}
	return "kvm"
})

// calm is what Slowness measures on two idle cores of 2.5 GHz, Nov 2026: 0.15 s.
const calm = 300 * time.Millisecond

// Slowness is by how much deadlines have to be longer here and now: 1 on an
// idle machine, up to 8. It is measured once.
var Slowness = sync.OnceValue(func() float64 {
	took, ok := boots(8*calm, "No bootable device", "-accel", "tcg", "-cpu", "max", "-machine", "pc,graphics=off", "-m", "64")
	if !ok {
		return 8
	}
	return max(1, float64(took)/float64(calm))
})

// Within is d, stretched by Slowness.
func Within(d time.Duration) time.Duration { return time.Duration(float64(d) * Slowness()) }

// boots says whether a machine without disks or network prints want in time.
func boots(limit time.Duration, want string, args ...string) (time.Duration, bool) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	// Ended by ctx, and when it has said enough.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append(args,
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "stdio")...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, false
	}
	if err := cmd.Start(); err != nil {
		return 0, false
	}
	console := NewConsole()
	read := make(chan struct{})
	go func() {
		defer close(read)
		io.Copy(console, out) // ends with the machine
		console.end(io.EOF)
	}()
	_, err = console.Expect(ctx, want)
	took := time.Since(start)
	cancel()
	<-read
	cmd.Wait() // killed by cancel
	return took, err == nil
}
