package swarm

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/anacrolix/torrent/bencode"
)

const (
	announceFor = 20 * time.Second // for one announce, on a slow machine
	goodbyeFor  = 2 * time.Second  // for the last one
	maxReply    = 64 << 10         // bytes of a tracker's answer
	maxTold     = 200              // peers taken from it
)

// announceLoop tells a tracker how far we are and learns who else is there,
// until ctx ends. The tracker says how often; one that does not answer is
// asked again soon, since it may have lost its memory.
func (t *Torrent) announceLoop(ctx context.Context, tracker int, to string) {
	event, failed := "started", false
	completed := t.pieces.Done()
	if t.pieces.Missing() == 0 {
		completed = nil // it always was
	}
	for ctx.Err() == nil {
		r, err := t.announce(ctx, to, event)
		wait := min(max(r.interval, time.Second), time.Minute)
		switch {
		case err == nil:
			event, failed = "", false
			t.learn(r.peers)
			t.mu.Lock()
			t.heard[tracker] = heard{r.incomplete, time.Now().Add(2*wait + 10*time.Second)}
			t.mu.Unlock()
		case ctx.Err() == nil && !failed:
			failed = true
			t.peer.log.Warn("swarm: tracker", "err", err)
			fallthrough
		default:
			wait = 2 * time.Second
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-completed:
			event, completed = "completed", nil
		}
		timer.Stop()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), goodbyeFor)
	defer cancel()
	if !failed {
		t.announce(ctx, to, "stopped") // a courtesy: the tracker forgets us anyway
	}
}

// reply is what a tracker says.
type reply struct {
	interval   time.Duration
	incomplete int
	peers      []netip.AddrPort
}

func (t *Torrent) announce(ctx context.Context, to, event string) (reply, error) {
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
		return reply{}, fmt.Errorf("tracker %s: %s", to, resp.Status)
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
		Interval   int32  `bencode:"interval"`
		Incomplete int32  `bencode:"incomplete"`
		Peers      string `bencode:"peers"`
		Peers6     string `bencode:"peers6"`
	}
	if err := bencode.Unmarshal(body, &in); err != nil {
		return reply{}, err
	}
	if in.Failure != "" {
		return reply{}, fmt.Errorf("it says %.200q", in.Failure)
	}
	r := reply{
		interval:   time.Duration(in.Interval) * time.Second,
		incomplete: max(0, int(in.Incomplete)),
	}
	r.peers = append(addrs(in.Peers, 4), addrs(in.Peers6, 16)...)
	r.peers = r.peers[:min(maxTold, len(r.peers))]
	return r, nil
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
