package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"rookery/disklayout"
	"rookery/wire"
)

// The kinds of records, as documents and the store write them.
const (
	kindNode     = "Node"
	kindGroup    = "Group"
	kindLayout   = "Layout"
	kindDefaults = "Defaults"
)

// defaultsName is the name of the one Defaults record in the store.
const defaultsName = "defaults"

// Bounds of what one Apply takes.
const (
	MaxApply     = 16 << 20 // bytes
	maxDocuments = 20_000
	maxProblems  = 20 // that are told, of any number
)

// A File is YAML documents, each a record: "kind: Node", "kind: Group",
// "kind: Layout" or "kind: Defaults".
type File struct {
	Name string `json:"name"` // for messages
	Data string `json:"data"`
}

// A Problem is one reason why records were refused.
type Problem struct {
	File   string // "" when the record is from no file
	Line   int    // from 1
	Record string // "node n1", "defaults"; "" when there is no telling
	Key    string
	Reason string
}

func (p Problem) String() string {
	var where []string
	if p.File != "" {
		where = append(where, fmt.Sprintf("%s:%d", p.File, p.Line))
	}
	for _, s := range []string{p.Record, p.Key, p.Reason} {
		if s != "" {
			where = append(where, s)
		}
	}
	return strings.Join(where, ": ")
}

// Problems is the error of records that were refused: nothing was saved.
type Problems []Problem

func (p Problems) Error() string {
	lines := make([]string, 0, maxProblems+1)
	for _, problem := range p[:min(len(p), maxProblems)] {
		lines = append(lines, problem.String())
	}
	if more := len(p) - maxProblems; more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "\n")
}

// A document is one record on its way in.
type document struct {
	kind, name string
	value      any // Node, Group, disklayout.Layout or Settings

	file string
	yaml *yaml.Node // the mapping it was read from; nil when it is not from a file
}

func (d document) title() string {
	if d.kind == kindDefaults {
		return "defaults"
	}
	return strings.TrimSpace(strings.ToLower(d.kind) + " " + d.name)
}

// problem says what err has against d, and where.
func (d document) problem(err error) Problem {
	p := Problem{File: d.file, Record: d.title(), Reason: err.Error()}
	var at *keyError
	if errors.As(err, &at) {
		p.Key, p.Reason = at.key, at.err.Error()
	}
	if d.yaml != nil {
		p.Line = lineOf(d.yaml, p.Key)
	}
	return p
}

// lineOf is the line of a key of a mapping, or of the mapping itself.
func lineOf(mapping *yaml.Node, key string) int {
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == key {
			return mapping.Content[i].Line
		}
	}
	return mapping.Line
}

// check says what is wrong with d by itself.
func (d document) check() error {
	switch v := d.value.(type) {
	case disklayout.Layout:
		if d.name == "" {
			return bad("name", "missing")
		}
		if err := v.Check(); err != nil {
			return bad("partitions", "%s", strings.TrimPrefix(strings.TrimPrefix(err.Error(), "layout: "), "partitions: "))
		}
	case interface{ check() error }:
		return v.check()
	}
	return nil
}

// parse reads the documents of all files and checks each by itself.
func parse(files []File) ([]document, Problems) {
	var docs []document
	var problems Problems
	total := 0
	seen := map[string]document{}
	for _, f := range files {
		if total += len(f.Data); total > MaxApply {
			return nil, Problems{{File: f.Name, Line: 1, Reason: fmt.Sprintf("more than %d bytes together", MaxApply)}}
		}
		decoder := yaml.NewDecoder(strings.NewReader(f.Data))
		for {
			var y yaml.Node
			err := decoder.Decode(&y)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil { // the rest of the file cannot be told apart
				problems = append(problems, yamlProblems(f.Name, nil, err)...)
				break
			}
			if len(docs) == maxDocuments {
				return nil, Problems{{File: f.Name, Line: y.Line, Reason: fmt.Sprintf("more than %d documents", maxDocuments)}}
			}
			d, bad := decode(f.Name, &y)
			if bad != nil {
				problems = append(problems, bad...)
				continue
			}
			if d.yaml == nil {
				continue // nothing between two "---"
			}
			if other, twice := seen[d.title()]; twice {
				problems = append(problems, d.problem(fmt.Errorf("stands in %s:%d too", other.file, other.yaml.Line)))
				continue
			}
			seen[d.title()] = d
			if err := d.check(); err != nil {
				problems = append(problems, d.problem(err))
			}
			docs = append(docs, d)
		}
	}
	return docs, problems
}

