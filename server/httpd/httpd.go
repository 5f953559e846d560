// Package httpd is the server's HTTP: boot files and layers for machines, the
// API of their agents, and the API of those who look after them. Handlers read,
// ask the fleet or the image store, and write.
package httpd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"rookery/boot/netboot"
	images "rookery/image/store"
	"rookery/server/fleet"
	"rookery/transport"
	"rookery/wire"
)

// A Server answers for a fleet and an image store. All of it is needed, if not said otherwise.
type Server struct {
	Fleet   *fleet.Fleet
	Blobs   func(context.Context, wire.Digest) (images.Blob, error) // the image store's
	Egress  *transport.Limiter                                      // of layers and what belongs to them; nil: no limit
	Giver   func(context.Context, wire.Digest) netip.AddrPort       // waits for a node that passes a torrent on; the zero value is this server
	Trees   func(context.Context, wire.Digest) (wire.Tree, error)   // of a manifest's image, by rsync
	Boot    fs.FS                                                   // has netboot.FileKernel, netboot.FileInitramfs
	Tracker http.Handler                                            // of announce and scrape
	Want    func(wire.Want) (size int64, err error)                 // takes what nodes say of multicast; 0: it is not sent yet; nil: there is none
	Site    netboot.Site
	Log     *slog.Logger
}

// Routes are all routes there are. Public is for plain HTTP: all it serves is
// public or hangs on a signature. Agent is for HTTPS. Admin may do anything,
// and is for a socket that nobody else can open.
func (s *Server) Routes() (public, agent, admin http.Handler) {
	p := http.NewServeMux()
	p.HandleFunc("GET /healthz", s.health)
	p.HandleFunc("GET "+netboot.PathBoot+netboot.FileScript, s.bootScript)
	p.HandleFunc("GET "+netboot.PathBootOf+"{mac}/{file}", s.bootFileOf)
	p.HandleFunc("GET "+netboot.PathBoot+"{file...}", s.bootFile)
	p.HandleFunc("GET "+wire.PathManifests+"{digest}", s.blob("application/vnd.oci.image.manifest.v1+json"))
	p.HandleFunc("GET "+wire.PathTorrents+"{digest}", s.torrent)
	p.HandleFunc("GET "+wire.PathLayers+"{digest}", s.blob("application/vnd.oci.image.layer.v1.tar+zstd"))
	p.HandleFunc("POST "+wire.PathTrees+"{digest}", s.tree)
	p.Handle("GET "+wire.PathAnnounce, s.Tracker)
	p.Handle("GET "+wire.PathScrape, s.Tracker)
	p.HandleFunc("POST "+wire.PathMulticast, s.want)

	g := http.NewServeMux()
	g.HandleFunc("GET /healthz", s.health)
	g.HandleFunc("POST "+wire.PathHello, s.hello)
	g.HandleFunc("GET "+wire.PathScript, s.script)
	g.HandleFunc("POST "+wire.PathEvents, s.report)

	a := http.NewServeMux()
	a.HandleFunc("GET /v1/healthz", s.health)
	a.HandleFunc("GET /v1/nodes", s.nodes)
	a.HandleFunc("GET /v1/nodes/{name}", s.node)
	a.HandleFunc("PUT /v1/nodes/{name}", s.putNode)
	a.HandleFunc("PATCH /v1/nodes/{name}", s.editNode)
	a.HandleFunc("DELETE /v1/nodes/{name}", s.deleteNode)
	a.HandleFunc("POST /v1/nodes/{mac}/accept", s.accept)
	a.HandleFunc("POST /v1/nodes/{name}/install", s.install)
	a.HandleFunc("GET /v1/nodes/{name}/plan", s.plan)
	a.HandleFunc("GET /v1/groups", s.groups)
	a.HandleFunc("DELETE /v1/groups/{name}", s.deleteGroup)
	a.HandleFunc("GET /v1/images/needed", s.needed)
	a.HandleFunc("POST "+wire.PathTrees+"{digest}", s.tree)
	a.HandleFunc("GET /v1/records", s.records)
	a.HandleFunc("POST /v1/apply", s.apply(s.Fleet.Apply))
	a.HandleFunc("POST /v1/diff", s.apply(s.Fleet.Diff))
	a.HandleFunc("GET /v1/events", s.events)

	return patient(p), patient(g), patient(a)
}

