package multicast

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rookery/netnstest"
	"rookery/transport"
	"rookery/transport/transporttest"
	"rookery/wire"
)

// card is an interface that has groups: what is sent there is heard there, too.
const card = "wire"

func loop(t testing.TB) {
	t.Helper()
	exec.Command("ip", "link", "delete", card).Run() // of an earlier call
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"link", "add", card, "type", "veth", "peer", "end"},
		{"link", "set", "end", "up"},
		{"address", "add", "10.9.0.1/24", "dev", card},
		{"address", "add", "fd00::1/64", "dev", card, "nodad"},
		{"link", "set", card, "up"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
}

var families = map[string]wire.Multicast{
	"IPv4": {Group: "239.192.0.0/16", Port: 6882, Server: "10.9.0.1"},
	"IPv6": {Group: "ff15::1:0/112", Port: 6882, Server: "fd00::1"},
}

// send has a sender of content run until the test ends, and stop ends it earlier.
func send(t *testing.T, m wire.Multicast, info transport.Info, content []byte, d *Demand, change func(*Sender)) (stop func()) {
	t.Helper()
	group, err := GroupOf(m.Group, info.InfoHash, m.Rate)
	if err != nil {
		t.Fatal(err)
	}
	s := &Sender{
		Info: info, Layer: bytes.NewReader(content), Demand: d, Rate: 50 << 20, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Out: Outlet{From: netip.MustParseAddr(m.Server), Via: card, TTL: 1},
		To:  netip.AddrPortFrom(group, m.Port),
	}
	if change != nil {
		change(s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

func TestSource(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	for name, m := range families {
		t.Run(name, func(t *testing.T) {
			transporttest.Run(t, func(t *testing.T, info transport.Info, content []byte) transport.Source {
				send(t, m, info, content, &Demand{}, func(s *Sender) { s.Always = true })
				return &Source{Config: m, Alone: true, Via: card}
			})
		})
	}
}

// A relay passes datagrams on to a group of its own but for those to drop.
func relay(t *testing.T, m wire.Multicast, info transport.Info, drop func(size int) bool) (to wire.Multicast) {
	t.Helper()
	from, err := GroupOf(m.Group, info.InfoHash, m.Rate)
	if err != nil {
		t.Fatal(err)
	}
	to = m
	to.Port++
	in, err := listen(netip.AddrPortFrom(from, m.Port), netip.MustParseAddr(m.Server), card)
	if err != nil {
		t.Fatal(err)
	}
	out, err := Outlet{From: netip.MustParseAddr(m.Server), Via: card, TTL: 1}.Open()
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			err := in.read(func(batch [][]byte) {
				for _, b := range batch {
					if !drop(len(b)) {
						out.write(b, len(b), netip.AddrPortFrom(from, to.Port))
					}
				}
			})
			if err != nil {
				return // closed
			}
		}
	})
	t.Cleanup(func() { in.Close(); running.Wait(); out.Close() })
	return to
}

