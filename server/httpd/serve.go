package httpd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/netutil"

	"rookery/transport"
)

// What a client can cost. Writing has no limit as a whole, since layers are
// large and followers stay: it has to go on.
const (
	headerTime   = 10 * time.Second
	idleTime     = 75 * time.Second
	bodyTime     = 60 * time.Second
	writeTime    = 60 * time.Second // for each writeChunk
	writeChunk   = 4 << 20
	drainTime    = 5 * time.Second // for a body that nobody read
	graceTime    = 3 * time.Second // for answers under way, when the server stops
	maxHeader    = 16 << 10
	maxConnected = 16384 // of each listener
)

// Serve answers what comes in at ln until ctx ends, and closes ln.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // what clients do wrong
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(netutil.LimitListener(ln, maxConnected)) }()
	select {
	case err := <-ended:
		return fmt.Errorf("%s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceTime)
	defer cancel()
	err := server.Shutdown(grace)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close() // layers are large; their readers ask again
	}
	<-ended
	return err
}

func bodyDeadline() time.Time { return time.Now().Add(bodyTime) }

// patient lets a client take as long as it likes, as long as it takes some.
func patient(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		// net/http reads what is left of a body after the handler.
		defer func() { control.SetReadDeadline(time.Now().Add(drainTime)) }()
		h.ServeHTTP(&patientWriter{w, control}, r)
	})
}

type patientWriter struct {
	http.ResponseWriter
	control *http.ResponseController
}

func (w *patientWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader sets the deadline also for answers without a body: that of an
// earlier request on this connection may be over.
func (w *patientWriter) WriteHeader(status int) {
	w.control.SetWriteDeadline(time.Now().Add(writeTime))
	w.ResponseWriter.WriteHeader(status)
}

func (w *patientWriter) Write(b []byte) (int, error) {
	w.control.SetWriteDeadline(time.Now().Add(writeTime))
	return w.ResponseWriter.Write(b)
}

// ReadFrom keeps the way to sendfile(2) open: it hands files on in pieces, each
// with a deadline of its own.
func (w *patientWriter) ReadFrom(r io.Reader) (total int64, err error) {
	limited, ok := r.(*io.LimitedReader) // as http.ServeContent has it
	if !ok {
		return io.Copy(struct{ io.Writer }{w}, r)
	}
	for limited.N > 0 && err == nil {
		w.control.SetWriteDeadline(time.Now().Add(writeTime))
		var n int64
		n, err = io.CopyN(w.ResponseWriter, limited.R, min(limited.N, writeChunk))
		limited.N -= n
		total += n
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return total, err
}

// A cappedWriter keeps to a limit that others share.
type cappedWriter struct {
	http.ResponseWriter
	ctx   context.Context
	limit *transport.Limiter
}

// portion is sent at a time where there is a limit.
const portion = 64 << 10

func (w *cappedWriter) Write(b []byte) (int, error) {
	if err := w.limit.Wait(w.ctx, len(b)); err != nil {
		return 0, err
	}
	return w.ResponseWriter.Write(b)
}

// ReadFrom is for files, which the kernel sends.
func (w *cappedWriter) ReadFrom(r io.Reader) (total int64, err error) {
	limited, ok := r.(*io.LimitedReader) // as http.ServeContent has it
	if !ok || w.limit == nil {
		return io.Copy(w.ResponseWriter, r)
	}
	for limited.N > 0 {
		n := min(limited.N, portion)
		if err := w.limit.Wait(w.ctx, int(n)); err != nil {
			return total, err
		}
		n, err := io.CopyN(w.ResponseWriter, limited.R, n)
		limited.N -= n
		if total += n; err != nil {
			return total, err
		}
	}
	return total, nil
}
