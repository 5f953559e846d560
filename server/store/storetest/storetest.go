// Package storetest says what every store promises.
package storetest

import (
	"errors"
	"fmt"
	"reflect"
	"sync"
	"testing"

	"rookery/server/store"
)

// Run tests the stores that open returns; each must be empty.
func Run(t *testing.T, open func(*testing.T) store.Store) {
	node := func(name, value string, revision uint64) store.Record {
		return store.Record{Kind: "node", Name: name, Value: []byte(value), Revision: revision}
	}
	put := func(t *testing.T, s store.Store, records ...store.Record) uint64 {
		t.Helper()
		revision, err := s.Put(t.Context(), records...)
		if err != nil {
			t.Fatalf("Put: %v", err)
		}
		return revision
	}
	list := func(t *testing.T, s store.Store, kind string) []string {
		t.Helper()
		records, err := s.List(t.Context(), kind)
		if err != nil {
			t.Fatalf("List: %v", err)
		}
		all := []string{}
		for _, r := range records {
			all = append(all, r.Name+"="+string(r.Value))
		}
		return all
	}
	want := func(t *testing.T, got, want []string) {
		t.Helper()
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("store has %q, want %q", got, want)
		}
	}

	t.Run("what was put is there", func(t *testing.T) {
		s := open(t)
		revision := put(t, s, node("n2", `{"a":1}`, 0))
		got, err := s.Get(t.Context(), "node", "n2")
		if w := node("n2", `{"a":1}`, revision); err != nil || !reflect.DeepEqual(got, w) {
			t.Fatalf("Get: %+v, %v, want %+v", got, err, w)
		}
		put(t, s, node("n1", `2`, 0), store.Record{Kind: "layout", Name: "n1", Value: []byte(`3`)})
		want(t, list(t, s, "node"), []string{"n1=2", `n2={"a":1}`})
		want(t, list(t, s, "layout"), []string{"n1=3"})
	})

	t.Run("nothing is there", func(t *testing.T) {
		s := open(t)
		if _, err := s.Get(t.Context(), "node", "n1"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("Get: %v, want %v", err, store.ErrNotFound)
		}
		if err := s.Delete(t.Context(), "node", "n1", 0); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("Delete: %v, want %v", err, store.ErrNotFound)
		}
		want(t, list(t, s, "node"), []string{})
	})

	t.Run("only the latest revision can be replaced", func(t *testing.T) {
		s := open(t)
		first := put(t, s, node("n1", "1", 0))
		second := put(t, s, node("n1", "2", first))
		if second <= first {
			t.Errorf("revision %d after %d", second, first)
		}
		for _, stale := range []uint64{0, first, second + 1} {
			if _, err := s.Put(t.Context(), node("n1", "3", stale)); !errors.Is(err, store.ErrConflict) {
				t.Errorf("Put over revision %d with %d: %v, want %v", second, stale, err, store.ErrConflict)
			}
			if err := s.Delete(t.Context(), "node", "n1", stale); !errors.Is(err, store.ErrConflict) {
				t.Errorf("Delete of revision %d with %d: %v, want %v", second, stale, err, store.ErrConflict)
			}
		}
		if _, err := s.Put(t.Context(), node("n2", "1", 7)); !errors.Is(err, store.ErrConflict) {
			t.Errorf("Put over nothing with revision 7: %v, want %v", err, store.ErrConflict)
		}
		want(t, list(t, s, "node"), []string{"n1=2"})
	})

	t.Run("a deleted record does not come back under an old revision", func(t *testing.T) {
		s := open(t)
		first := put(t, s, node("n1", "1", 0))
		if err := s.Delete(t.Context(), "node", "n1", first); err != nil {
			t.Fatalf("Delete: %v", err)
		}
		want(t, list(t, s, "node"), []string{})
		if again := put(t, s, node("n1", "2", 0)); again <= first {
			t.Errorf("revision %d after %d", again, first)
		}
	})

	t.Run("all or none", func(t *testing.T) {
		s := open(t)
		first := put(t, s, node("n1", "1", 0))
		_, err := s.Put(t.Context(), node("n1", "2", first), node("n2", "2", 0), node("n3", "2", 99))
		if !errors.Is(err, store.ErrConflict) {
			t.Errorf("Put: %v, want %v", err, store.ErrConflict)
		}
		want(t, list(t, s, "node"), []string{"n1=1"})
		put(t, s, node("n1", "", first), node("n2", "2", 0)) // an empty value is a value
		want(t, list(t, s, "node"), []string{"n1=", "n2=2"})
	})

	t.Run("a record without a value is deleted", func(t *testing.T) {
		s := open(t)
		revision := put(t, s, node("n1", "1", 0))
		put(t, s, store.Record{Kind: "node", Name: "n1", Revision: revision}, node("n2", "2", 0))
		want(t, list(t, s, "node"), []string{"n2=2"})
	})

	t.Run("a record needs a kind and a name", func(t *testing.T) {
		s := open(t)
		for _, r := range []store.Record{{Kind: "node", Value: []byte("1")}, {Name: "n1", Value: []byte("1")}} {
			if _, err := s.Put(t.Context(), r); err == nil {
				t.Errorf("Put of kind %q, name %q: no error", r.Kind, r.Name)
			}
		}
	})

	t.Run("the caller's bytes are its own", func(t *testing.T) {
		s := open(t)
		r := node("n1", "1", 0)
		put(t, s, r)
		r.Value[0] = '9'
		got, _ := s.Get(t.Context(), "node", "n1")
		got.Value[0] = '8'
		want(t, list(t, s, "node"), []string{"n1=1"})
	})

	t.Run("of many writers one wins each revision", func(t *testing.T) {
		s := open(t)
		const writers, rounds = 8, 5
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for done := 0; done < rounds; {
					r, err := s.Get(t.Context(), "node", "n1")
					if err != nil && !errors.Is(err, store.ErrNotFound) {
						t.Errorf("writer %d: Get: %v", w, err)
						return
					}
					var n int
					fmt.Sscan(string(r.Value), &n) // nothing there yet: 0
					_, err = s.Put(t.Context(), node("n1", fmt.Sprint(n+1), r.Revision))
					switch {
					case err == nil:
						done++
					case !errors.Is(err, store.ErrConflict):
						t.Errorf("writer %d: Put: %v", w, err)
						return
					}
				}
			})
		}
		wg.Wait()
		want(t, list(t, s, "node"), []string{fmt.Sprintf("n1=%d", writers*rounds)})
	})
}
