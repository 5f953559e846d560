package transport

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// What a Policy of three sources makes of what it sees, a line for each change.
// Time is in seconds, and everything before it is seen every second.
func TestCourse(t *testing.T) {
	refused := errors.New("refused")
	type change = func(*sight)
	bytes := func(s *sight) { s.arrived++ }
	from := func(i int) change {
		return func(s *sight) { s.arrived++; s.brought[i]++ }
	}
	fails := func(i int) change { return func(s *sight) { s.failed[i] = refused } }
	works := func(i int) change { return func(s *sight) { s.failed[i] = nil } }
	for _, tt := range []struct {
		name string
		of   int
		does map[int]change // from that second on, once
		each change         // every second
		from int            // of each
		to   int            // of each, 0: 120
		want string
	}{
		{name: "all goes well", of: 3, each: from(0), want: ""},
		{name: "bytes are a sign of life", of: 3, each: bytes, want: ""},
		{name: "nothing", of: 3, want: "20: 2 no new bytes for 20s|40: 3 no new bytes for 20s"},
		{name: "nothing, and only one", of: 1, want: ""},
		{name: "it stops", of: 2, each: from(0), to: 30, want: "50: 2 no new bytes for 20s"},
		{name: "the next one works", of: 3, each: from(1), from: 21, want: "20: 2 no new bytes for 20s"},
		{name: "an error", of: 3, does: map[int]change{5: fails(0)}, each: from(1), want: "5: 2 refused"},
		{name: "an error of an earlier one while the later works", of: 3, each: from(1),
			does: map[int]change{5: fails(0), 50: works(0), 60: fails(0)}, want: "5: 2 refused"},
		{name: "one error after the other", of: 3, does: map[int]change{5: fails(0), 7: fails(1)}, want: "5: 2 refused|7: 3 refused"},
		{name: "the first recovers", of: 2, does: map[int]change{5: fails(0), 11: works(0)}, each: from(0), from: 12,
			want: "5: 2 refused|25: 1"},
		{name: "its last gasp is no recovery", of: 2, does: map[int]change{21: from(0)}, want: "20: 2 no new bytes for 20s"},
		{name: "it is nobody's fault", of: 3, each: func(s *sight) { s.idle = true }, want: ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Unix(0, 0)
			c := newCourse(tt.of, 20*time.Second, 10*time.Minute, start)
			s := sight{brought: make([]int64, tt.of), failed: make([]error, tt.of)}
			var got []string
			for second := range 120 {
				s.now = start.Add(time.Duration(second) * time.Second)
				if do := tt.does[second]; do != nil {
					do(&s)
				}
				if tt.each != nil && second >= tt.from && (tt.to == 0 || second <= tt.to) {
					tt.each(&s)
				}
				was := c.joined
				c = c.next(s)
				if c.joined > was {
					got = append(got, fmt.Sprintf("%d: %d %v", second, c.joined, c.why))
				} else if c.joined < was {
					got = append(got, fmt.Sprintf("%d: %d", second, c.joined))
				}
			}
			if got := strings.Join(got, "|"); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// A swarm whose seeder is gone has new pieces for a while only because of what
// the added source brought: without it, it soon falls silent again.
func TestCourseComesToRest(t *testing.T) {
	start := time.Unix(0, 0)
	c := newCourse(2, 20*time.Second, 10*time.Minute, start)
	s := sight{brought: make([]int64, 2), failed: make([]error, 2)}
	waited, changes, stock := 0, 0, 0
	const all = 1200
	for second := range all {
		s.now = start.Add(time.Duration(second) * time.Second)
		if c.joined == 2 {
			s.brought[1]++
			stock++
		}
		if stock > 0 {
			s.brought[0]++
			stock--
		} else {
			waited++
		}
		s.arrived = s.brought[0] + s.brought[1]
		was := c.joined
		if c = c.next(s); c.joined != was {
			changes++
		}
	}
	if waited > all/20 || changes > 12 {
		t.Errorf("%d of %d seconds without a byte, %d changes", waited, all, changes)
	}
}

func TestCourseEnds(t *testing.T) {
	start := time.Unix(0, 0)
	c := newCourse(2, 20*time.Second, 10*time.Minute, start)
	s := sight{brought: make([]int64, 2), failed: make([]error, 2)}
	for second := 0; !c.over; second++ {
		s.now = start.Add(time.Duration(second) * time.Second)
		if second == 300 {
			s.arrived++
		}
		if c = c.next(s); c.over && second != 900 || second > 900 {
			t.Fatalf("over after %d s, want 900", second)
		}
	}
	if c := newCourse(0, 1, 1, start).next(sight{now: start}); !c.over {
		t.Error("a policy without sources goes on")
	}
}
