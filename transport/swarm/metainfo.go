package swarm

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"rookery/transport"
	"rookery/transport/swarm/rules"
	"rookery/wire"
)

// Who joins a swarm needs its torrent file first, and many come at the same time. A
// server gives it to a few, and names these to the others: where a node listens for
// peers, it serves its torrent files by HTTP.
const (
	getMethod = "GET "          // begins no greeting of BitTorrent
	maxGet    = 4 << 10         // bytes of a request
	maxNamed  = 256             // that are remembered, with this in it
	giverWait = 3 * time.Second // for one: then the server gives it itself
)

// Giver waits for a node that has the torrent file of t and can pass it on. The zero
// value is the server itself.
func (t *Torrent) Giver(ctx context.Context) netip.AddrPort {
	ctx, cancel := context.WithTimeout(ctx, giverWait)
	defer cancel()
	for {
		var giver netip.AddrPort
		select {
		case giver = <-t.givers:
		default:
			select {
			case giver = <-t.givers:
			case t.giving <- struct{}{}:
				time.AfterFunc(rules.GivingFor, t.given)
				return netip.AddrPort{}
			case <-ctx.Done():
				return netip.AddrPort{}
			}
		}
		if t.connected(giver) {
			return giver
		}
	}
}

// given lets the server give the file once more, if it is waited for.
func (t *Torrent) given() {
	select {
	case <-t.giving:
	default:
	}
}

// comes takes note of a node that has the file: it has joined.
func (t *Torrent) comes(c *conn) {
	if !t.seeder || c.origin == transport.FromServer || !c.ours || c.comes || !c.addr.IsValid() {
		return
	}
	c.comes = true
	t.given()
	for range rules.NamedTo {
		select {
		case t.givers <- c.addr:
		default:
		}
	}
}

func (t *Torrent) connected(addr netip.AddrPort) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.conns {
		if c.addr == addr {
			return true
		}
	}
	return false
}

// give answers a request for a torrent file, whose method has been read.
func (p *Peer) give(ctx context.Context, nc net.Conn) error {
	said := io.MultiReader(strings.NewReader(getMethod), io.LimitReader(nc, maxGet))
	req, err := http.ReadRequest(bufio.NewReader(said))
	if err != nil {
		return err
	}
	answer := http.Response{StatusCode: http.StatusNotFound, ProtoMajor: 1, ProtoMinor: 1, Request: req, Close: true}
	digest, _ := strings.CutPrefix(req.URL.Path, wire.PathTorrents)
	if file := p.file(wire.Digest(digest)); file != nil {
		if err := p.upload.Wait(ctx, len(file)); err != nil {
			return err
		}
		answer.StatusCode, answer.ContentLength = http.StatusOK, int64(len(file))
		answer.Header = http.Header{"Content-Type": {"application/x-bittorrent"}}
		answer.Body = io.NopCloser(bytes.NewReader(file))
	}
	if err := answer.Write(nc); err != nil {
		return fmt.Errorf("torrent %s: %w", digest, err)
	}
	return nil
}

// file is the torrent file with a digest, or nil.
func (p *Peer) file(d wire.Digest) []byte {
	for _, t := range p.Torrents() {
		if t.file == d && len(t.info.File) > 0 {
			return t.info.File
		}
	}
	return nil
}
