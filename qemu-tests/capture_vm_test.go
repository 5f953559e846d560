package qemutests

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"rookery/disklayout"
	"rookery/image/imagetest"
	"rookery/lab"
)

// A machine with LVM and btrfs is captured while its files are being written:
// device mapper is of the kernel, so this takes one of its own.
func TestAGoldenClientIsCapturedAsOfOneMoment(t *testing.T) {
	if network == nil {
		t.Skip("boots a virtual machine: make vm runs it (ROOKERY_VM=1 with out/ made)")
	}
	imagetest.Root(t)
	ctx, cancel := context.WithTimeout(t.Context(), lab.Within(4*time.Minute))
	defer cancel()
	g := &goldenVM{t: t, ctx: ctx, dir: t.TempDir(), made: lab.In("../out"), console: lab.NewConsole()}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s", err, g.console.Text())
		}
	}
	must(g.made.Check())
	g.install()
	g.boot()
	_, err := g.console.Expect(ctx, "Server listening on")
	must(err)

	state := filepath.Join(g.dir, "state")
	server := &lab.Server{Program: g.made.Rookery, State: state}
	capture := func(more ...string) string {
		t.Helper()
		out, err := server.Run(ctx, append([]string{"image", "capture", "golden", g.address, "--identity", g.key,
			"--ssh-option", "UserKnownHostsFile=/dev/null", "--ssh-option", "StrictHostKeyChecking=no"}, more...)...)
		must(err)
		return out
	}
	plan := capture("--dry-run")
	for _, want := range []string{
		"/ (ext4): live, neither on LVM nor btrfs\n",
		"/data (btrfs): btrfs snapshot\n",
		"/srv (ext4): LVM snapshot of vg0/srv in 34 extents\n",
		"disk layout: cannot be taken over: /srv is on lvm vg0-srv, a layout takes partitions\n",
	} {
		if !strings.Contains(plan, want) {
			t.Errorf("the plan lacks %q:\n%s", want, plan)
		}
	}
	capture()
	for _, where := range []string{"srv", "data"} {
		one, two := g.count(state, where, "one"), g.count(state, where, "two")
		if one == 0 || one != two && one != two+1 {
			t.Errorf("%s: two files that are written in lockstep have %d and %d lines", where, one, two)
		}
	}
	if left := g.ssh("PATH=$PATH:/usr/sbin; cat /proc/mounts; lvs --noheadings -o lv_name; btrfs subvolume list /data; ls /run"); strings.Contains(left, "rookery") {
		t.Errorf("left on the client: %s", left)
	}

	// Without the two the layout can be had.
	g.ssh("touch /stop; until [ -e /run/done-srv ] && [ -e /run/done-data ]; do usleep 10000; done; umount /srv /data; /usr/sbin/lvchange -an vg0/srv")
	if plan := capture("--dry-run"); !strings.Contains(plan, "disk layout: 3 partitions, for bios\n") {
		t.Errorf("the plan lacks a disk layout:\n%s", plan)
	}
	capture()
	var shown struct{ Labels map[string]string }
	out, err := server.Run(ctx, "image", "show", "golden", "-o", "json")
	must(err)
	must(json.Unmarshal([]byte(out), &shown))
	var layout disklayout.Layout
	if err := json.Unmarshal([]byte(shown.Labels["rookery.layout"]), &layout); err != nil {
		t.Errorf("layout: %v", err)
	}
	want := disklayout.Layout{Partitions: []disklayout.Partition{
		{Name: "bios-boot", Size: "1MiB", Type: disklayout.BIOSBoot},
		{Name: "golden-swap", Size: "64MiB", Type: disklayout.Swap, FS: disklayout.SwapFS},
		{Name: "golden-root", Size: "*", Type: disklayout.Linux, FS: disklayout.Ext4, Mount: "/"},
	}}
	if fmt.Sprint(layout) != fmt.Sprint(want) {
		t.Errorf("layout: %+v, want %+v", layout, want)
	}
	if shown.Labels["rookery.host"] != "golden" || shown.Labels["rookery.firmware"] != "bios" {
		t.Errorf("labels: %v", shown.Labels)
	}
}

// A goldenVM is a small system of this machine's own programs, with its root on a
// partition, a volume group on a second disk and btrfs on a third.
type goldenVM struct {
	t       *testing.T
	ctx     context.Context
	dir     string
	made    lab.Made
	console *lab.Console
	key     string
	port    int
	address string
}

func (g *goldenVM) run(name string, args ...string) string {
	g.t.Helper()
	cmd := exec.CommandContext(g.ctx, name, args...)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		g.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, complaints.String())
	}
	return string(out)
}

