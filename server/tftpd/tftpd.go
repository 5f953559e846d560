// Package tftpd hands out the few small files that firmware can only load by
// TFTP.
package tftpd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"path"
	"strings"
	"time"

	"github.com/pin/tftp/v3"
)

// A Server serves the regular files of Files to anybody, and takes none.
type Server struct {
	Addr  string         // where to listen; "" is ":69"
	Conn  net.PacketConn // listened on instead of Addr when not nil, and closed at the end of Run
	Files fs.FS          // os.Root.FS keeps symbolic links from leading out of it
	Log   *slog.Logger

	// Transfers is how many may run at once; 0 is 512. One more is refused
	// with an error that the machine shows.
	Transfers int
}

// What a transfer waits for an acknowledgement, and how often. Clients on the
// same network answer within milliseconds or are gone, and the end of Run waits
// for the last transfer.
const (
	timeout = time.Second
	retries = 5
)

// Run serves until ctx ends, and then returns nil. Its error is for someone who
// knows which service it is of.
func (s *Server) Run(ctx context.Context) error {
	conn := s.Conn
	if conn == nil {
		addr := s.Addr
		if addr == "" {
			addr = ":69"
		}
		var err error
		// IPv4 alone: firmware asks by nothing else, and on a socket for both
		// the library answers an IPv4 client from whatever address it likes.
		conn, err = (&net.ListenConfig{}).ListenPacket(ctx, "udp4", addr)
		if err != nil {
			return err
		}
	}
	transfers := s.Transfers
	if transfers == 0 {
		transfers = 512
	}
	defer conn.Close()
	slots := make(chan struct{}, transfers)
	server := tftp.NewServer(func(name string, to io.ReaderFrom) (err error) {
		client := to.(tftp.OutgoingTransfer).RemoteAddr()
		log := s.Log.With("client", client.IP, "file", fmt.Sprintf("%.200s", name))
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			log.Warn("tftp: refused: too many transfers", "running", transfers)
			return errors.New("too many transfers, try again")
		}
		// pin/tftp v3.2.0 writes the accepted options (packOACK) into a buffer as
		// long as the request; with the file's size in them they may be longer.
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("request not supported: %v", p)
				log.Warn("tftp: refused", "err", err)
			}
		}()
		file, size, err := open(s.Files, name)
		if err != nil {
			log.Info("tftp: refused", "err", err)
			return err
		}
		defer file.Close()
		to.(tftp.OutgoingTransfer).SetSize(size)
		n, err := to.ReadFrom(untilDone{ctx, file})
		if err != nil {
			// UEFI first asks for the size alone and then gives up with error 8:
			// this is how a healthy boot begins.
			log.Debug("tftp: ended early", "sent", n, "size", size, "err", err)
			return nil // the library has told the client
		}
		log.Info("tftp: sent", "bytes", n)
		return nil
	}, nil)
	server.SetTimeout(timeout)
	server.SetRetries(retries)
	server.SetBackoff(func(int) time.Duration { return 0 })

	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		server.Shutdown()
	})
	err := server.Serve(conn)
	if stop() { // ctx goes on: Serve has failed by itself
		server.Shutdown()
		return err
	}
	<-stopped
	return nil
}

// open finds the regular file that a client calls name. Names come with and
// without a leading slash, and from some loaders with backslashes.
func open(files fs.FS, name string) (fs.File, int64, error) {
	clean := strings.TrimPrefix(path.Clean("/"+strings.ReplaceAll(name, `\`, "/")), "/")
	if len(name) > 512 || !fs.ValidPath(clean) {
		return nil, 0, errors.New("not a file name")
	}
	file, err := files.Open(clean)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, errors.New("file not found")
	}
	if err != nil {
		return nil, 0, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, info.Size(), nil
}

// untilDone ends a transfer when ctx does.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (r untilDone) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(b)
}
