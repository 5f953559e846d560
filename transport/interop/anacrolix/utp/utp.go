// Package utp stands in for the module of this name, which cannot be had at the
// version that is asked for, in a client that uses TCP only.
package utp

import (
	"context"
	"errors"
	"log/slog"
	"net"
)

// Default names the implementation.
const Default = "none"

var errNone = errors.New("utp: not built in")

// A Socket is never made.
type Socket interface {
	net.PacketConn
	Accept() (net.Conn, error)
	Addr() net.Addr
	SetFirewallCallback(FirewallCallback)
	DialContext(ctx context.Context, network, addr string) (net.Conn, error)
}

// An Option has no meaning here.
type Option func()

// A FirewallCallback is never called.
type FirewallCallback func(net.Addr) bool

// WithLogger has no meaning here.
func WithLogger(*slog.Logger) Option { return nil }

// NewSocket is an error.
func NewSocket(string, string, ...Option) (Socket, error) { return nil, errNone }

// NewSocketFromPacketConn is an error.
func NewSocketFromPacketConn(net.PacketConn, ...Option) (Socket, error) { return nil, errNone }
