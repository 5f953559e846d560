package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"rookery/disklayout"
	"rookery/wire"
)

// A system is a way to bring a file to many nodes.
type system struct {
	name    string
	needs   []string                   // programs
	unicast bool                       // each copy comes from the server: it takes N times the ideal
	cast    func(b *bout) cast         // who runs what
	check   func(b *bout, i int) error // that node i has all of it
}

// A cast is the programs of a bout.
type cast struct {
	servers []spec // started first, one after another, each when the one before has said that it is ready
	nodes   []spec // started next, let go together; they say or do something when all is there
	starter *spec  // let go in place of the nodes, which then wait for it
}

var systems = []system{
	{name: "rookery", cast: castRookery, check: checkRookery},
	{name: "http", needs: []string{"curl"}, unicast: true, cast: castHTTP, check: checkFile},
}

// serve is Rookery's own server, without what is for machines that boot.
func (b *bout) serve(also string) spec {
	return spec{name: "server", said: regexp.MustCompile("msg=serving "), args: []string{b.data.rookery, "--state", b.data.state,
		"serve", "--interface", "eth0", "--without", "dhcp,tftp,radvd" + also}}
}

var serverURL = fmt.Sprintf("http://%s:80", serverAddress)

func castRookery(b *bout) cast {
	c := cast{servers: []spec{b.serve("")}}
	for i := range b.n {
		c.nodes = append(c.nodes, spec{
			name: b.nodes[i].Name, said: regexp.MustCompile("rookery: fetch: finished"), code: b.data.script(i, b.limit()),
			args: []string{b.data.agent, "install", "--script", goArg, "--site", b.data.site, "--http", serverURL, "--root", b.target(i)},
		})
	}
	return c
}

// script is the install script of node i.
func (d *dataset) script(i int, seedFor time.Duration) []byte {
	s := wire.Script{
		Version: 1, ID: fmt.Sprintf("%032x", i+1), Node: fmt.Sprintf("n%d", i+1),
		Image: wire.Image{Name: imageName, Manifest: d.manifest}, Transports: []string{"bittorrent", "http"},
		Layout:   disklayout.Default(),
		Identity: wire.Identity{Hostname: fmt.Sprintf("n%d", i+1), MachineID: fmt.Sprintf("%032x", i+1)},
		SeedFor:  int(seedFor.Seconds()), Ending: wire.Exit, OnFailure: wire.Exit,
	}
	sealed, err := wire.Seal(s, d.key)
	if err != nil {
		panic(err) // nothing in it is anybody's input
	}
	return sealed
}

// checkRookery compares the files of the image with those it was made of.
func checkRookery(b *bout, i int) error {
	return fs.WalkDir(os.DirFS(b.data.tree), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return same(filepath.Join(b.data.tree, path), filepath.Join(b.target(i), path))
	})
}

func castHTTP(b *bout) cast {
	c := cast{servers: []spec{b.serve(",seeder")}}
	for i := range b.n {
		c.nodes = append(c.nodes, spec{name: b.nodes[i].Name, args: []string{"curl", "-sSf", "--range", fmt.Sprintf("0-%d", b.data.size-1),
			"-o", b.target(i), serverURL + wire.PathLayers + string(b.data.digest)}})
	}
	return c
}

// checkFile compares a copy with as much of the layer as was to be copied.
func checkFile(b *bout, i int) error { return same(b.data.file, b.target(i)) }

// same says where two files differ, nil when they do not.
func same(want, got string) error {
	a, err := os.Open(want)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := os.Open(got)
	if err != nil {
		return err
	}
	defer b.Close()
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); ; {
		n, errA := io.ReadFull(a, x)
		m, errB := io.ReadFull(b, y)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			return fmt.Errorf("%s and %s differ in the MiB at %d", want, got, at)
		}
		if errA != nil || errB != nil {
			if errors.Is(errA, io.EOF) || errors.Is(errA, io.ErrUnexpectedEOF) {
				return nil
			}
			return errors.Join(errA, errB)
		}
		at += int64(n)
	}
}

// missing says which of the programs a system needs are not installed.
func (s system) missing() error {
	for _, program := range s.needs {
		if _, err := exec.LookPath(program); err != nil {
			return err
		}
	}
	return nil
}
