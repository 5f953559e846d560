package main

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"

	"rookery/lab"
	"rookery/wire"
)

// A system is a way to bring a file to many nodes.
type system struct {
	name    string
	needs   []string                   // programs
	raw     bool                       // from the server to one peer beside it, by loopback
	unicast bool                       // each copy comes from the server: it takes N times the ideal
	files   bool                       // what is copied is the image's files, not its layer
	cast    func(b *bout) cast         // who runs what
	check   func(b *bout, i int) error // that node i has all of it
}

// A cast is the programs of a bout.
type cast struct {
	files   map[string]string // in the bout's directory
	servers []spec            // started first, one after another, each when the one before has said that it is ready
	nodes   []spec            // started next, let go together; they say or do something when all is there
	starter *spec             // let go in place of the nodes, which then wait for it
}

var systems = []system{
	{name: "rookery", cast: castRookery("bittorrent", "http"), check: checkRookery},
	{name: "rookery-multicast", cast: castMulticast("multicast"), check: checkRookery},
	{name: "rookery-hybrid", cast: castMulticast("multicast", "bittorrent"), check: checkRookery},
	{name: "rookery-rsync", needs: []string{"rsync"}, unicast: true, files: true, cast: castRookery("rsync"), check: checkRookery},
	{name: "http", needs: []string{"curl"}, unicast: true, cast: castHTTP, check: checkFile},
	{name: "rsync", needs: []string{"rsync"}, unicast: true, cast: castRsync, check: checkFile},
	{name: "udpcast", needs: []string{"udp-sender", "udp-receiver"}, cast: udpcast(nil, nil), check: checkFile},
	// Packets as large as everyone's, and no halves of a second at the start and at the end.
	{name: "udpcast-tuned", needs: []string{"udp-sender", "udp-receiver"}, check: checkFile,
		cast: udpcast([]string{"--blocksize", "8900", "--rexmit-hello-interval", "50"}, []string{"--exit-wait", "10"})},
	{name: "aria2", needs: []string{"aria2c"}, cast: castAria2, check: checkTorrent},
	{name: "libtorrent", needs: []string{python}, cast: castLibtorrent, check: checkTorrent},
	{name: "raw-rookery", raw: true, cast: castEngine, check: checkFile},
	{name: "raw-aria2", raw: true, needs: []string{"aria2c"}, cast: castAria2, check: checkTorrent},
	{name: "raw-libtorrent", raw: true, needs: []string{python}, cast: castLibtorrent, check: checkTorrent},
}

// serve is Rookery's own server, without what is for machines that boot.
func (b *bout) serve(also string) spec {
	card := "eth0"
	if b.system.raw {
		card = "lo"
	}
	return spec{name: "server", said: regexp.MustCompile("msg=serving "), args: []string{b.data.Programs.Rookery, "--state", b.data.State,
		"serve", "--interface", card, "--address", b.ip(), "--without", "dhcp,tftp,radvd" + also}}
}

// castRookery has agents that fetch by those transports.
func castRookery(transports ...string) func(*bout) cast {
	return func(b *bout) cast {
		c := cast{servers: []spec{b.serve("")}}
		for i := range b.n {
			c.nodes = append(c.nodes, spec{
				name: nodeName(i), said: regexp.MustCompile("rookery: fetch: finished"), code: b.data.Script(i, b.limit(), transports...),
				args: []string{b.data.Programs.Agent, "install", "--script", goArg, "--site", b.data.Site, "--http", b.url(), "--root", b.target(i)},
			})
		}
		return c
	}
}

// castMulticast has the server send at nearly the rate of its link, of which the
// nodes' words and the server's answers need a little.
func castMulticast(transports ...string) func(*bout) cast {
	return func(b *bout) cast {
		b.data.Multicast = &wire.Multicast{Group: "239.192.0.0/16", Port: 6882, Server: b.ip()}
		c := castRookery(transports...)(b)
		rate := fmt.Sprintf("%dkB", b.mbit*1000/8*97/100)
		c.servers[0].args = append(c.servers[0].args, "--multicast-rate", rate)
		return c
	}
}

// checkRookery compares the files of the image with those it was made of.
func checkRookery(b *bout, i int) error { return b.data.Check(b.target(i)) }

// castHTTP has a server without Rookery's limits: at 100 kbit/s for each of fifty
// nodes that one would end connections that take more than a minute for 4 MiB. Of
// fifty connections that begin at once the kernel gives some up, so curl asks again.
func castHTTP(b *bout) cast {
	c := cast{servers: []spec{{name: "server", said: regexp.MustCompile("^ready$"), args: []string{self(), "files", filepath.Dir(b.data.File), b.ip() + ":80"}}}}
	for i := range b.n {
		c.nodes = append(c.nodes, spec{name: nodeName(i), args: []string{"curl", "-sSf",
			"--retry", "10", "--retry-all-errors", "--retry-delay", "1", "--keepalive-time", "5", "-o", b.target(i), b.url() + "/" + filepath.Base(b.data.File)}})
	}
	return c
}

// files serves the files of a directory by HTTP until ctx ends.
func files(ctx context.Context, dir, addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	fmt.Println("ready")
	if err := http.Serve(ln, http.FileServer(http.Dir(dir))); ctx.Err() == nil {
		return err
	}
	return nil
}

// self is this program.
func self() string {
	name, err := os.Executable()
	if err != nil {
		panic(err) // Linux always knows
	}
	return name
}

