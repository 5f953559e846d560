package qemutests

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"rookery/disklayout"
	"rookery/disklayout/apply"
	"rookery/image"
	"rookery/image/store"
	"rookery/lab"
	"rookery/server/fleet"
	sites "rookery/server/site"
	"rookery/transport"
	"rookery/wire"
)

// The image of all stories is a version of two layers, above that of one.
const (
	imageName = "debian12:1"
	layered   = "debian12:2"
)

// network is the lab's, nil when the stories are not wanted.
var network *lab.Network

func TestMain(m *testing.M) {
	if os.Getenv("ROOKERY_VM") != "1" {
		os.Exit(m.Run())
	}
	code, err := lab.Enter(func(n *lab.Network) int {
		network = n
		return m.Run()
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// A site is a server and its machines, for one story.
type site struct {
	t      *testing.T
	ctx    context.Context // ends with the story's time
	dir    string          // consoles and the server's log, kept when the story fails
	made   lab.Made
	server *lab.Server
	trust  wire.Site // what the site's initramfs says
}

// template is the state directory that all stories begin with: one image, one
// kernel, one site key.
var template = sync.OnceValues(func() (*lab.Server, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lab.Within(2*time.Minute))
	defer cancel()
	made := lab.In("../out")
	if err := made.Check(); err != nil {
		return nil, err
	}
	dir := "../out/vm/template"
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	s := &lab.Server{Program: made.Rookery, State: dir}
	if err := made.Publish(ctx, s, imageName); err != nil {
		return nil, err
	}
	if err := publishLayer(ctx, filepath.Join(s.State, "images")); err != nil {
		return nil, err
	}
	return s, made.Netboot(ctx, s)
})

// publishLayer publishes the image with one more layer: a file that replaces
// another, one that is gone, and one with two names.
func publishLayer(ctx context.Context, dir string) error {
	images, err := store.Open(dir)
	if err != nil {
		return err
	}
	images.Torrent = transport.NewTorrent
	lower, err := images.Resolve(ctx, imageName)
	if err != nil {
		return err
	}
	layers, done, err := images.Layers(ctx, lower)
	if err != nil {
		return err
	}
	defer done()
	view, err := image.ReadView(layers...)
	if err != nil {
		return err
	}
	root, _ := view.Find(".")
	etc, _ := view.Find("etc")
	_, issue := view.Find("etc/issue")
	_, net := view.Find("etc/issue.net")
	if !issue || !net {
		return fmt.Errorf("%s: no /etc/issue or no /etc/issue.net for the second layer to change", imageName)
	}
	text := fmt.Sprintf("%s \\n \\l\n\n", layered)
	file := image.Entry{Path: "etc/issue", Type: image.Regular, Mode: 0o644, MTime: time.Now(), Size: int64(len(text))}
	_, err = images.Publish(ctx, layered, store.Publication{Lower: lower.Layers, Layer: func(w io.Writer) (image.Descriptor, error) {
		return image.Write(w, []image.Entry{
			root, etc, file, {Path: "etc/issue.link", Type: image.Hardlink, Link: "etc/issue"}, {Path: "etc/issue.net", Type: image.Whiteout},
		}, func(image.Entry) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(text)), nil })
	}})
	return err
}

// holds checks that the disk of a node that is switched off has both layers.
func (s *site) holds(v fleet.View) {
	s.t.Helper()
	path := filepath.Join(s.dir, v.Name, "disk.img")
	info, err := os.Stat(path)
	s.must(err)
	plan, err := disklayout.Fit(disklayout.Default(), []disklayout.Disk{{Name: "disk.img", Path: path, Size: info.Size(), SectorSize: 512}}, v.Firmware, v.ID)
	s.must(err)
	attached, detach, err := apply.Attach(plan)
	s.must(err)
	defer func() { s.must(detach()) }()
	for i := range attached.Partitions { // this kernel may know no vfat
		if attached.Partitions[i].Mount != "/" {
			attached.Partitions[i].Mount = ""
		}
	}
	root := s.t.TempDir()
	unmount, err := apply.Mount(attached, root)
	s.must(err)
	defer func() { s.must(unmount()) }()

	if b, err := os.ReadFile(filepath.Join(root, "etc/issue")); err != nil || !strings.HasPrefix(string(b), layered) {
		s.t.Errorf("%s: /etc/issue is %q, %v; want that of the second layer", v.Name, b, err)
	}
	issue, err := os.Stat(filepath.Join(root, "etc/issue"))
	s.must(err)
	if link, err := os.Stat(filepath.Join(root, "etc/issue.link")); err != nil || !os.SameFile(issue, link) {
		s.t.Errorf("%s: /etc/issue.link is not /etc/issue: %v", v.Name, err)
	}
	if _, err := os.Stat(filepath.Join(root, "etc/issue.net")); !errors.Is(err, fs.ErrNotExist) {
		s.t.Errorf("%s: /etc/issue.net is there, which the second layer takes away: %v", v.Name, err)
	}
	if _, err := os.Stat(filepath.Join(root, "etc/debian_version")); err != nil {
		s.t.Errorf("%s: the first layer is missing: %v", v.Name, err)
	}
}