// decode turns one YAML document into a record. An empty one has no yaml.
func decode(file string, y *yaml.Node) (document, Problems) {
	if y.Kind == yaml.DocumentNode {
		y = y.Content[0]
	}
	if y.Kind == 0 || y.Tag == "!!null" {
		return document{}, nil
	}
	if y.Kind != yaml.MappingNode {
		return document{}, Problems{{File: file, Line: y.Line, Reason: "want keys and values"}}
	}
	d := document{file: file, yaml: y}
	var head struct{ Kind, Name string }
	if err := y.Decode(&head); err != nil {
		return d, yamlProblems(file, y, err)
	}
	d.kind, d.name = head.Kind, head.Name

	var node struct {
		Kind string `yaml:"kind"`
		Node `yaml:",inline"`
	}
	var group struct {
		Kind  string `yaml:"kind"`
		Group `yaml:",inline"`
	}
	var layout struct {
		Kind              string `yaml:"kind"`
		Name              string `yaml:"name"`
		disklayout.Layout `yaml:",inline"`
	}
	var defaults struct {
		Kind     string `yaml:"kind"`
		Settings `yaml:",inline"`
	}
	var into any
	switch d.kind {
	case kindNode:
		into = &node
	case kindGroup:
		into = &group
	case kindLayout:
		into = &layout
	case kindDefaults:
		into, d.name = &defaults, defaultsName
	default:
		return d, Problems{{File: file, Line: lineOf(y, "kind"), Key: "kind", Reason: fmt.Sprintf("%.80q is not one of Node, Group, Layout, Defaults", d.kind)}}
	}
	// The library also refuses keys that stand twice and aliases that multiply,
	// so it comes first.
	if err := y.Decode(into); err != nil {
		problems := yamlProblems(file, y, err)
		for i := range problems {
			problems[i].Record = d.title()
		}
		return d, problems
	}
	var problems Problems
	unknownKeys(y, reflect.TypeOf(into).Elem(), func(key *yaml.Node) {
		if len(problems) <= maxProblems {
			problems = append(problems, Problem{File: file, Line: key.Line, Record: d.title(), Key: key.Value, Reason: "unknown key"})
		}
	})
	if problems != nil {
		return d, problems
	}
	d.value = map[string]any{
		kindNode: node.Node.normal(), kindGroup: group.Group, kindLayout: layout.Layout, kindDefaults: defaults.Settings,
	}[d.kind]
	return d, nil
}

// unknownKeys tells the keys of y that the struct t has no field for. The
// library's own strictness works on readers only, not on a part of a document,
// and names Go types.
func unknownKeys(y *yaml.Node, t reflect.Type, tell func(key *yaml.Node)) {
	if y.Kind == yaml.AliasNode {
		y = y.Alias
	}
	switch {
	case t.Kind() == reflect.Slice && y.Kind == yaml.SequenceNode:
		for _, item := range y.Content {
			unknownKeys(item, t.Elem(), tell)
		}
	case t.Kind() == reflect.Struct && y.Kind == yaml.MappingNode:
		fields := map[string]reflect.Type{}
		yamlFields(t, fields)
		for i := 0; i+1 < len(y.Content); i += 2 {
			key, value := y.Content[i], y.Content[i+1]
			if field, ok := fields[key.Value]; ok {
				unknownKeys(value, field, tell)
			} else {
				tell(key)
			}
		}
	}
}

