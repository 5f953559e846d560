package swarmtests

import (
	"testing"
	"time"

	"rookery/wire"
)

// groups are what the server of a story sends to, at nearly the rate of its link.
var groups = wire.Multicast{Group: "239.192.0.0/16", Port: 6882, Server: serverAddress}

const sendRate = "2400kB" // of 2,500,000 bytes a second

func byMulticast(transports ...string) way {
	return way{transports: transports, groups: &groups, serve: []string{"--multicast-rate", sendRate}}
}

func TestMulticastAlone(t *testing.T) {
	s := beginBy(t, 2*time.Minute, byMulticast("multicast"))
	s.serve()
	s.install(s.nodes)
	s.done(s.nodes)
	s.within(ideal * 13 / 10)
	s.onceSent(1.1)
}

// onceSent checks that the server has sent no more than so many copies.
func (s *story) onceSent(most float64) {
	s.t.Helper()
	_, sent, err := s.server.host.Traffic()
	s.must(err)
	copies := float64(sent) / float64(s.data.Size)
	s.note("the server sent %.3f copies", copies)
	if copies > most {
		s.t.Errorf("the server sent %.2f copies, want at most %.2f", copies, most)
	}
}
