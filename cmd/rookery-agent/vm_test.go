package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"rookery/initramfs"
	"rookery/wire"
)

// The agent as the first process of a machine with an empty disk: everything up
// to the loader, which does not run in the tiny image; then the script's ending
// for that.
func TestVMFirstProcess(t *testing.T) {
	if os.Getenv("ROOKERY_VM") == "" {
		t.Skip("starts a virtual machine: `make vm`, or ROOKERY_VM=1, runs it")
	}
	kernels, _ := filepath.Glob("../../out/cache/kernel/boot/vmlinuz-*")
	modules, _ := filepath.Glob("../../out/cache/kernel/lib/modules/*")
	if len(kernels) == 0 || len(modules) == 0 {
		t.Skip("no kernel in out/cache/kernel: `make kernel` fetches it")
	}
	s := newSite(t)
	s.set(func() {
		s.wait = 1
		s.sealed = s.seal(t, func(w *wire.Script) { w.Transports, w.OnFailure = []string{"http"}, wire.Reboot })
	})
	dir := t.TempDir()
	agent, initrd, disk := filepath.Join(dir, "agent"), filepath.Join(dir, "initramfs"), filepath.Join(dir, "vda")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", agent, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	f, err := os.Create(initrd)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	public := s.key.Public().(ed25519.PublicKey)
	api, ca := s.tls(t)
	if _, err := initramfs.Build(f, initramfs.Config{Agent: agent, Modules: modules[0], Profile: initramfs.VM, Site: wire.Site{Key: public, CA: ca}}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 1<<30); err != nil {
		t.Fatal(err)
	}
	guest := strings.NewReplacer("127.0.0.1", "10.0.2.2") // QEMU's name for this host
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	vm := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-reboot", "-display", "none",
		"-serial", "stdio", "-cpu", "max", "-smp", "2", "-m", "512", "-kernel", kernels[0], "-initrd", initrd,
		"-append", fmt.Sprintf("console=tty0 console=ttyS0,115200 panic=-1 rookery.api=%s rookery.http=%s", guest.Replace(api), guest.Replace(s.URL)),
		"-drive", "if=virtio,format=raw,file="+disk, "-nic", "user,model=virtio-net-pci,mac=52:54:00:aa:00:01")
	console, err := vm.CombinedOutput()
	t.Logf("%s", console)
	if err != nil {
		t.Fatalf("qemu: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var ended []string
	for _, e := range s.events {
		if e.State == wire.Finished || e.State == wire.Failed {
			ended = append(ended, string(e.Phase)+" "+string(e.State))
		}
	}
	want := []string{"boot finished", "network finished", "hello finished", "script finished", "plan finished",
		"partition finished", "fetch finished", "fixup finished", "loader failed"}
	if !slices.Equal(ended, want) {
		t.Errorf("the server has %v, want %v", ended, want)
	}
	if inv := s.hellos[0].Inventory; len(inv.Disks) != 1 || inv.Disks[0].Size != 1<<30 || inv.NICs[0].Driver != "virtio_net" || inv.NICs[0].Address == "" {
		t.Errorf("inventory: %+v", inv)
	}
	for _, line := range []string{"rookery node accept 52:54:00:aa:00:01", "loader: FAILED", "starting again in 10 s", "end: reboot"} {
		if !strings.Contains(string(console), line) {
			t.Errorf("the console does not show %q", line)
		}
	}
}

// tls serves the site once more, with a certificate of its own CA.
func (s *site) tls(t *testing.T) (url, ca string) {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{wire.ServerName}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, key)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(s.Config.Handler)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	server.StartTLS()
	t.Cleanup(server.Close)
	return server.URL, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