func yamlFields(t reflect.Type, fields map[string]reflect.Type) {
	for f := range t.Fields() {
		name, rest, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if rest == "inline" {
			yamlFields(f.Type, fields)
		} else {
			fields[name] = f.Type
		}
	}
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?`)

// yamlType is how the library says that a value is not what a field takes.
var yamlType = regexp.MustCompile("^cannot unmarshal !!\\w+ (?:(`.*`) )?into (.+)$")

// yamlName is what people call the values of a type of Go's.
func yamlName(goType string) string {
	switch {
	case goType == "string":
		return "one word or text"
	case strings.HasPrefix(goType, "[]"):
		return "a list"
	case strings.HasPrefix(goType, "int"):
		return "a whole number"
	}
	return "keys and values"
}

// yamlProblems turns what the library has against a document into problems
// with lines and, where the document is known, keys.
func yamlProblems(file string, y *yaml.Node, err error) Problems {
	var typed *yaml.TypeError
	reasons := []string{err.Error()}
	if errors.As(err, &typed) {
		reasons = typed.Errors
	}
	var problems Problems
	for _, reason := range reasons {
		p := Problem{File: file, Line: 1, Reason: reason}
		if m := yamlLine.FindStringSubmatch(reason); m != nil {
			p.Reason = reason[len(m[0]):]
			if n, err := strconv.Atoi(m[1]); err == nil {
				p.Line = n
			}
		}
		if m := yamlType.FindStringSubmatch(p.Reason); m != nil {
			p.Reason = strings.TrimSpace(m[1] + " is not " + yamlName(m[2]))
		}
		if y != nil {
			for i := 0; i+1 < len(y.Content) && y.Content[i].Line <= p.Line; i += 2 {
				p.Key = y.Content[i].Value
			}
		}
		problems = append(problems, p)
	}
	return problems
}

// get is the record of that kind and name.
func (r records) get(kind, name string) (value any, ok bool) {
	switch kind {
	case kindNode:
		value, ok = r.nodes[name]
	case kindGroup:
		value, ok = r.groups[name]
	case kindLayout:
		value, ok = r.layouts[name]
	case kindDefaults:
		value, ok = r.defaults, true
	}
	return value, ok
}

// set writes a record to r's own maps.
func (r *records) set(name string, value any) {
	switch v := value.(type) {
	case Node:
		r.nodes[name] = v
	case Group:
		r.groups[name] = v
	case disklayout.Layout:
		r.layouts[name] = v
	case Settings:
		r.defaults = v
	}
}

// with is r after docs; r stays as it is.
func (r records) with(docs []document) records {
	r.nodes, r.groups, r.layouts = maps.Clone(r.nodes), maps.Clone(r.groups), maps.Clone(r.layouts)
	for _, d := range docs {
		r.set(d.name, d.value)
	}
	return r
}

// check says what docs, each good by itself, spoil among all records. A node
// that no document is about is only looked at when it was good before.
func (r records) check(ctx context.Context, docs []document, images Images) Problems {
	images = images.once()
	after := r.with(docs)
	idsBefore, idsAfter := newIndex(r.nodes), newIndex(after.nodes)
	var problems Problems
	about := map[string]bool{}
	shared := -1 // the document that touches nodes other than its own
	for i, d := range docs {
		var err error
		switch v := d.value.(type) {
		case Node:
			about[d.name] = true
			if err := after.checkNode(ctx, v, idsAfter, images); err != nil {
				problems = append(problems, d.problem(err))
			}
			continue
		case Group:
			err = after.checkShared(ctx, v.Settings, images)
		case Settings:
			err = after.checkShared(ctx, v, images)
		}
		if err != nil {
			return Problems{d.problem(err)} // that of every node without its own, too
		}
		shared = i
	}
	if shared < 0 {
		return problems
	}
	for _, name := range slices.Sorted(maps.Keys(r.nodes)) {
		n := r.nodes[name]
		if about[name] || r.checkNode(ctx, n, idsBefore, images) != nil {
			continue
		}
		if err := after.checkNode(ctx, n, idsAfter, images); err != nil {
			d := docs[shared]
			var at *keyError
			if errors.As(err, &at) {
				err = &keyError{at.key, fmt.Errorf("spoils node %s: %w", name, at.err)}
			}
			problems = append(problems, d.problem(err))
		}
	}
	return problems
}

// Apply checks all the documents of all files, then saves all of them. A
// document replaces the whole record; records that none is about stay. It
// returns what it changed, one line each. The error is Problems when the
// documents are wrong.
func (f *Fleet) Apply(ctx context.Context, files ...File) (done []string, err error) {
	docs, problems := parse(files)
	if len(problems) > 0 {
		return nil, problems
	}
	f.changing.Lock()
	defer f.changing.Unlock()
	return f.apply(ctx, docs)
}

// apply saves docs, which are good by themselves. Called by who holds changing.
func (f *Fleet) apply(ctx context.Context, docs []document) (done []string, err error) {
	if problems := f.records.check(ctx, docs, f.Images); len(problems) > 0 {
		return nil, problems
	}
	var changes []change
	for _, d := range docs {
		was, known := f.records.get(d.kind, d.name)
		if known && same(was, d.value) {
			continue
		}
		changes = append(changes, change{d.kind, d.name, d.value})
		if n, ok := d.value.(Node); ok {
			if do := n.Boot; !known || do != was.(Node).Boot && do != "" {
				if do == "" {
					do = wire.Install
				}
				m := f.machines[d.name]
				m.status = m.status.request(do, newID())
				changes = append(changes, m.change(d.name))
			}
		}
		verb := "created"
		if known {
			verb = "changed"
		}
		done = append(done, d.title()+" "+verb)
	}
	if err := f.save(ctx, changes...); err != nil {
		return nil, err
	}
	for _, line := range done {
		f.Log.Info("record " + line)
	}
	return done, nil
}
