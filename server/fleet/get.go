package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"rookery/disklayout"
)

// kinds are those of records, in an order in which they can be read: what is
// named comes before what names it.
var kinds = []string{kindLayout, kindDefaults, kindGroup, kindNode}

// Records are the records of a kind and of a name, "" for all, each as a value
// whose JSON is a document that Apply takes. ErrNotFound when none has the name.
func (f *Fleet) Records(kind, name string) ([]any, error) {
	f.mu.RLock()
	r := f.records
	f.mu.RUnlock()
	which := kinds
	if kind != "" {
		i := slices.IndexFunc(kinds, func(k string) bool { return strings.EqualFold(k, kind) })
		if i < 0 {
			return nil, Problems{{Key: "kind", Reason: fmt.Sprintf("%.80q is not one of Node, Group, Layout, Defaults", kind)}}
		}
		which = kinds[i : i+1]
	}
	all := []any{}
	for _, k := range which {
		for _, n := range r.names(k) {
			if name == "" || name == n {
				all = append(all, r.written(k, n))
			}
		}
	}
	if name != "" && len(all) == 0 {
		return nil, fmt.Errorf("%s: %w", strings.TrimSpace(strings.ToLower(kind)+" "+name), ErrNotFound)
	}
	return all, nil
}

// names are the names of all records of a kind.
func (r records) names(kind string) []string {
	switch kind {
	case kindNode:
		return slices.Sorted(maps.Keys(r.nodes))
	case kindGroup:
		return slices.Sorted(maps.Keys(r.groups))
	case kindLayout:
		return slices.Sorted(maps.Keys(r.layouts))
	}
	if reflect.ValueOf(r.defaults).IsZero() {
		return nil
	}
	return []string{defaultsName}
}

// written is a record as its document.
func (r records) written(kind, name string) any {
	value, _ := r.get(kind, name)
	switch v := value.(type) {
	case Node:
		return struct {
			Kind string `json:"kind"`
			Node
		}{kind, v}
	case Group:
		return struct {
			Kind string `json:"kind"`
			Group
		}{kind, v}
	case disklayout.Layout:
		return struct {
			Kind string `json:"kind"`
			Name string `json:"name"`
			disklayout.Layout
		}{kind, name, v}
	}
	return struct {
		Kind string `json:"kind"`
		Settings
	}{kind, r.defaults}
}

// Diff says what Apply would change, one line for each new record and for each
// key of one that is there. The error is Apply's.
func (f *Fleet) Diff(ctx context.Context, files ...File) ([]string, error) {
	docs, problems := parse(files)
	if len(problems) > 0 {
		return nil, problems
	}
	f.mu.RLock()
	r := f.records
	f.mu.RUnlock()
	if problems := r.check(ctx, docs, f.Images); len(problems) > 0 {
		return nil, problems
	}
	lines := []string{}
	for _, d := range docs {
		was, known := r.get(d.kind, d.name)
		if !known {
			lines = append(lines, d.title()+": new")
			continue
		}
		before, after := keysOf(was), keysOf(d.value)
		both := maps.Clone(before)
		maps.Copy(both, after)
		for _, key := range slices.Sorted(maps.Keys(both)) {
			if !bytes.Equal(before[key], after[key]) {
				lines = append(lines, fmt.Sprintf("%s: %s: %s, was %s", d.title(), key, orNothing(after[key]), orNothing(before[key])))
			}
		}
	}
	return lines, nil
}

// keysOf are the keys of a record and their values in JSON.
func keysOf(record any) map[string]json.RawMessage {
	var keys map[string]json.RawMessage
	b, _ := json.Marshal(record) // nothing in it can fail
	_ = json.Unmarshal(b, &keys)
	return keys
}

func orNothing(value json.RawMessage) string {
	if value == nil {
		return "nothing"
	}
	return string(value)
}

// same is whether two records are the same to the store: an empty list is none.
func same(a, b any) bool { return reflect.DeepEqual(keysOf(a), keysOf(b)) }
