package rsync

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/crypto/ssh"

	"rookery/wire"
)

// Remote is what rsync has a remote shell run when it is to speak to a daemon by it.
// See rsync(1), USING RSYNC-DAEMON FEATURES VIA A REMOTE-SHELL CONNECTION.
const Remote = "rsync --server --daemon ."

// Authority is the key of a site's certificate, in PEM, which vouches for the
// server's ssh host keys.
func Authority(ca string) (ssh.PublicKey, error) {
	block, _ := pem.Decode([]byte(ca))
	if block == nil {
		return nil, errors.New("ssh: certificate authority: holds no PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("ssh: certificate authority: %w", err)
	}
	return ssh.NewPublicKey(cert.PublicKey)
}

// SSH reaches the daemon behind the ssh server at the other end of conn, if
// authority vouches for that one's host key. It closes conn when it fails.
func SSH(ctx context.Context, conn net.Conn, authority ssh.PublicKey) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	t, err := tunnelled(conn, authority)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("ssh: %s: %w", conn.RemoteAddr(), err)
	}
	return t, nil
}

func tunnelled(conn net.Conn, authority ssh.PublicKey) (net.Conn, error) {
	checker := ssh.CertChecker{IsHostAuthority: func(key ssh.PublicKey, _ string) bool {
		return string(key.Marshal()) == string(authority.Marshal())
	}}
	// The host is named by its certificate, as it is in TLS, wherever it is.
	c, channels, requests, err := ssh.NewClientConn(conn, net.JoinHostPort(wire.ServerName, "22"), &ssh.ClientConfig{
		User: wire.ServerName, HostKeyCallback: checker.CheckHostKey, HostKeyAlgorithms: []string{ssh.CertAlgoED25519v01},
	})
	if err != nil {
		return nil, err
	}
	session, err := ssh.NewClient(c, channels, requests).NewSession()
	if err != nil {
		return nil, err
	}
	t := &tunnel{Conn: conn}
	if t.in, err = session.StdinPipe(); err != nil {
		return nil, err
	}
	if t.out, err = session.StdoutPipe(); err != nil {
		return nil, err
	}
	return t, session.Start(Remote)
}

// A tunnel is the two pipes of a remote command over a connection.
type tunnel struct {
	net.Conn
	in  io.WriteCloser
	out io.Reader
}

func (t *tunnel) Read(b []byte) (int, error)  { return t.out.Read(b) }
func (t *tunnel) Write(b []byte) (int, error) { return t.in.Write(b) }
func (t *tunnel) CloseWrite() error           { return t.in.Close() }
