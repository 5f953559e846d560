package initramfs

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// A kernel boots what Build writes, and everything in it works: modules load
// from our modules.dep, the tools find their libraries, filesystems mount.
func TestVMBoots(t *testing.T) {
	if os.Getenv("ROOKERY_VM") == "" {
		t.Skip("starts a virtual machine: `make vm`, or ROOKERY_VM=1, runs it")
	}
	if _, err := os.Stat(realKernel); err != nil {
		t.Skipf("%v: `make kernel` fetches it", err)
	}
	dir := t.TempDir()
	agent, initrd := filepath.Join(dir, "init"), filepath.Join(dir, "initramfs")
	build := exec.Command("go", "build", "-o", agent, "./testdata/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build ./testdata/init: %v\n%s", err, out)
	}
	f, err := os.Create(initrd)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum, err := Build(f, Config{Agent: agent, Modules: realModules, Profile: VM, Site: testSite(t), Tools: slices.Concat(DefaultTools, []string{"rsync"})})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", sum)
	for name, size := range map[string]int64{"vda": 64 << 20, "vdb": 48 << 20} {
		write(t, filepath.Join(dir, name), nil)
		if err := os.Truncate(filepath.Join(dir, name), size); err != nil {
			t.Fatal(err)
		}
	}

	// 6 s on two idle cores (22 Nov 2026); the rest is for busy ones.
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	vm := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg",
		"-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-cpu", "max", "-smp", "2", "-m", "512",
		"-kernel", realKernel, "-initrd", initrd, "-append", "console=ttyS0,115200 panic=-1",
		"-drive", "if=virtio,format=raw,file="+filepath.Join(dir, "vda"),
		"-drive", "if=virtio,format=raw,file="+filepath.Join(dir, "vdb"),
		"-nic", "user,model=virtio-net-pci,restrict=on")
	console, err := vm.CombinedOutput()
	if err != nil || !bytes.Contains(console, []byte("packed: all works")) {
		t.Fatalf("qemu: %v\n%s", err, console)
	}
}
