package swarmtests

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"rookery/transport"
	"rookery/transport/swarm"
)

// badPeer says in the environment that the test's program is a peer that does
// what none should, and what: it runs on a host of its own.
const badPeer = "ROOKERY_BAD_PEER"

// bad starts such a peer, with the torrent as its argument, and others after it.
func (s *story) bad(kind, addr string, args ...string) *member {
	s.t.Helper()
	self, err := os.Executable()
	s.must(err)
	torrent := s.path("torrent")
	s.must(os.WriteFile(torrent, s.data.Torrent, 0o600))
	m := s.member(kind, addr, append([]string{"env", badPeer + "=" + kind, self, torrent}, args...)...)
	s.must(m.PowerOn())
	s.expect(m, "ready")
	return m
}

// misbehave is the main of a bad peer.
func misbehave(kind string, args []string) error {
	torrent, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	info, err := transport.ParseTorrent(torrent)
	if err != nil {
		return err
	}
	switch kind {
	case "liar", "false-server":
		return lie(info, kind == "false-server")
	case "mute", "promising":
		return accept(info, kind == "promising")
	}
	if kind == "crowd" && len(args) == 2 {
		crowd(info, args[1])
	}
	return fmt.Errorf("%s=%s: there is none", badPeer, kind)
}

// lie takes part with every piece, and all of them wrong.
func lie(info transport.Info, server bool) error {
	ln, err := net.Listen("tcp", peerPort)
	if err != nil {
		return err
	}
	p := swarm.NewPeer(ln, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	pieces := transport.NewPieces(info, lies{})
	pieces.AllDone()
	p.Add(pieces, swarm.Options{Seeder: server, Trackers: []string{announceURL}})
	fmt.Println("ready")
	return p.Run(context.Background())
}

// lies has bytes that nobody wants.
type lies struct{}

func (lies) ReadAt(b []byte, _ int64) (int, error)  { return rand.Read(b) }
func (lies) WriteAt(b []byte, _ int64) (int, error) { return len(b), nil }

// accept lets everybody come and answers nobody; promising, it says before that
// it has everything and that it will.
func accept(info transport.Info, promising bool) error {
	ln, err := net.Listen("tcp", peerPort)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	go announce(info)
	for {
		nc, err := ln.Accept()
		if err != nil {
			return err
		}
		if promising {
			io.WriteString(nc, hello(info)+"\x00\x00\x00\x01\x0e\x00\x00\x00\x01\x01") // HaveAll, Unchoke
		}
		go hear(nc)
	}
}

// hear says what it was told.
func hear(nc net.Conn) {
	r := bufio.NewReader(nc)
	if _, err := r.Discard(len(hello(transport.Info{}))); err != nil {
		return
	}
	fmt.Println("greeted")
	for {
		head, err := r.Peek(5)
		if err != nil {
			return
		}
		if head[4] == 6 {
			fmt.Println("asked for a piece")
		}
		if _, err := r.Discard(4 + int(binary.BigEndian.Uint32(head))); err != nil {
			return
		}
	}
}

// hello is a greeting of somebody new.
func hello(info transport.Info) string {
	id := make([]byte, 12)
	rand.Read(id)
	return "\x13BitTorrent protocol\x00\x00\x00\x00\x00\x10\x00\x04" + string(info.InfoHash[:]) + "-XX0000-" + string(id)
}

// announce has the tracker name this host to all.
func announce(info transport.Info) {
	id := hello(info)[48:]
	for {
		resp, err := http.Get(announceURL + "?" + url.Values{
			"info_hash": {string(info.InfoHash[:])}, "peer_id": {id}, "port": {peerPort[1:]}, "left": {"0"}, "compact": {"1"},
		}.Encode())
		if err == nil {
			resp.Body.Close()
			fmt.Println("announced:", resp.Status)
		}
		time.Sleep(time.Second)
	}
}

// crowd is 10,000 connections to an address, of which each other one greets, and
// none says more. What is closed is opened again ten seconds later.
func crowd(info transport.Info, addr string) {
	fmt.Println("ready")
	const many = 10_000
	var tried atomic.Int64
	dialing := make(chan struct{}, 100)
	var all sync.WaitGroup
	for i := range many {
		all.Go(func() {
			for {
				dialing <- struct{}{}
				nc, err := net.DialTimeout("tcp", addr, 10*time.Second)
				<-dialing
				if err == nil {
					if i%2 == 0 {
						io.WriteString(nc, hello(info)+"\x00\x00\x00\x04\x14\x00de") // and a handshake of BEP 10
					}
					if tried.Add(1) == many {
						fmt.Println("all have been there")
					}
					io.Copy(io.Discard, nc)
					nc.Close()
				}
				time.Sleep(10 * time.Second)
			}
		})
	}
	all.Wait()
}
