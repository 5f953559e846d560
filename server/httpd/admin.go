package httpd

import (
	"context"
	"encoding/json"
	"mime"
	"net/http"
	"strconv"

	"rookery/server/fleet"
	"rookery/wire"
)

// maxRecord bounds one node's record, maxApply a whole site's in JSON.
const (
	maxRecord = 1 << 20
	maxApply  = 2 * fleet.MaxApply
)

func (s *Server) nodes(w http.ResponseWriter, _ *http.Request) { answer(w, s.Fleet.Nodes()) }

func (s *Server) node(w http.ResponseWriter, r *http.Request) {
	v, err := s.Fleet.Node(r.Context(), r.PathValue("name"))
	s.reply(w, r, v, err)
}

func (s *Server) putNode(w http.ResponseWriter, r *http.Request) {
	n := fleet.Node{Name: r.PathValue("name")}
	if err := decode(w, r, &n); err != nil {
		s.refuse(w, r, err)
		return
	}
	if name := r.PathValue("name"); n.Name != name {
		s.refuse(w, r, fleet.Problems{{Record: "node " + name, Key: "name", Reason: "is another in the record: " + strconv.Quote(n.Name)}})
		return
	}
	s.replyNode(w, r, n.Name, s.Fleet.Put(r.Context(), n))
}

// editNode changes the keys that the body has; null takes a value away.
func (s *Server) editNode(w http.ResponseWriter, r *http.Request) {
	b, err := body(w, r, maxRecord)
	if err == nil {
		err = s.Fleet.Edit(r.Context(), r.PathValue("name"), func(n *fleet.Node) error { return strict(b, n) })
	}
	s.replyNode(w, r, r.PathValue("name"), err)
}

func (s *Server) deleteNode(w http.ResponseWriter, r *http.Request) {
	s.reply(w, r, struct{}{}, s.Fleet.Delete(r.Context(), r.PathValue("name")))
}

func (s *Server) accept(w http.ResponseWriter, r *http.Request) {
	var n fleet.Node
	err := decode(w, r, &n)
	if err == nil {
		err = s.Fleet.Accept(r.Context(), r.PathValue("mac"), n)
	}
	s.replyNode(w, r, n.Name, err)
}

func (s *Server) install(w http.ResponseWriter, r *http.Request) {
	s.replyNode(w, r, r.PathValue("name"), s.Fleet.Install(r.Context(), r.PathValue("name")))
}

func (s *Server) plan(w http.ResponseWriter, r *http.Request) {
	p, err := s.Fleet.Plan(r.Context(), r.PathValue("name"))
	s.reply(w, r, p, err)
}

func (s *Server) groups(w http.ResponseWriter, _ *http.Request) { answer(w, s.Fleet.Groups()) }

func (s *Server) deleteGroup(w http.ResponseWriter, r *http.Request) {
	s.reply(w, r, struct{}{}, s.Fleet.DeleteGroup(r.Context(), r.PathValue("name")))
}

// records are those of ?kind= and ?name=, or all.
func (s *Server) records(w http.ResponseWriter, r *http.Request) {
	all, err := s.Fleet.Records(r.URL.Query().Get("kind"), r.URL.Query().Get("name"))
	s.reply(w, r, all, err)
}

func (s *Server) needed(w http.ResponseWriter, r *http.Request) {
	needed, err := s.Fleet.Needed(r.Context())
	s.reply(w, r, needed, err)
}

// apply takes YAML documents, named by ?file=, or as JSON several such files.
func (s *Server) apply(do func(context.Context, ...fleet.File) ([]string, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		b, err := body(w, r, maxApply)
		if err != nil {
			s.refuse(w, r, err)
			return
		}
		files := []fleet.File{{Name: r.URL.Query().Get("file"), Data: string(b)}}
		if kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); kind == "application/json" {
			files = nil
			if err := strict(b, &files); err != nil {
				s.refuse(w, r, err)
				return
			}
		}
		done, err := do(r.Context(), files...)
		s.reply(w, r, applied{done}, err)
	}
}

type applied struct {
	Done []string `json:"done"`
}

// events writes events as JSON lines: ?node= of one node, ?after= only those
// with a greater number, ?follow=1 for ever.
func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	node, follow := q.Get("node"), q.Get("follow") != "" && q.Get("follow") != "0"
	after := int64(0)
	if text := q.Get("after"); text != "" {
		var err error
		if after, err = strconv.ParseInt(text, 10, 64); err != nil {
			s.refuse(w, r, &clientError{http.StatusBadRequest, err})
			return
		}
	}
	if node != "" {
		if _, err := s.Fleet.Node(r.Context(), node); err != nil {
			s.refuse(w, r, err)
			return
		}
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out, flush := json.NewEncoder(w), http.NewResponseController(w).Flush
	flush() // a follower sees at once that it is heard
	for {
		events, more := s.Fleet.Events(node, after)
		for _, e := range events {
			if out.Encode(e) != nil {
				return // the client is gone
			}
			after = e.N
		}
		if len(events) > 0 {
			flush()
			continue
		}
		if !follow {
			return
		}
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
}

func (s *Server) replyNode(w http.ResponseWriter, r *http.Request, name string, err error) {
	var v fleet.View
	if err == nil {
		v, err = s.Fleet.Node(r.Context(), name)
	}
	s.reply(w, r, v, err)
}

func (s *Server) reply(w http.ResponseWriter, r *http.Request, v any, err error) {
	if err != nil {
		s.refuse(w, r, err)
		return
	}
	answer(w, v)
}

func decode(w http.ResponseWriter, r *http.Request, v any) error {
	b, err := body(w, r, maxRecord)
	if err != nil {
		return err
	}
	return strict(b, v)
}

func strict(b []byte, v any) error {
	if err := wire.Strict(b, v); err != nil {
		return &clientError{http.StatusBadRequest, err}
	}
	return nil
}

func answer(w http.ResponseWriter, v any) { write(w, http.StatusOK, v) }

func write(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v) // a client that is gone need not hear it
}
