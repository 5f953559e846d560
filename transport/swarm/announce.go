package swarm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anacrolix/torrent/bencode"

	"rookery/transport/swarm/rules"
)

const (
	announceFor = 20 * time.Second       // for one announce, on a slow machine
	goodbyeFor  = 2 * time.Second        // for the last one
	breath      = 500 * time.Millisecond // between an answer with news and the next announce
	retryFirst  = 2 * time.Second        // after an announce that failed, twice that after the next
	retryMost   = 8 * time.Second
	longest     = time.Minute // between two announces
	maxReply    = 64 << 10    // bytes of a tracker's answer
	maxHeaders  = 16 << 10    // before them
	maxTold     = 200         // peers taken from it
)

// trackerClient bounds what a tracker can make us read before its answer.
func trackerClient(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: dial, MaxResponseHeaderBytes: maxHeaders}}
}

// announceLoop tells a tracker how far we are and learns who else is there,
// until ctx ends. A Rookery tracker is asked again at once, and holds its answer
// until somebody comes; any other says how often. One that does not answer is
// asked again soon, since it may have lost its memory.
func (t *Torrent) announceLoop(ctx context.Context, tracker int, to string) {
	event, fails := "started", 0
	completed := t.pieces.Done()
	if t.pieces.Missing() == 0 {
		completed = nil // it always was
	}
	var last reply
	hold := time.Duration(0)
	for ctx.Err() == nil {
		begun := time.Now()
		r, err := t.ask(ctx, to, event, hold, completed)
		var wait time.Duration
		switch {
		case err == nil:
			event, fails = "", 0
			t.learn(r.peers)
			t.mu.Lock()
			t.heard[tracker] = heard{r.incomplete, time.Now().Add(2*r.interval + 10*time.Second), r.rack}
			t.stands(rackOf(t.heard))
			t.mu.Unlock()
			if t.seeder {
				r.wait = 0 // nodes come to it
			}
			wait = r.pause(last, hold, time.Since(begun))
			last, hold = r, r.wait
		case errors.Is(err, errCompleted):
			event, completed, hold = "completed", nil, 0
			continue
		case ctx.Err() != nil:
			continue
		default:
			if fails == 0 {
				t.peer.log.Warn("swarm: tracker", "err", err)
			}
			wait, hold = min(retryFirst<<min(fails, 10), retryMost), 0
			fails++
		}
		timer := time.NewTimer(wait + rand.N(wait/10+1)) // or those that came together would come together for ever
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-completed:
			event, completed, hold = "completed", nil, 0
		}
		timer.Stop()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), goodbyeFor)
	defer cancel()
	if fails == 0 {
		t.announce(ctx, to, "stopped", 0) // a courtesy: the tracker forgets us anyway
	}
}

var errCompleted = errors.New("complete by now")

// ask announces. An announce that the tracker may hold is given up with
// errCompleted when there is that to tell.
func (t *Torrent) ask(ctx context.Context, to, event string, hold time.Duration, completed <-chan struct{}) (reply, error) {
	ctx, cancel := context.WithTimeout(ctx, announceFor+hold)
	defer cancel()
	if hold == 0 {
		return t.announce(ctx, to, event, 0)
	}
	var r reply
	var err error
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		r, err = t.announce(ctx, to, event, hold)
	}()
	select {
	case <-answered:
		return r, err
	case <-completed:
		cancel()
		<-answered
		return reply{}, errCompleted
	}
}

// reply is what a tracker says.
type reply struct {
	interval   time.Duration
	wait       time.Duration // for which it would hold the next answer; 0: it would not
	incomplete int
	peers      []netip.AddrPort
	rack       string // where we stand
}

// pause is how long to wait after an answer, of which the one before was last,
// that the tracker was free to hold for some time and took that long. One that
// promises to wait for news and then answers at once without any is not asked
// again at once.
func (r reply) pause(last reply, hold, took time.Duration) time.Duration {
	news := slices.ContainsFunc(r.peers, func(p netip.AddrPort) bool { return !slices.Contains(last.peers, p) })
	if r.wait > 0 && (hold == 0 || took >= min(hold, r.interval) || news) {
		return breath
	}
	return r.interval
}

