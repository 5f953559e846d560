package multicast

import (
	"testing"
	"time"

	"rookery/wire"
)

func TestPace(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	const set = 1000
	// One that says every 5 s what it loses.
	loses := func(lost float64, now int) client {
		return client{Want: wire.Want{Lost: lost, Lacks: []byte{255}}, at: at(now), before: at(now - 5)}
	}
	slowed := pace{rate: 200, since: at(100)}
	for _, tt := range []struct {
		name    string
		pace    pace
		clients []client
		now     int
		want    pace
	}{
		{name: "nobody", pace: slowed, now: 120},
		{name: "one that has not said", clients: []client{{at: at(10)}}, now: 10},
		{name: "never as slow as the slowest", clients: []client{loses(0, 10), loses(0.8, 10)}, now: 10},
		{name: "what is lost otherwise", clients: []client{loses(0.3, 10), loses(0.35, 10)}, now: 10},
		{name: "the slow are left", clients: []client{loses(0.8, 10), loses(0.9, 10)}, now: 10, want: pace{rate: 200, since: at(10)}},
		{name: "a slow one comes back", clients: []client{{Want: wire.Want{Lost: 0.8}, at: at(10)}}, now: 10, want: pace{rate: 200, since: at(10)}},
		{name: "a slow one comes back to others", clients: []client{loses(0, 10), {Want: wire.Want{Lost: 0.8}, at: at(10)}}, now: 10},
		{name: "hardly anything arrives", clients: []client{loses(1, 10)}, now: 10, want: pace{rate: 31, since: at(10)}},
		{name: "it was lost before", pace: slowed, clients: []client{loses(0.8, 105)}, now: 105, want: slowed},
		{name: "it is no better", pace: slowed, clients: []client{loses(0.8, 115)}, now: 115, want: pace{since: at(115), stays: at(175)}},
		{name: "and is not tried for a while", pace: pace{since: at(115), stays: at(175)}, clients: []client{loses(0.8, 170)}, now: 170,
			want: pace{since: at(115), stays: at(175)}},
		{name: "until then", pace: pace{since: at(115), stays: at(175)}, clients: []client{loses(0.8, 175)}, now: 175,
			want: pace{rate: 200, since: at(175)}},
		{name: "just right", pace: slowed, clients: []client{loses(0.1, 115)}, now: 115, want: slowed},
		{name: "a little more", pace: slowed, clients: []client{loses(0.01, 115), loses(0.5, 115)}, now: 115, want: pace{rate: 220, since: at(115)}},
		{name: "as much as is set", pace: pace{rate: 950, since: at(100)}, clients: []client{loses(0, 115)}, now: 115, want: pace{since: at(115)}},
		{name: "one more", pace: slowed, clients: []client{loses(0, 105), {at: at(106)}}, now: 106, want: pace{since: at(106)}},
	} {
		if got := tt.pace.next(set, tt.clients, at(tt.now)); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}
