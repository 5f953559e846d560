package rules

import (
	"slices"
	"testing"
	"time"
)

// A guest has a place or not as its test says.
type guest struct {
	Place
	fed bool
}

func (t *guest) Takes() *Place      { return &t.Place }
func (t *guest) Fed(time.Time) bool { return t.fed }

// When one that was stuck moves again, there is one too many: the one that has been
// fed longest goes, and no other.
func TestOneTooMany(t *testing.T) {
	now := time.Unix(1000, 0)
	var all []*guest
	for n := range MaxFed + 1 {
		all = append(all, &guest{fed: true})
		all[n].since = now.Add(time.Duration(n-10) * time.Second)
	}
	peers := slices.Values(all)
	for n := MaxFed; n >= 0; n-- {
		if got, want := TakesOn(all[n], peers, now), n > 0; got != want {
			t.Errorf("node %d is taken on: %v, want %v", n, got, want)
		}
	}
	all[0].fed = false
	for range 2 {
		for n, p := range all[1:] {
			if !TakesOn(p, peers, now) {
				t.Errorf("node %d has lost its place, too", n+1)
			}
		}
	}
}