func (s *Server) health(w http.ResponseWriter, _ *http.Request) {
	answer(w, map[string]bool{"ok": true})
}

// bootScript tells iPXE whether this machine starts the agent or its own disk.
func (s *Server) bootScript(w http.ResponseWriter, r *http.Request) {
	mac, uuid, err := netboot.ParseQuery(r.URL.RawQuery)
	if err != nil {
		s.refuse(w, r, &clientError{http.StatusBadRequest, err})
		return
	}
	host, _ := s.Fleet.Host(mac, uuid)
	n := netboot.Node{MAC: mac, Name: host.Name, Local: host.Next == wire.Local}
	script, err := netboot.Script(n, s.Site)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	s.Log.Info("boot script", "client", mac, "node", n.Name, "local", n.Local)
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	io.WriteString(w, script)
}

// bootFileOf denies a boot program to a machine that starts from its own disk:
// firmware that boots by HTTP takes that at once for a reason to go on to it.
func (s *Server) bootFileOf(w http.ResponseWriter, r *http.Request) {
	mac, err := netboot.ParseMAC(r.PathValue("mac"))
	if err != nil {
		s.refuse(w, r, &clientError{http.StatusBadRequest, err})
		return
	}
	if host, _ := s.Fleet.Host(mac, ""); host.Next == wire.Local {
		s.Log.Info("boot program denied", "client", mac, "node", host.Name, "local", true)
		http.NotFound(w, r)
		return
	}
	s.bootFile(w, r)
}

func (s *Server) bootFile(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("file")
	f, err := s.Boot.Open(name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrInvalid) {
			s.Log.Error("boot file", "file", name, "err", err)
		}
		http.NotFound(w, r)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	content, seeks := f.(io.ReadSeeker)
	if err != nil || !st.Mode().IsRegular() || !seeks {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Cache-Control", "no-cache") // a new initramfs has the same name
	http.ServeContent(w, r, "", st.ModTime(), content)
}

// blob serves what the image store knows by its digest; it never changes.
func (s *Server) blob(contentType string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		d := wire.Digest(r.PathValue("digest"))
		if err := d.Check(); err != nil {
			s.refuse(w, r, &clientError{http.StatusNotFound, err})
			return
		}
		b, err := s.Blobs(r.Context(), d)
		if err != nil {
			if errors.Is(err, images.ErrNotFound) {
				err = &clientError{http.StatusNotFound, err}
			}
			s.refuse(w, r, err)
			return
		}
		defer b.Close()
		h := w.Header()
		h.Set("Content-Type", contentType)
		h.Set("Cache-Control", "public, max-age=31536000, immutable")
		h.Set("ETag", `"`+string(d)+`"`)
		content, seeks := b.(io.ReadSeeker) // a file: the kernel sends it
		if !seeks {
			content = io.NewSectionReader(b, 0, b.Size())
		}
		http.ServeContent(&cappedWriter{w, r.Context(), s.Egress}, r, "", time.Time{}, content)
	}
}

// torrent gives a torrent file, or names a node that has it to who takes it from there.
func (s *Server) torrent(w http.ResponseWriter, r *http.Request) {
	if r.URL.RawQuery == wire.FromNodes {
		d := wire.Digest(r.PathValue("digest"))
		if node := s.Giver(r.Context(), d); node.IsValid() {
			http.Redirect(w, r, "http://"+node.String()+wire.PathTorrents+string(d), http.StatusTemporaryRedirect)
			return
		}
	}
	s.blob("application/x-bittorrent")(w, r)
}

