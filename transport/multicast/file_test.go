package multicast

import (
	"bytes"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"rookery/netnstest"
	"rookery/transport"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// All who want a file have it from one that is sent, whatever is lost on the way.
func TestFile(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	const limit = 1 << 20
	content, _ := transporttest.Layer(t, 1, 300_001)
	digest := wire.DigestOf(content)
	info := transport.InfoOf(digest, int64(len(content)))
	source := func(m wire.Multicast, d *Demand, size int64) *Source {
		return &Source{Config: m, Via: card, Alone: true, Wants: answers(t, d, size), Client: http.DefaultClient}
	}
	wantsNone := func(t *testing.T, d *Demand) {
		t.Helper()
		if n, _ := d.Clients(time.Now()); n != 0 {
			t.Errorf("%d nodes want it still", n)
		}
	}
	for name, m := range families {
		t.Run(name, func(t *testing.T) {
			var d Demand
			to := relay(t, m, info, some(0.3))
			s := source(to, &d, info.Length)
			sent := counter{of: bytes.NewReader(content)}
			var all sync.WaitGroup
			defer all.Wait()
			for range 5 {
				all.Go(func() {
					b, err := s.File(t.Context(), digest, limit)
					if err != nil || !bytes.Equal(b, content) {
						t.Errorf("%d bytes, %v, want %d", len(b), err, len(content))
					}
				})
			}
			transporttest.Until(t, func() bool { n, _ := d.Clients(time.Now()); return n == 5 })
			stop := send(t, m, info, content, &d, func(s *Sender) { s.Layer, s.Rate = &sent, 2<<20 })
			all.Wait()
			stop()
			wantsNone(t, &d)
			if most := int64(4 * len(content)); sent.read > most {
				t.Errorf("%d bytes were sent to 5 nodes, want at most %d", sent.read, most)
			}
		})
	}
	for _, tt := range []struct {
		name  string
		size  int64 // that the server says
		sends []byte
		want  string
	}{
		{"too few want it", 0, nil, "not sent to a group"},
		{"too large", limit + 1, nil, "1048577 bytes, limit 1048576"},
		{"nothing comes", info.Length, nil, "0 of 300001 bytes in 2s"},
		{"something else comes", info.Length, make([]byte, len(content)), "0 of 300001 bytes in 2s"},
		{"of another size", info.Length - 5, content, "0 of 299996 bytes in 2s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var d Demand
			m := families["IPv4"]
			if tt.sends != nil {
				send(t, m, info, tt.sends, &Demand{}, func(s *Sender) { s.Always = true })
			}
			_, err := source(m, &d, tt.size).File(t.Context(), digest, limit)
			if err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, ErrNotSent) != (tt.size == 0) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			wantsNone(t, &d)
		})
	}
}