// The last datagrams of a pass say how many are to come.
func TestPassEnds(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	content, info := transporttest.Layer(t, 1, 1<<20)
	m := families["IPv4"]
	group, err := GroupOf(m.Group, info.InfoHash, m.Rate)
	if err != nil {
		t.Fatal(err)
	}
	in, err := listen(netip.AddrPortFrom(group, m.Port), netip.MustParseAddr(m.Server), card)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	send(t, m, info, content, &Demand{}, func(s *Sender) { s.Always, s.Rate = true, 4<<20 })
	var before header
	for before.pass < 3 {
		err := in.read(func(batch [][]byte) {
			for _, b := range batch {
				h, _, err := parse(b)
				if err != nil {
					t.Fatal(err)
				}
				switch {
				case before.sender == 0: // the first
				case h.seq != before.seq+1:
					t.Fatalf("datagram %d after %d", h.seq, before.seq)
				case h.pass != before.pass:
					if before.ends != 1 || h.ends != 0 {
						t.Errorf("pass %d begins with %+v after %+v", h.pass, h, before)
					}
				case before.ends == 1:
					t.Errorf("pass %d goes on with %+v after its end, %+v", h.pass, h, before)
				case before.ends > 0 && h.ends != before.ends-1, before.ends == 0 && h.ends > 0 && h.ends != endsWith:
					t.Errorf("%+v after %+v", h, before)
				}
				before = h
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// some is to drop a share, by chance.
func some(share float64) func(int) bool {
	chance := rand.New(rand.NewPCG(1, 2))
	return func(int) bool { return chance.Float64() < share }
}

// beyond is to drop what is more than so many bytes a second, with a queue of a tenth of one.
func beyond(rate float64) func(int) bool {
	const queue = 0.1
	began := time.Now()
	paid := 0.0 // seconds since
	return func(size int) bool {
		now := time.Since(began).Seconds()
		if paid = max(paid, now); paid > now+queue {
			return true
		}
		paid += float64(size) / rate
		return false
	}
}

// hears is a server that takes what nodes want, and says that it is sent.
func hears(t *testing.T, d *Demand) string { return answers(t, d, 1) }

// answers is a server that takes what nodes want, and says that so much is sent.
func answers(t *testing.T, d *Demand, size int64) string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		b.ReadFrom(r.Body)
		want, err := wire.DecodeWant(b.Bytes())
		if err != nil {
			t.Error(err)
		}
		d.Hear(want, time.Now())
		if size == 0 {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.WriteHeader(http.StatusAccepted)
		json.NewEncoder(w).Encode(wire.Sending{Size: size})
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func fetch(t *testing.T, s *Source, info transport.Info, content []byte) *transport.Pieces {
	t.Helper()
	store := transporttest.NewMemory(nil)
	p := transport.NewPieces(info, store)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.Fetch(ctx, p); err != nil {
		t.Fatalf("%v; %d of %d pieces missing", err, p.Missing(), len(info.Hashes))
	}
	if !bytes.Equal(store.Bytes(), content) {
		t.Fatal("other bytes arrived than were sent")
	}
	return p
}

// What is lost comes with rows that were not sent before, and hardly more than that is
// sent. Where nobody hears the node it comes with the next pass, whatever memory there is.
func TestLosses(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	const size = 8 << 20
	content, info := transporttest.Layer(t, 1, size)
	for _, percent := range []int{0, 1, 5, 30} {
		loss := float64(percent) / 100
		t.Run(fmt.Sprint(percent), func(t *testing.T) {
			m, d := families["IPv4"], &Demand{}
			to := relay(t, m, info, some(loss))
			var sent counter
			source := &Source{Config: to, Via: card, Alone: true, Wants: hears(t, d), Client: http.DefaultClient}
			sent.of = bytes.NewReader(content)
			stop := send(t, m, info, content, d, func(s *Sender) { s.Layer, s.Rate = &sent, 20<<20 })
			fetch(t, source, info, content)
			stop()
			t.Logf("%.2f copies of the blocks were begun", float64(sent.read)/size)
		})
		t.Run(fmt.Sprint(percent, " unheard, little memory"), func(t *testing.T) {
			m := families["IPv4"]
			to := relay(t, m, info, some(loss))
			send(t, m, info, content, &Demand{}, func(s *Sender) { s.Always, s.Rate = true, 40<<20 })
			fetch(t, &Source{Config: to, Via: card, Alone: true, Memory: 2 << 20}, info, content)
		})
	}
}

// One with a link of a fifth of the rate, and memory for a quarter of the layer, is
// sent what its link carries when no others are left: at the set rate it took 15 copies.
func TestSlow(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	const size, rate = 8 << 20, 10 << 20
	content, info := transporttest.Layer(t, 1, size)
	m, d := families["IPv4"], &Demand{}
	to := relay(t, m, info, beyond(rate/5))
	source := &Source{Config: to, Via: card, Alone: true, Memory: 2 << 20, Wants: hears(t, d), Client: http.DefaultClient}
	sent := counter{of: bytes.NewReader(content)}
	stop := send(t, m, info, content, d, func(s *Sender) { s.Layer, s.Rate = &sent, rate })
	fetch(t, source, info, content)
	stop()
	copies := float64(sent.read) / size
	t.Logf("%.2f copies of the blocks were begun", copies)
	if copies > 6 { // a small remainder of a block counts as one, too
		t.Errorf("%.1f copies were begun, want at most 6", copies)
	}
}

// A counter counts what is read.
type counter struct {
	of   *bytes.Reader
	read int64
}

func (c *counter) ReadAt(b []byte, off int64) (int, error) {
	c.read += int64(len(b))
	return c.of.ReadAt(b, off)
}

// Who comes in the middle has the rest of the pass, and then the beginning.
func TestLateJoiner(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	const size = 16 << 20
	content, info := transporttest.Layer(t, 1, size)
	m, d := families["IPv6"], &Demand{}
	wants := hears(t, d)
	send(t, m, info, content, d, func(s *Sender) { s.Rate = 10 << 20 })
	first := transport.NewPieces(info, transporttest.NewMemory(nil))
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() {
		s := &Source{Config: m, Via: card, Alone: true, Wants: wants, Client: http.DefaultClient}
		if err := s.Fetch(t.Context(), first); err != nil {
			t.Error(err)
		}
	})
	transporttest.Until(t, func() bool { return first.Missing() < len(info.Hashes)/2 })
	fetch(t, &Source{Config: m, Via: card, Alone: true, Wants: wants, Client: http.DefaultClient}, info, content)
}

// Two who send the same, one of them with smaller packets later on, are one.
func TestTwoSenders(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	content, info := transporttest.Layer(t, 1, 4<<20)
	m := families["IPv4"]
	for range 2 {
		send(t, m, info, content, &Demand{}, func(s *Sender) { s.Always, s.Rate = true, 20<<20 })
	}
	fetch(t, &Source{Config: m, Via: card, Alone: true}, info, content)
}

// Datagrams of others are not listened to. Those that bear the server's address
// cost the block that they are in, for as long as they come.
func TestForged(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	if out, err := exec.Command("ip", "address", "add", "10.9.0.66/24", "dev", card).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	content, info := transporttest.Layer(t, 1, 4<<20)
	wrong := make([]byte, len(content))
	m := families["IPv4"]
	forge := func(t *testing.T, from string) (stop func()) {
		return send(t, m, info, wrong, &Demand{}, func(s *Sender) {
			s.Always, s.Rate = true, 20<<20
			s.Out.From = netip.MustParseAddr(from)
		})
	}
	t.Run("from elsewhere", func(t *testing.T) {
		forge(t, "10.9.0.66")
		send(t, m, info, content, &Demand{}, func(s *Sender) { s.Always, s.Rate = true, 20<<20 })
		fetch(t, &Source{Config: m, Via: card, Alone: true}, info, content)
	})
	t.Run("from the server's address", func(t *testing.T) {
		stop := forge(t, m.Server)
		send(t, m, info, content, &Demand{}, func(s *Sender) { s.Always, s.Rate = true, 20<<20 })
		p := transport.NewPieces(info, transporttest.NewMemory(nil))
		var all sync.WaitGroup
		defer all.Wait()
		all.Go(func() {
			if err := (&Source{Config: m, Via: card, Alone: true}).Fetch(t.Context(), p); err != nil {
				t.Error(err)
			}
		})
		time.AfterFunc(500*time.Millisecond, stop)
	})
}

// Beside others the sender brings nearly everything, and they fill the holes:
// what is about to come is not theirs to fetch.
func TestHoles(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	loop(t)
	const size, loss = 8 << 20, 0.1
	content, info := transporttest.Layer(t, 1, size)
	m, d := families["IPv4"], &Demand{}
	to := relay(t, m, info, some(loss))
	send(t, m, info, content, d, func(s *Sender) { s.Rate = 4 << 20 })
	p := transport.NewPieces(info, transporttest.NewMemory(nil))
	ctx, stop := context.WithCancel(t.Context())
	var others sync.WaitGroup
	defer others.Wait()
	defer stop()
	source := &Source{Config: to, Via: card, Wants: hears(t, d), Client: http.DefaultClient}
	p.Expect(everything(p), false) // as Fetch does
	others.Go(func() {
		for ctx.Err() == nil {
			n, ok := p.Claim(func(n int) (int64, bool) { return rand.Int64(), true })
			if ok {
				at := int64(n) * info.PieceLength
				if err := p.Put(n, content[at:at+int64(info.PieceSize(n))], transport.FromPeer); err != nil {
					t.Error(err)
				}
			}
			wait(ctx, nil, 5*time.Millisecond) // quicker than the sender
		}
	})
	if err := source.Fetch(ctx, p); err != nil {
		t.Fatal(err)
	}
	if part := float64(p.Brought(transport.FromPeer)) / size; part == 0 || part > 0.2 {
		t.Errorf("others brought %.1f %%, want some, and at most 20", 100*part)
	} else {
		t.Logf("others brought %.1f %%", 100*part)
	}
}

// Who left because it lost much has nothing sent for itself when it comes back, and says
// what it lost until it knows better.
func TestWantAfterLosses(t *testing.T) {
	c, rows := rowsOf(t, inFour, 64<<20, false)
	now := time.Unix(100, 0)
	r := &reception{Source: &Source{lost: 0.8}, pieces: transport.NewPieces(c.info, transporttest.NewMemory(nil))}
	if r.asks() {
		t.Error("it asks before anything was heard")
	}
	if r.col = c; !r.asks() {
		t.Error("it does not ask when something is sent")
	}
	for seq := range 100 {
		c.add(header{seq: uint32(seq), last: 3}, rows[0][0], now)
		if w := r.want(now); seq < 10 && (w.Lost != 0.8 || w.Lacks != nil) {
			t.Errorf("after %d datagrams: %+v", seq+1, w)
		}
	}
	if w := r.want(now); w.Lost != 0 || w.Lacks == nil {
		t.Errorf("after 100 datagrams: %+v, want nothing lost", w)
	}
}

// A round trip is what becomes of a request.
type roundTrip func(*http.Request) (*http.Response, error)

func (r roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return r(req) }

// When the last datagram of a pass came, the node says at once what it lacks, and the others
// may be asked for it.
func TestPassIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, rows := rowsOf(t, inFour, 64<<20, false)
		p := transport.NewPieces(c.info, transporttest.NewMemory(nil))
		said := make(chan time.Time, 1)
		client := &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
			said <- time.Now()
			return &http.Response{StatusCode: http.StatusNoContent, Body: http.NoBody}, nil
		})}
		r := &reception{Source: &Source{Wants: "http://192.0.2.1/multicast", Client: client}, pieces: p, col: c, memory: 64 << 20,
			poke: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
		copy(r.layer[:], c.info.InfoHash[:])
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		defer running.Wait()
		defer func() { stop(); <-said }() // that it wants no more
		running.Go(func() { r.look(ctx) })
		running.Go(func() { _ = r.say(ctx) })
		<-said // at the start
		hear := func(row int, ends uint16) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.one(append(appendHeader(nil, header{layer: r.layer, seq: uint32(row), pass: 1, row: uint16(row), last: 3, ends: ends}), rows[0][row]...), time.Now())
		}
		hear(0, 0)
		signal(r.turn) // it need not wait until it looks
		synctest.Wait()
		if !p.Streams() {
			t.Error("nothing streams in the middle of a pass")
		}
		hear(1, 1)
		synctest.Wait()
		if p.Streams() {
			t.Error("something streams when the pass is over")
		}
		over := time.Now()
		if took := (<-said).Sub(over); took > endAfter {
			t.Errorf("it says what it lacks after %s, want %s at most", took, endAfter)
		}
	})
}
