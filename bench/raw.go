package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"regexp"

	"rookery/transport"
	"rookery/transport/swarm"
)

// castEngine is the server and, in place of an agent, the agent's peer alone: other
// people's clients do not extract either.
func castEngine(b *bout) cast {
	return cast{files: map[string]string{torrentFile: b.torrent()}, servers: []spec{b.serve("")}, nodes: []spec{{
		name: nodeName(0), said: regexp.MustCompile("^complete$"), args: []string{self(), "peer", b.path(torrentFile), b.target(0), goArg},
	}}}
}

// peer fetches a torrent into a file when the named pipe gate was written to, says
// so, and serves it until ctx ends.
func peer(ctx context.Context, torrent, file, gate string) error {
	b, err := os.ReadFile(torrent)
	if err != nil {
		return err
	}
	info, err := transport.ParseTorrent(b)
	if err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	ln, err := net.Listen("tcp", ":"+nodePort)
	if err != nil {
		return err
	}
	if _, err := os.ReadFile(gate); err != nil {
		return err
	}
	pieces := transport.NewPieces(info, f)
	p := swarm.NewPeer(ln, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	p.Add(pieces, swarm.Options{Trackers: info.Trackers})
	go func() {
		select {
		case <-pieces.Done():
			fmt.Println("complete")
		case <-ctx.Done():
		}
	}()
	return p.Run(ctx)
}