// tree has an image's files made ready, whoever asks: who can name a manifest by
// its digest has been told of it, and there are only so many.
func (s *Server) tree(w http.ResponseWriter, r *http.Request) {
	d := wire.Digest(r.PathValue("digest"))
	err := d.Check()
	if err != nil {
		s.refuse(w, r, &clientError{http.StatusNotFound, err})
		return
	}
	t, err := s.Trees(r.Context(), d)
	if errors.Is(err, images.ErrNotFound) {
		err = &clientError{http.StatusNotFound, err}
	}
	s.reply(w, r, t, err)
}

func (s *Server) hello(w http.ResponseWriter, r *http.Request) {
	b, err := body(w, r, wire.MaxHello)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	h, err := wire.DecodeHello(b)
	if err != nil {
		s.refuse(w, r, &clientError{http.StatusBadRequest, err})
		return
	}
	welcome, err := s.Fleet.Hello(r.Context(), h)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	answer(w, welcome)
}

func (s *Server) script(w http.ResponseWriter, r *http.Request) {
	sealed, err := s.Fleet.Script(r.Context(), bearer(r))
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(sealed)
}

func (s *Server) report(w http.ResponseWriter, r *http.Request) {
	b, err := body(w, r, wire.MaxEvents)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	events, err := wire.DecodeEvents(b)
	if err != nil {
		s.refuse(w, r, &clientError{http.StatusBadRequest, err})
		return
	}
	if err := s.Fleet.Report(r.Context(), bearer(r), events); err != nil {
		s.refuse(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// want hears a node out that wants a layer by multicast.
func (s *Server) want(w http.ResponseWriter, r *http.Request) {
	b, err := body(w, r, wire.MaxWant)
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	want, err := wire.DecodeWant(b)
	if err != nil {
		s.refuse(w, r, &clientError{http.StatusBadRequest, err})
		return
	}
	if s.Want == nil {
		http.NotFound(w, r)
		return
	}
	size, err := s.Want(want)
	switch {
	case err != nil:
		s.refuse(w, r, &clientError{http.StatusNotFound, err})
	case size > 0:
		write(w, http.StatusAccepted, wire.Sending{Size: size})
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

func bearer(r *http.Request) string {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return ""
	}
	return token
}

// A clientError is the client's fault.
type clientError struct {
	status int
	err    error
}

func (e *clientError) Error() string { return e.err.Error() }
func (e *clientError) Unwrap() error { return e.err }

// refuse answers with an error. What is our own fault is logged.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	status := statusOf(err)
	if status >= http.StatusInternalServerError {
		s.Log.Error("request", "client", r.RemoteAddr, "path", r.URL.Path, "err", err)
	}
	write(w, status, map[string]string{"error": err.Error()})
}

func statusOf(err error) int {
	var (
		client   *clientError
		large    *http.MaxBytesError
		problems fleet.Problems
	)
	switch {
	case errors.As(err, &client):
		return client.status
	case errors.As(err, &large):
		return http.StatusRequestEntityTooLarge
	case errors.As(err, &problems):
		return http.StatusUnprocessableEntity
	case errors.Is(err, fleet.ErrToken):
		return http.StatusUnauthorized
	case errors.Is(err, fleet.ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, fleet.ErrConflict):
		return http.StatusConflict
	}
	return http.StatusInternalServerError
}

// body reads all of a request's body, at most that many bytes and not for ever.
func body(w http.ResponseWriter, r *http.Request, most int64) ([]byte, error) {
	http.NewResponseController(w).SetReadDeadline(bodyDeadline())
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if err != nil {
		var large *http.MaxBytesError
		if !errors.As(err, &large) {
			err = &clientError{http.StatusBadRequest, err}
		}
		return nil, fmt.Errorf("body: %w", err)
	}
	return b, nil
}