func (g *goldenVM) write(file, text string) {
	g.t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
		g.t.Fatal(err)
	}
}

// modules are what the machine needs of the kernel's.
var modules = []string{"lib", "crypto", "arch/x86/crypto", "fs/btrfs", "drivers/virtio", "drivers/block/virtio_blk.ko",
	"drivers/net/virtio_net.ko", "drivers/net/net_failover.ko", "net/core/failover.ko", "drivers/md"}

const goldenInit = `#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin; export PATH
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /run
mkdir -p /dev/pts /run/sshd /run/lock; mount -t devpts devpts /dev/pts
mount -o remount,rw /
hostname golden
modprobe -a virtio_net dm-mod dm-snapshot btrfs
ip link set lo up; ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0
pvcreate -q /dev/vdb && vgcreate -q vg0 /dev/vdb && lvcreate -q -y -n srv -l 32 vg0 && $(which mke2fs) -q -t ext4 /dev/vg0/srv && mount -t ext4 /dev/vg0/srv /srv
mount -t btrfs /dev/vdc /data
for d in /srv /data; do
	(while [ ! -e /stop ]; do echo >>$d/one; sync $d/one; echo >>$d/two; sync $d/two; usleep 5000; done; : >/run/done-${d#/}) &
done
exec /usr/sbin/sshd -D -e -f /etc/sshd_config
`

const goldenInitrd = `#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin; export PATH
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
modprobe -a virtio_pci virtio_blk
mount -t ext4 -o ro /dev/vda3 /root && mount --move /dev /root/dev && umount /proc /sys && exec switch_root /root /sbin/init
`

// install makes the disks, the initrd and a key to log in with.
func (g *goldenVM) install() {
	g.t.Helper()
	g.key = filepath.Join(g.dir, "key")
	g.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", g.key)
	public, err := os.ReadFile(g.key + ".pub")
	if err != nil {
		g.t.Fatal(err)
	}
	root, initrd := filepath.Join(g.dir, "root"), filepath.Join(g.dir, "initrd")
	g.system(initrd)
	g.write(filepath.Join(initrd, "init"), goldenInitrd)
	g.system(root, "sshd", "rsync", "lvm", "btrfs", "lsblk", "blkid", "mke2fs", "mount", "umount", "sync")
	for _, name := range []string{"pvcreate", "vgcreate", "lvcreate", "lvremove", "lvchange", "pvs", "vgs", "lvs"} {
		if err := os.Symlink("lvm", filepath.Join(root, "usr/sbin", name)); err != nil {
			g.t.Fatal(err)
		}
	}
	g.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(root, "etc/hostkey"))
	for file, text := range map[string]string{
		"sbin/init": goldenInit, "root/.ssh/authorized_keys": string(public),
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nsshd:x:100:100::/run:/bin/false\n", "etc/group": "root:x:0:\n",
		"etc/sshd_config":  "HostKey /etc/hostkey\nPidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n",
		"etc/lvm/lvm.conf": "activation { udev_sync = 0 udev_rules = 0 }\ndevices { obtain_device_list_from_udev = 0 use_devicesfile = 0 }\n",
	} {
		g.write(filepath.Join(root, file), text)
	}
	g.pack(initrd)

	disk := filepath.Join(g.dir, "vda")
	const mib = 1 << 20
	for name, size := range map[string]int64{"vda": 512, "vdb": 512, "vdc": 256} {
		g.write(filepath.Join(g.dir, name), "")
		if err := os.Truncate(filepath.Join(g.dir, name), size*mib); err != nil {
			g.t.Fatal(err)
		}
	}
	g.run("sgdisk", "-n1:1M:+1M", "-t1:ef02", "-n2:2M:+64M", "-t2:8200", "-n3:66M:0", "-t3:8300", disk)
	swap := filepath.Join(g.dir, "swap")
	g.write(swap, "")
	if err := os.Truncate(swap, 64*mib); err != nil {
		g.t.Fatal(err)
	}
	g.run("mkswap", "-L", "golden-swap", swap)
	g.run("dd", "if="+swap, "of="+disk, "bs=1M", "seek=2", "conv=notrunc", "status=none")
	g.run("mke2fs", "-q", "-t", "ext4", "-L", "golden-root", "-d", root, "-E", fmt.Sprintf("offset=%d", 66*mib), disk, fmt.Sprintf("%dk", (512-66-1)*1024))
	g.run("mkfs.btrfs", "-q", filepath.Join(g.dir, "vdc"))
}

