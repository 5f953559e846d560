package swarmtests

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"rookery/lab"
	"rookery/server/fleet"
	"rookery/wire"
)

// Nodes whose transports are those of their groups, and a server whose swarm is
// closed: each ends with what it has, and the server knows how.
func TestSwitchesAreSeen(t *testing.T) {
	s := begin(t, 3*time.Minute)
	s.serve()
	s.on(s.server, "iptables", "--append", "INPUT", "--protocol", "tcp", "--dport", "6881", "--jump", "REJECT", "--reject-with", "tcp-reset")
	admin := &lab.Server{Program: s.data.Programs.Rookery, State: s.data.State}
	rookery := func(args ...string) string {
		t.Helper()
		out, err := admin.Run(s.ctx, args...)
		s.must(err)
		return out
	}
	var records strings.Builder
	var all []*member
	for i, transports := range []string{"bittorrent, http", "http", "bittorrent"} {
		name, mac := fmt.Sprintf("m%d", i+1), fmt.Sprintf("52:54:00:07:00:%02x", i+1)
		fmt.Fprintf(&records, "---\nkind: Group\nname: g%d\nimage: random\ntransports: [%s]\n", i+1, transports)
		fmt.Fprintf(&records, "---\nkind: Node\nname: %s\nmacs: [%q]\naddress: 10.7.0.%d/24\ngroups: [g%d]\n", name, mac, 61+i, i+1)
		n := s.member(name, fmt.Sprintf("10.7.0.%d", 61+i), s.data.Programs.Agent, "run", "--mac", mac,
			"--site", s.data.Site, "--api", "https://"+serverAddress+":443", "--http", siteURL, "--root", s.root(i))
		n.root = s.root(i)
		all = append(all, n)
	}
	file := s.path("site.yaml")
	s.must(os.WriteFile(file, []byte(records.String()), 0o600))
	rookery("apply", "-f", file)
	defer rookery("node", "rm", "m1", "m2", "m3") // the server's state is that of all stories

	s.install(all)
	s.done(all)
	var views []fleet.View
	for _, n := range all {
		select {
		case <-n.Off():
		case <-s.ctx.Done():
			t.Fatalf("%s does not end", n.Name)
		}
		var v fleet.View
		s.must(json.Unmarshal([]byte(rookery("node", "show", n.Name, "-o", "json")), &v))
		if v.Next != wire.Local || v.Error != nil {
			t.Errorf("%s is not installed: next %s, %+v", n.Name, v.Next, v.Error)
		}
		s.note("%s: %d bytes from the server, %d from others: %+v", n.Name, v.Fetch.FromServer, v.Fetch.FromPeers, v.Turns)
		views = append(views, v)
	}
	const why = "http joins bittorrent: no new bytes for 20s (layer "
	if turns := views[0].Turns; len(turns) == 0 || !strings.HasPrefix(turns[0].Text, why) || turns[0].Time.IsZero() {
		t.Errorf("the turns of m1: %+v, want %q and when", turns, why)
	}
	if len(views[1].Turns)+len(views[2].Turns) > 0 {
		t.Errorf("with one source alone: %+v and %+v", views[1].Turns, views[2].Turns)
	}
	if views[1].Fetch.FromPeers > 0 || views[2].Fetch.FromServer > 0 {
		t.Errorf("m2 has %d bytes from others, m3 %d from the server", views[1].Fetch.FromPeers, views[2].Fetch.FromServer)
	}
	for format, want := range map[string]string{"table": why, "yaml": "text: 'http joins bittorrent: no new bytes for 20s"} {
		if out := rookery("node", "show", "m1", "-o", format); !strings.Contains(out, want) {
			t.Errorf("node show -o %s says nothing of it:\n%s", format, out)
		}
	}
	if out := rookery("node", "show", "m1"); !strings.Contains(out, "bittorrent, http (group g1)") {
		t.Errorf("node show does not say where the transports are from:\n%s", out)
	}
	if out := rookery("events", "m1"); !strings.Contains(out, "switched "+why) {
		t.Errorf("events do not tell of it:\n%s", out)
	}
}
