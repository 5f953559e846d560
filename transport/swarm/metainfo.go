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
	"slices"
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
	getMethod = "GET "                          // begins no greeting of BitTorrent
	maxGet    = 4 << 10                         // bytes of a request
	maxNames  = rules.MaxServed * rules.NamedTo // of nodes, that are kept for who asks next
	giverWait = 3 * time.Second                 // for one: then the server gives it itself
)

// Giver waits for a node that has the torrent file of t and can pass it on. The zero
// value is the server itself, at once when those who got a file from it do not come.
func (t *Torrent) Giver(ctx context.Context) netip.AddrPort {
	if t.peer.vain.Load() >= rules.MaxGiving {
		return netip.AddrPort{}
	}
	ctx, cancel := context.WithTimeout(ctx, giverWait)
	defer cancel()
	for {
		select {
		case <-t.names:
		default:
			select {
			case <-t.names:
			case t.giving <- struct{}{}:
				t.await()
				return netip.AddrPort{}
			case <-ctx.Done():
				return netip.AddrPort{}
			}
		}
		if node := t.name(); node.IsValid() {
			return node
		}
	}
}

// await gives who got the file from the server some time to come with it.
func (t *Torrent) await() {
	t.mu.Lock()
	defer t.mu.Unlock()
	var timer *time.Timer
	timer = time.AfterFunc(rules.GivingFor, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if i := slices.Index(t.awaited, timer); i >= 0 {
			t.awaited = slices.Delete(t.awaited, i, i+1)
			t.peer.vain.Add(1)
		}
		<-t.giving
	})
	t.awaited = append(t.awaited, timer)
}

// comes takes note of a node that has the file: it has joined. To others a host is
// named once, and not by an address that has a meaning on this link alone.
func (t *Torrent) comes(c *conn) {
	addr := c.addr.Addr()
	if !t.seeder || c.origin == transport.FromServer || !c.ours || c.comes || !addr.IsValid() {
		return
	}
	t.peer.vain.Store(0)
	t.latest = time.Now()
	var awaited *time.Timer
	if len(t.awaited) > 0 {
		awaited, t.awaited = t.awaited[0], t.awaited[1:]
	}
	c.comes = true
	for other := range t.conns {
		if addr.IsLinkLocalUnicast() || other != c && other.comes && other.Host == c.Host {
			c.named = rules.NamedTo
			if awaited != nil && awaited.Stop() {
				<-t.giving // the server gives the file once more in its place
			}
			return
		}
	}
	for range rules.NamedTo {
		t.mayName()
	}
}

// mayName lets somebody who asks have one more name.
func (t *Torrent) mayName() {
	select {
	case t.names <- struct{}{}:
	default:
	}
}

// name is a node that has come and was not named often lately. Nodes for which the
// server has no room as peers do not come, so who came is named again while any do.
func (t *Torrent) name() netip.AddrPort {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.conns { // in any order
		if c.comes && c.named < rules.NamedTo {
			c.named++
			time.AfterFunc(rules.GivingFor, func() {
				t.mu.Lock()
				defer t.mu.Unlock()
				if time.Since(t.latest) < giverWait { // otherwise those who are named may not be reached
					c.named--
					t.mayName()
				}
			})
			return c.addr
		}
	}
	return netip.AddrPort{}
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
