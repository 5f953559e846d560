package rsyncd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"rookery/transport/rsync"
)

// bySSH serves one connection of ssh: anybody may have one session, in which
// the daemon is reached. No command is ever run for a client.
func (s *Server) bySSH(ctx context.Context, conn net.Conn) error {
	var parts sync.WaitGroup
	defer parts.Wait()
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	conn.SetDeadline(time.Now().Add(shy)) // the session takes it away
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.KeyExchanges = []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519} // a client may ask for them again and again: cheap ones
	config.AddHostKey(s.HostKey)
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return fmt.Errorf("ssh: %.300s", err) // in it are words of the client's
	}
	parts.Go(func() { ssh.DiscardRequests(requests) })
	var said error
	for sessions := 0; ; sessions++ {
		c, ok := <-channels
		if !ok {
			break
		}
		if c.ChannelType() != "session" || sessions > 0 {
			c.Reject(ssh.Prohibited, "one session, and nothing else")
			continue
		}
		channel, requests, err := c.Accept()
		if err != nil { // what else was opened is still to be refused: the library waits for that
			conn.Close()
			said = fmt.Errorf("ssh: %.300s", err)
			continue
		}
		parts.Go(func() { said = s.session(ctx, &session{Conn: conn, channel: channel}, requests) })
	}
	parts.Wait()
	return said
}

// session takes the one request that starts something, and no other.
func (s *Server) session(ctx context.Context, client *session, requests <-chan *ssh.Request) error {
	var forwarding sync.WaitGroup
	var err error
	started := false
	for r := range requests {
		command, ok := asked(r.Type, r.Payload)
		ok = ok && !started
		if r.Reply(ok, nil) != nil || !ok {
			continue
		}
		started = true
		if command != rsync.Remote {
			err = fmt.Errorf("ssh: refused %.200q, want %q", command, rsync.Remote)
			forwarding.Go(client.refuse)
			continue
		}
		client.SetDeadline(time.Time{})
		forwarding.Go(func() { err = s.forward(ctx, client) })
	}
	forwarding.Wait()
	return err
}

// asked is the command that a request wants to run, "" being a shell, and
// whether it wants one at all. RFC 4254, 6.5.
func asked(kind string, payload []byte) (command string, ok bool) {
	switch kind {
	case "shell":
		return "", true
	case "exec":
		var exec struct{ Command string }
		err := ssh.Unmarshal(payload, &exec)
		return exec.Command, err == nil
	}
	return "", false
}

// A session is what a client says and hears, over its connection.
type session struct {
	net.Conn
	channel ssh.Channel
	until   time.Time // for what is written
	once    sync.Once
}

func (c *session) Read(b []byte) (int, error) { return c.channel.Read(b) }

func (c *session) SetWriteDeadline(t time.Time) error {
	c.until = t
	return nil
}

// Write ends the connection when the client takes nothing. A deadline of the
// connection would not: it is the channel's window that is full.
func (c *session) Write(b []byte) (int, error) {
	defer time.AfterFunc(time.Until(c.until), func() { c.Conn.Close() }).Stop()
	return c.channel.Write(b)
}

// lingering is for the client to close the connection, when it has read all.
const lingering = 5 * time.Second

// Close ends the command well: whether all was well, rsync says itself.
func (c *session) Close() error { return c.end(0) }

func (c *session) end(status uint32) (err error) {
	c.once.Do(func() {
		time.AfterFunc(lingering, func() { c.Conn.Close() })
		_, sent := c.channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{status}))
		err = errors.Join(sent, c.channel.Close())
	})
	return err
}

// refuse says what there is.
func (c *session) refuse() {
	fmt.Fprintln(c.channel.Stderr(), "rookery: images by rsync are here and nothing else: rsync -aHAX -e ssh HOST::NAME-TAG/ DIR")
	c.end(1)
}
