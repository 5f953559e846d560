package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"rookery/server/fleet"
	"rookery/server/httpd"
)

// A Server is the rookery program with a state directory: its command line,
// and its server as a child that can be killed and started again.
type Server struct {
	Program string   // rookery
	State   string   // directory, made when it is not there
	Log     string   // file that what the server says is added to
	Flags   []string // of serve, after --state

	// Event, when not nil, sees every event of every node once, in order.
	Event func(fleet.NodeEvent)

	mu      sync.Mutex
	nodes   []fleet.View
	seen    int64         // number of the latest event
	changed chan struct{} // closed at the next change of nodes
	run     *serving
}

// serving is one life of the server.
type serving struct {
	cmd       *exec.Cmd
	ended     chan struct{} // closed when the process has ended, with why
	why       error
	following chan struct{} // closed when nobody reads its events any more
}

// Run runs one command of the program on the state directory and returns what
// it printed. The error has the program's last line.
func (s *Server) Run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, s.Program, append([]string{"--state", s.State}, args...)...)
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	err := cmd.Run()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	} else if err != nil {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(complaints.String()))
	}
	if err != nil {
		return out.String(), fmt.Errorf("rookery %s: %w", strings.Join(args, " "), err)
	}
	return out.String(), nil
}

// Start starts the server and returns when it answers.
func (s *Server) Start(ctx context.Context) error {
	log, err := os.OpenFile(s.Log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own
	cmd := exec.Command(s.Program, append([]string{"--state", s.State, "serve"}, s.Flags...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("server: %w", err)
	}
	run := &serving{cmd: cmd, ended: make(chan struct{}), following: make(chan struct{})}
	go func() {
		defer close(run.ended)
		run.why = fmt.Errorf("server ended: %s: %s", state(cmd.Wait()), s.lastWords())
	}()
	s.mu.Lock()
	s.run = run
	s.mu.Unlock()
	if err := s.ready(ctx, run); err != nil {
		close(run.following)
		return errors.Join(err, s.Kill())
	}
	go func() {
		defer close(run.following)
		s.follow() // ends with the server
	}()
	return nil
}

// ready waits until the server answers. It is a foreign process that says
// nothing when it listens, so it is asked again and again.
func (s *Server) ready(ctx context.Context, run *serving) error {
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		_, err := s.Admin().Nodes(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-again.C:
		case <-run.ended:
			return run.why
		case <-ctx.Done():
			return fmt.Errorf("server: no answer: %w: %w", context.Cause(ctx), err)
		}
	}
}

// Ended is closed when the running server has ended, which it never does by
// itself. Without a running server it is closed.
func (s *Server) Ended() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.run == nil {
		gone := make(chan struct{})
		close(gone)
		return gone
	}
	return s.run.ended
}

// Kill ends the server as kill -9 does, and waits for it. It is fine to kill
// a server that does not run.
func (s *Server) Kill() error { return s.end(os.Kill) }

// Stop asks the server to end and waits for it.
func (s *Server) Stop() error { return s.end(os.Interrupt) }

func (s *Server) end(sig os.Signal) error {
	s.mu.Lock()
	run := s.run
	s.run = nil
	s.mu.Unlock()
	if run == nil {
		return nil
	}
	run.cmd.Process.Signal(sig) // an error means that it has ended
	<-run.ended
	<-run.following
	if sig != os.Kill && !run.cmd.ProcessState.Success() {
		return run.why
	}
	return nil
}

func (s *Server) lastWords() string {
	said, err := os.ReadFile(s.Log)
	if err != nil {
		return err.Error()
	}
	return last(said)
}

// Admin is a client of the server's admin API.
func (s *Server) Admin() *httpd.Client { return httpd.Dial(filepath.Join(s.State, "admin.sock")) }

// follow reads the server's events until it is gone, and asks for the nodes
// after each.
func (s *Server) follow() {
	ctx := context.Background() // the server's end is what ends it
	s.mu.Lock()
	seen := s.seen
	s.mu.Unlock()
	s.Admin().Events(ctx, "", seen, true, func(e fleet.NodeEvent) error {
		if s.Event != nil {
			s.Event(e)
		}
		nodes, err := s.Admin().Nodes(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.seen = e.N
		if err == nil {
			s.nodes = nodes
		}
		s.change()
		return err
	})
}

// change lets go who waits in Until. Called by who holds mu.
func (s *Server) change() {
	if s.changed != nil {
		close(s.changed)
	}
	s.changed = make(chan struct{})
}

// Watch is the nodes as they were at the latest event, and a channel that is
// closed at the next one. It goes on over restarts of the server.
func (s *Server) Watch() ([]fleet.View, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return slices.Clone(s.nodes), s.changed
}

// Until waits until a node is as wanted and returns how it was then. The error
// says how it was last.
func (s *Server) Until(ctx context.Context, node string, wanted func(fleet.View) bool) (fleet.View, error) {
	for {
		nodes, changed := s.Watch()
		i := slices.IndexFunc(nodes, func(v fleet.View) bool { return v.Name == node })
		if i >= 0 && wanted(nodes[i]) {
			return nodes[i], nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if i < 0 {
				return fleet.View{}, fmt.Errorf("nothing heard of it: %w", context.Cause(ctx))
			}
			return nodes[i], fmt.Errorf("%s %s, %.0f %%: %w", nodes[i].Phase, nodes[i].State, nodes[i].Percent, context.Cause(ctx))
		}
	}
}