func (t *Torrent) announce(ctx context.Context, to, event string, hold time.Duration) (reply, error) {
	_, server, peers, uploaded := t.pieces.Transfer()
	values := url.Values{
		"info_hash":  {string(t.info.InfoHash[:])},
		"peer_id":    {string(t.id[:])},
		"port":       {strconv.Itoa(int(t.peer.port))},
		"uploaded":   {strconv.FormatInt(uploaded, 10)},
		"downloaded": {strconv.FormatInt(server+peers, 10)},
		"left":       {strconv.FormatInt(t.pieces.Left(), 10)},
		"compact":    {"1"},
	}
	if event != "" {
		values.Set("event", event)
	}
	if hold > 0 {
		values.Set("wait", strconv.Itoa(int(hold/time.Second)))
	}
	mark := "?"
	if strings.Contains(to, "?") {
		mark = "&"
	}
	// Some trackers take a plus for a plus.
	query := strings.ReplaceAll(values.Encode(), "+", "%20")
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, to+mark+query, nil)
	if err != nil {
		return reply{}, fmt.Errorf("tracker %s: %w", to, err)
	}
	resp, err := t.peer.http.Do(req)
	if err != nil {
		if cause, ok := err.(*url.Error); ok {
			err = cause.Err // without the long query
		}
		return reply{}, fmt.Errorf("tracker %s: %w", to, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return reply{}, fmt.Errorf("tracker %s: %w", to, err)
	}
	if resp.StatusCode != http.StatusOK {
		return reply{}, fmt.Errorf("tracker %s: %.80s", to, resp.Status)
	}
	r, err := parseReply(body)
	if err != nil {
		return reply{}, fmt.Errorf("tracker %s: %w", to, err)
	}
	return r, nil
}

// parseReply reads the compact form of an answer (BEP 23 and 7).
func parseReply(body []byte) (reply, error) {
	var in struct {
		Failure    string `bencode:"failure reason"`
		Interval   int64  `bencode:"interval"`
		Incomplete int64  `bencode:"incomplete"`
		Peers      string `bencode:"peers"`
		Peers6     string `bencode:"peers6"`
		Rack       string `bencode:"rack"`
		Wait       int64  `bencode:"wait"`
	}
	if err := bencode.Unmarshal(body, &in); err != nil {
		return reply{}, fmt.Errorf("answer: %.200s", err.Error()) // it quotes what it could not read
	}
	if in.Failure != "" {
		return reply{}, fmt.Errorf("it says %.200q", in.Failure)
	}
	r := reply{
		interval:   max(time.Second, seconds(in.Interval)),
		wait:       seconds(in.Wait),
		incomplete: int(min(max(0, in.Incomplete), math.MaxInt32)),
		rack:       in.Rack,
	}
	if len(r.rack) > rules.MaxRack {
		r.rack = ""
	}
	r.peers = append(addrs(in.Peers, 4), addrs(in.Peers6, 16)...)
	r.peers = r.peers[:min(maxTold, len(r.peers))]
	return r, nil
}

func seconds(n int64) time.Duration {
	return time.Duration(min(max(0, n), int64(longest/time.Second))) * time.Second
}

// addrs reads compact addresses of size bytes and a port each, and leaves out
// those nobody can be reached at.
func addrs(s string, size int) []netip.AddrPort {
	var out []netip.AddrPort
	for ; len(s) >= size+2; s = s[size+2:] {
		ip, _ := netip.AddrFromSlice([]byte(s[:size]))
		port := binary.BigEndian.Uint16([]byte(s[size : size+2]))
		if ip = ip.Unmap(); port != 0 && !ip.IsUnspecified() && !ip.IsMulticast() {
			out = append(out, netip.AddrPortFrom(ip, port))
		}
	}
	return out
}