func castRsync(b *bout) cast {
	const config = "rsyncd.conf"
	// Of more than 5 who come at once, the default, some would never be answered.
	text := "use chroot = no\nreverse lookup = no\nlisten backlog = 128\n[bench]\npath = " + filepath.Dir(b.data.File) + "\n"
	c := cast{files: map[string]string{config: text}, servers: []spec{{name: "server", said: regexp.MustCompile("starting, listening"),
		args: []string{"rsync", "--daemon", "--no-detach", "--config", b.path(config), "--log-file=/dev/stdout"}}}}
	for i := range b.n {
		// One whose connection the kernel has given up would wait for ever.
		c.nodes = append(c.nodes, spec{name: nodeName(i), args: []string{"sh", "-c", `until "$@"; do sleep 1; done`, "sh",
			"rsync", "--timeout=15", "--whole-file", "--inplace",
			"rsync://" + b.ip() + "/bench/" + filepath.Base(b.data.File), b.target(i)}})
	}
	return c
}

// udpcast has the receivers wait, since the sender, given more flags, says hello
// and begins when all have answered.
func udpcast(sender, receiver []string) func(*bout) cast {
	return func(b *bout) cast {
		c := cast{starter: &spec{name: "server", args: append([]string{"udp-sender", "--file", b.data.File, "--interface", "eth0",
			"--nokbd", "--no-progress", "--full-duplex", "--min-receivers", fmt.Sprint(b.n), "--max-wait", "20", "--rexmit-hello-interval", "500"}, sender...)}}
		for i := range b.n {
			c.nodes = append(c.nodes, spec{name: nodeName(i), ready: regexp.MustCompile("UDP receiver for"),
				args: append([]string{"udp-receiver", "--file", b.target(i), "--interface", "eth0", "--nokbd", "--no-progress", "--nosync"}, receiver...)})
		}
		return c
	}
}

func castAria2(b *bout) cast {
	c := cast{files: map[string]string{torrentFile: b.torrent(), hookFile: "#!/bin/sh\necho complete\n"},
		servers: []spec{b.serve(",seeder"), b.aria2("seeder", filepath.Dir(b.data.File), b.path(torrentFile))}}
	for i := range b.n {
		c.nodes = append(c.nodes, b.aria2(nodeName(i), b.target(i), ""))
	}
	for i := range c.nodes {
		c.nodes[i].code = []byte(b.path(torrentFile) + "\n")
	}
	return c
}

// aria2 seeds torrent, or fetches the one that it reads the name of at the start.
func (b *bout) aria2(name, dir, torrent string) spec {
	s := spec{name: name, said: regexp.MustCompile("^complete$"), args: []string{"aria2c", "--no-conf", "--enable-dht=false", "--bt-enable-lpd=false",
		"--enable-peer-exchange=false", "--seed-ratio=0.0", "--bt-request-peer-speed-limit=1000M", "--bt-max-peers=100", "--bt-tracker-interval=5",
		"--file-allocation=none", "--disk-cache=64M", "--summary-interval=0", "--show-console-readout=false",
		"--on-bt-download-complete=" + b.path(hookFile), "--dir", dir}}
	if torrent == "" {
		s.args = append(s.args, "--listen-port="+nodePort, "--input-file", goArg)
		return s
	}
	s.said = regexp.MustCompile("listening on TCP port")
	s.args = append(s.args, "--listen-port="+seederPort, "--bt-seed-unverified=true", torrent)
	return s
}

// python is Debian's, for which Debian has the module.
const python = "/usr/bin/python3"

//go:embed libtorrent.py
var libtorrent string

func castLibtorrent(b *bout) cast {
	const program = "peer.py" // python would take libtorrent.py for the module
	c := cast{files: map[string]string{torrentFile: b.torrent(), program: libtorrent}, servers: []spec{b.serve(",seeder"), {name: "seeder", said: regexp.MustCompile("^ready$"),
		args: []string{python, b.path(program), "seed", b.path(torrentFile), filepath.Dir(b.data.File), seederPort, "-"}}}}
	for i := range b.n {
		c.nodes = append(c.nodes, spec{name: nodeName(i), said: regexp.MustCompile("^complete$"),
			args: []string{python, b.path(program), "fetch", b.path(torrentFile), b.target(i), nodePort, goArg}})
	}
	return c
}

// Ports of other people's clients: Rookery's seeder has 6881.
const (
	seederPort = "6998"
	nodePort   = "6999"
)

// Files of the casts.
const (
	torrentFile = "torrent"
	hookFile    = "complete"
)

// torrent is the layer's torrent with a tracker.
func (b *bout) torrent() string {
	tracker := b.url() + wire.PathAnnounce
	return fmt.Sprintf("d8:announce%d:%s%s", len(tracker), tracker, b.data.Torrent[1:])
}

// checkTorrent compares what the torrent names.
func checkTorrent(b *bout, i int) error {
	return lab.Same(b.data.File, filepath.Join(b.target(i), b.data.Digest.Hex()))
}

// checkFile compares a copy with as much of the layer as was to be copied.
func checkFile(b *bout, i int) error { return lab.Same(b.data.File, b.target(i)) }

// missing says what a system lacks here, and how to give it.
func (s system) missing() error {
	for _, program := range s.needs {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w: make deps installs it", err)
		}
	}
	// rsync's daemon sets its groups first. See user_namespaces(7).
	if may, err := os.ReadFile("/proc/self/setgroups"); slices.Contains(s.needs, "rsync") && err == nil && string(may) != "allow\n" {
		return fmt.Errorf("setgroups: %s: run it as root", bytes.TrimSpace(may))
	}
	return nil
}