// system puts busybox, other programs and the kernel's modules into dir.
func (g *goldenVM) system(dir string, programs ...string) {
	g.t.Helper()
	imagetest.Programs(g.t, dir, append(programs, "busybox")...)
	for _, d := range []string{"bin", "sbin", "usr/sbin", "dev", "proc", "sys", "run", "tmp", "root", "srv", "data", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			g.t.Fatal(err)
		}
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		g.t.Fatal(err)
	}
	for applet := range strings.FieldsSeq(g.run(busybox, "--list")) {
		os.Symlink(busybox, filepath.Join(dir, "bin", applet)) // some programs are there
	}
	from, err := filepath.EvalSymlinks(g.made.Modules)
	if err != nil {
		g.t.Fatal(err)
	}
	to := filepath.Join(dir, "lib/modules", filepath.Base(from))
	for _, m := range modules {
		if err := os.MkdirAll(filepath.Join(to, "kernel", filepath.Dir(m)), 0o755); err != nil {
			g.t.Fatal(err)
		}
		g.run("cp", "-a", filepath.Join(from, "kernel", m), filepath.Join(to, "kernel", m))
	}
	for _, list := range []string{"modules.builtin", "modules.order", "modules.builtin.modinfo"} {
		g.run("cp", filepath.Join(from, list), to)
	}
	g.run("depmod", "-b", dir, filepath.Base(from))
}

// pack makes the directory initrd a cpio archive beside it.
func (g *goldenVM) pack(initrd string) {
	g.t.Helper()
	f, err := os.Create(initrd + ".cpio")
	if err != nil {
		g.t.Fatal(err)
	}
	defer f.Close()
	w := cpio.Newc.Writer(f)
	err = fs.WalkDir(os.DirFS(initrd), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == "." {
			return err
		}
		record := cpio.Directory(p, 0o755)
		full := filepath.Join(initrd, p)
		switch d.Type() {
		case fs.ModeSymlink:
			to, err := os.Readlink(full)
			if err != nil {
				return err
			}
			record = cpio.Symlink(p, to)
		case 0:
			b, err := os.ReadFile(full)
			if err != nil {
				return err
			}
			record = cpio.StaticFile(p, string(b), 0o755)
		}
		return w.WriteRecord(record)
	})
	if err == nil {
		err = cpio.WriteTrailer(w)
	}
	if err != nil {
		g.t.Fatal(err)
	}
}

// boot switches the machine on, until the test ends.
func (g *goldenVM) boot() {
	g.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		g.t.Fatal(err)
	}
	g.port = l.Addr().(*net.TCPAddr).Port
	l.Close()
	g.address = fmt.Sprintf("root@127.0.0.1:%d", g.port)
	args := []string{"-accel", lab.Accel(), "-cpu", "max", "-smp", "2", "-m", "512", "-nodefaults", "-no-user-config", "-no-reboot",
		"-display", "none", "-monitor", "none", "-serial", "stdio",
		"-kernel", g.made.Kernel, "-initrd", filepath.Join(g.dir, "initrd.cpio"), "-append", "console=ttyS0 panic=-1 quiet",
		"-nic", fmt.Sprintf("user,model=virtio-net-pci,restrict=on,hostfwd=tcp:127.0.0.1:%d-10.0.2.15:22", g.port)}
	for _, name := range []string{"vda", "vdb", "vdc"} {
		args = append(args, "-drive", "if=virtio,format=raw,cache=unsafe,file="+filepath.Join(g.dir, name))
	}
	ctx, cancel := context.WithCancel(g.ctx)
	vm := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	vm.Stdout, vm.Stderr = g.console, g.console
	if err := vm.Start(); err != nil {
		cancel()
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		cancel()
		vm.Wait() // killed
		if g.t.Failed() {
			g.t.Logf("console:\n%s", g.console.Text())
		}
	})
}

// ssh runs a line of shell on the machine.
func (g *goldenVM) ssh(line string) string {
	g.t.Helper()
	return g.run("ssh", "-F", "none", "-i", g.key, "-p", fmt.Sprint(g.port), "-o", "BatchMode=yes", "-o", "UserKnownHostsFile=/dev/null",
		"-o", "StrictHostKeyChecking=no", "root@127.0.0.1", line)
}

// count is how many lines a captured file has.
func (g *goldenVM) count(state, dir, file string) int {
	g.t.Helper()
	b, err := os.ReadFile(filepath.Join(state, "trees/golden", dir, file))
	if err != nil {
		g.t.Fatal(err)
	}
	return bytes.Count(b, []byte("\n"))
}