// begin prepares a site whose server knows records and does not run yet.
func begin(t *testing.T, limit time.Duration, records string) *site {
	t.Helper()
	if network == nil {
		t.Skip("boots virtual machines for minutes: make vm runs it (ROOKERY_VM=1 with out/ made)")
	}
	from, err := template()
	if err != nil {
		t.Fatal(err)
	}
	limit = lab.Within(limit)
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, fmt.Errorf("the story's %s are over", limit.Round(time.Second)))
	t.Cleanup(cancel)

	s := &site{t: t, ctx: ctx, dir: filepath.Join("../out/vm", t.Name()), made: lab.In("../out")}
	s.must(os.RemoveAll(s.dir))
	s.must(os.MkdirAll(s.dir, 0o755))
	t.Cleanup(func() {
		if !t.Failed() {
			s.must(os.RemoveAll(s.dir))
		}
	})
	s.server = &lab.Server{
		Program: s.made.Rookery, State: filepath.Join(s.dir, "state"),
		Log: filepath.Join(s.dir, "server.log"), Flags: network.ServeFlags(),
	}
	if out, err := exec.CommandContext(ctx, "cp", "-a", from.State, s.server.State).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	s.must(os.WriteFile(filepath.Join(s.dir, "nodes.yaml"), []byte("kind: Defaults\nimage: debian12\nconsole: ttyS0,115200\n"+records), 0o644))
	s.rookery("apply", "-f", filepath.Join(s.dir, "nodes.yaml"))
	t.Cleanup(func() { s.must(s.server.Stop()) })
	keys, err := sites.Open(filepath.Join(s.server.State, "site"))
	s.must(err)
	s.trust = keys.Public()
	return s
}

func (s *site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// rookery runs the command line and returns what it prints.
func (s *site) rookery(args ...string) string {
	s.t.Helper()
	out, err := s.server.Run(s.ctx, args...)
	s.must(err)
	return out
}

// record is the record of node n, of which there can be 9.
func record(n int, more string) string {
	return fmt.Sprintf("---\nkind: Node\nname: n%d\nmacs: [%q]\naddress: %s/24\n%s", n, mac(n), address(n), more)
}

func mac(n int) string         { return fmt.Sprintf("52:54:00:07:00:0%d", n) }
func address(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 7, 0, byte(10 + n)}) }

// vm is node n as a virtual machine, switched on.
func (s *site) vm(n int, firmware disklayout.Firmware, disk int64) *lab.VM {
	s.t.Helper()
	name := fmt.Sprintf("n%d", n)
	vm := &lab.VM{Name: name, MAC: mac(n), Firmware: firmware, Disk: disk, Dir: filepath.Join(s.dir, name)}
	s.must(network.Plug(vm))
	s.t.Cleanup(vm.PowerOff)
	s.must(vm.PowerOn())
	return vm
}

// agent is node n as an agent in a namespace, switched on.
func (s *site) agent(n int, disk int64) *lab.Agent {
	s.t.Helper()
	if os.Geteuid() != 0 {
		s.t.Skip("disks of agents in namespaces are loop devices: run it as root")
	}
	name := fmt.Sprintf("n%d", n)
	a := &lab.Agent{
		Name: name, MAC: mac(n), Address: address(n), Firmware: disklayout.BIOS, Disk: disk,
		Dir: filepath.Join(s.dir, name), Program: s.made.Agent,
	}
	s.must(network.PlugAgent(a, s.trust))
	s.t.Cleanup(a.PowerOff)
	s.must(a.PowerOn())
	return a
}

// until waits until node n is as wanted, and fails when its installation does.
func (s *site) until(n int, wanted func(fleet.View) bool) fleet.View {
	s.t.Helper()
	name := fmt.Sprintf("n%d", n)
	v, err := s.server.Until(s.ctx, name, func(v fleet.View) bool { return v.Error != nil || wanted(v) })
	if err != nil {
		s.t.Fatalf("%s: %v", name, err)
	}
	if !wanted(v) {
		s.t.Fatalf("%s: %s: %s", name, v.Error.Step, v.Error.Cause)
	}
	return v
}

// uplink makes the server's wire slow for the story.
func (s *site) uplink(mbit int) {
	s.t.Helper()
	s.must(network.Uplink(mbit))
	s.t.Cleanup(func() { s.must(network.Uplink(0)) })
}

func (s *site) expect(c *lab.Console, pattern string) []string {
	s.t.Helper()
	match, err := c.Expect(s.ctx, pattern)
	s.must(err)
	return match
}

// What a story waits for.

func installed(v fleet.View) bool { return v.Next == wire.Local }

func failed(v fleet.View) bool { return v.Error != nil }

// fetched says whether that much of the image has come, in percent.
func fetched(percent float64) func(fleet.View) bool {
	return func(v fleet.View) bool { return v.Phase == wire.PhaseFetch && v.Percent >= percent }
}
