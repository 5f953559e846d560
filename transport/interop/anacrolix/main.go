// Command anacrolix is the stock client of github.com/anacrolix/torrent: it
// fetches and serves layer.torrent of a directory there, from an address of
// its own, until it is killed.
package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: anacrolix ADDRESS DIRECTORY")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "anacrolix:", err)
		os.Exit(1)
	}
}

func run(addr, dir string) error {
	log := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelDebug}))
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}
	config := torrent.NewDefaultClientConfig()
	config.ListenHost = func(string) string { return addr }
	config.ListenPort = 6881
	config.TrackerDialContext = dialer.DialContext
	config.DialForPeerConns = false // but by the dialer below, which has an address of its own
	config.Seed = true
	config.NoDHT = true
	config.DisableUTP = true
	config.DisableIPv6 = true
	config.DisablePEX = true
	config.DisableWebtorrent = true
	config.NoDefaultPortForwarding = true
	config.MaxUnverifiedBytes = 0
	config.Slogger = log
	config.DefaultStorage = storage.NewFileWithCompletion(dir, storage.NewMapPieceCompletion())
	client, err := torrent.NewClient(config)
	if err != nil {
		return err
	}
	defer client.Close()
	client.AddDialer(torrent.NetworkDialer{Network: "tcp", Dialer: dialer})
	meta, err := metainfo.LoadFromFile(filepath.Join(dir, "layer.torrent"))
	if err != nil {
		return err
	}
	t, err := client.AddTorrent(meta)
	if err != nil {
		return err
	}
	t.DownloadAll()
	select {}
}
