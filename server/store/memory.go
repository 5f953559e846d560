package store

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"sync"
)

// Memory returns a store that forgets everything when the process ends.
func Memory() Store { return &memory{kinds: map[string]map[string]Record{}} }

type memory struct {
	mu       sync.Mutex
	revision uint64
	kinds    map[string]map[string]Record
}

func (m *memory) Get(_ context.Context, kind, name string) (Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.kinds[kind][name]
	if !ok {
		return Record{}, missing(kind, name)
	}
	return r.clone(), nil
}

func (m *memory) List(_ context.Context, kind string) ([]Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Record
	for _, name := range slices.Sorted(maps.Keys(m.kinds[kind])) {
		all = append(all, m.kinds[kind][name].clone())
	}
	return all, nil
}

func (m *memory) Put(_ context.Context, records ...Record) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range records {
		if err := verify(r, m.kinds[r.Kind][r.Name].Revision); err != nil {
			return 0, err
		}
	}
	m.revision++
	for _, r := range records {
		if r.Value == nil {
			delete(m.kinds[r.Kind], r.Name)
			continue
		}
		if m.kinds[r.Kind] == nil {
			m.kinds[r.Kind] = map[string]Record{}
		}
		r.Revision = m.revision
		m.kinds[r.Kind][r.Name] = r.clone()
	}
	return m.revision, nil
}

func (m *memory) Delete(ctx context.Context, kind, name string, revision uint64) error {
	if _, err := m.Get(ctx, kind, name); err != nil {
		return err
	}
	_, err := m.Put(ctx, Record{Kind: kind, Name: name, Revision: revision})
	return err
}

func (m *memory) Close() error { return nil }

func (r Record) clone() Record {
	r.Value = bytes.Clone(r.Value)
	return r
}
