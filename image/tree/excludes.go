package tree

import (
	"bufio"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Excludes say what of a tree stays out of an image. Each line is a pattern, and
// of those that match a path the last one decides:
//
//	/var/cache/apt/*.bin   from the root of the tree
//	*.pyc                  a name, at any depth
//	/home/**/.cache/*      ** stands for any number of directories
//	/srv/scratch/          a directory only, with all below it
//	!/var/cache/apt/x.bin  keeps what an earlier line leaves out
//	fs:nfs                 the contents of mounted filesystems of this type
//	# a comment
//
// Within a name * stands for any bytes, ? for one, [a-z] for one of a class and
// [!a-z] for one of no class; a backslash takes the meaning of what follows.
// Nothing below a directory that is left out can be kept, nor below a mount
// point that is emptied: "/proc/*" leaves out what is in a directory, and keeps
// the directory. A file that is left out by one name is kept by its others.
type Excludes struct {
	rules  []rule
	mounts []mountRule
}

// A rule is one pattern for paths.
type rule struct {
	keep    bool
	dirOnly bool
	parts   []glob // one for each name; nil is **
}

// A mountRule is one pattern for types of filesystems.
type mountRule struct {
	keep bool
	fs   glob
}

//go:embed excludes
var builtin string

// Builtin is what never belongs to an image.
func Builtin() Excludes {
	x, err := ParseExcludes("built-in excludes", strings.NewReader(builtin))
	if err != nil {
		panic(err) // a test parses them
	}
	return x
}

// With are the lines of x, and then those of more.
func (x Excludes) With(more Excludes) Excludes {
	return Excludes{slices.Concat(x.rules, more.rules), slices.Concat(x.mounts, more.mounts)}
}

// ParseExcludes reads lines; errors say where in the file called name they are.
func ParseExcludes(name string, r io.Reader) (Excludes, error) {
	var x Excludes
	lines := bufio.NewScanner(r)
	n := 1
	for ; lines.Scan(); n++ {
		if err := x.parse(lines.Text()); err != nil {
			return Excludes{}, fmt.Errorf("%s:%d: %q: %w", name, n, lines.Text(), err)
		}
	}
	if err := lines.Err(); err != nil {
		return Excludes{}, fmt.Errorf("%s:%d: %w", name, n, err)
	}
	return x, nil
}

func (x *Excludes) parse(line string) error {
	line = trimRight(line)
	if line == "" || line[0] == '#' {
		return nil
	}
	pattern, keep := strings.CutPrefix(line, "!")
	if fs, ok := strings.CutPrefix(pattern, "fs:"); ok {
		g, err := parseGlob(fs)
		if err != nil {
			return err
		}
		x.mounts = append(x.mounts, mountRule{keep, g})
		return nil
	}
	r := rule{keep: keep}
	pattern, anchored := strings.CutPrefix(pattern, "/")
	pattern, r.dirOnly = strings.CutSuffix(pattern, "/")
	names := strings.Split(pattern, "/")
	if !anchored && len(names) == 1 {
		names = []string{"**", names[0]}
	} else if !anchored && names[0] != "**" {
		return errors.New("which directory it begins in is not said: begin with / for the root of the tree, with **/ for any")
	}
	deep := 0
	for i, name := range names {
		if name == "**" && i+1 < len(names) && names[i+1] == "**" {
			continue // the same once more
		}
		if name == "**" {
			if deep++; deep > maxDeep {
				return fmt.Errorf("more than %d times **", maxDeep)
			}
			r.parts = append(r.parts, nil)
			continue
		}
		g, err := parseGlob(name)
		if err != nil {
			return err
		}
		r.parts = append(r.parts, g)
	}
	x.rules = append(x.rules, r)
	return nil
}

// maxDeep is how many ** a pattern may have: rsync needs two rules for each.
const maxDeep = 4

// trimRight cuts white space that no backslash keeps.
func trimRight(s string) string {
	t := strings.TrimRight(s, " \t\r")
	if (len(t)-len(strings.TrimRight(t, `\`)))%2 == 1 && len(t) < len(s) {
		return s[:len(t)+1]
	}
	return t
}

// A glob matches one name.
type glob []token

// A token matches one byte, one of a class, or, when it is a star, any bytes.
type token struct {
	star  bool
	class *[256]bool
	lit   byte // where there is neither
}

var anyByte = func() *[256]bool {
	var c [256]bool
	for i := range c {
		c[i] = true
	}
	return &c
}()

func parseGlob(s string) (glob, error) {
	switch s {
	case "":
		return nil, errors.New("holds an empty name")
	case ".", "..":
		return nil, fmt.Errorf("holds the name %q", s)
	}
	if strings.IndexByte(s, 0) >= 0 {
		return nil, errors.New("holds a NUL")
	}
	g := make(glob, 0, len(s))
	for len(s) > 0 {
		c := s[0]
		s = s[1:]
		switch c {
		case '*':
			if len(g) > 0 && g[len(g)-1].star {
				return nil, errors.New("** is part of a name: it stands alone between slashes")
			}
			g = append(g, token{star: true})
		case '?':
			g = append(g, token{class: anyByte})
		case '[':
			class, rest, err := parseClass(s)
			if err != nil {
				return nil, err
			}
			g, s = append(g, token{class: class}), rest
		case '\\':
			if s == "" {
				return nil, errors.New("ends in a backslash")
			}
			g, s = append(g, token{lit: s[0]}), s[1:]
		default:
			g = append(g, token{lit: c})
		}
	}
	return g, nil
}

// parseClass reads what follows a [.
func parseClass(s string) (_ *[256]bool, rest string, err error) {
	var class [256]bool
	not := s != "" && (s[0] == '!' || s[0] == '^')
	if not {
		s = s[1:]
	}
	next := func() (c byte, ok bool) {
		if s != "" && s[0] == '\\' {
			s = s[1:]
		}
		if s == "" {
			return 0, false
		}
		c, s = s[0], s[1:]
		return c, true
	}
	for first := true; ; first = false {
		if !first && s != "" && s[0] == ']' {
			break
		}
		from, ok := next()
		to := from
		if ok && len(s) > 1 && s[0] == '-' && s[1] != ']' {
			s = s[1:]
			to, ok = next()
		}
		switch {
		case !ok:
			return nil, "", errors.New("class [ without its ]")
		case from >= 0x80 || to >= 0x80:
			return nil, "", errors.New("class of other than ASCII: names are bytes")
		case from > to:
			return nil, "", fmt.Errorf("class from %q to %q", from, to)
		}
		for c := from; c <= to; c++ {
			class[c] = true
		}
	}
	if not {
		for i := range class {
			class[i] = !class[i]
		}
	}
	return &class, s[1:], nil
}

func (t token) match(c byte) bool {
	if t.class != nil {
		return t.class[c]
	}
	return t.lit == c
}

func (g glob) match(name string) bool {
	i, n := 0, 0
	star, from := -1, 0 // the last star, and where what follows it is tried
	for n < len(name) || i < len(g) {
		switch {
		case i < len(g) && g[i].star:
			star, from = i, n
			i++
		case i < len(g) && n < len(name) && g[i].match(name[n]):
			i++
			n++
		case star >= 0 && from < len(name):
			from++
			i, n = star+1, from
		default:
			return false
		}
	}
	return true
}

// match says whether r is about a path, given as its names.
func (r *rule) match(names []string, dir bool) bool {
	if r.dirOnly && !dir {
		return false
	}
	p := r.parts
	if len(p) == 2 && p[0] == nil && p[1] != nil { // a name at any depth
		return p[1].match(names[len(names)-1])
	}
	i, n := 0, 0
	deep, from := -1, 0
	for n < len(names) || i < len(p) {
		switch {
		case i < len(p) && p[i] == nil:
			deep, from = i, n
			if i++; i == len(p) { // at the end it is all that is inside
				return n < len(names)
			}
		case i < len(p) && n < len(names) && p[i].match(names[n]):
			i++
			n++
		case deep >= 0 && from < len(names):
			from++
			i, n = deep+1, from
		default:
			return false
		}
	}
	return true
}

// drop says whether a path stays out. Its parents are not looked at.
func (x *Excludes) drop(p string, dir bool) bool {
	if len(x.rules) == 0 {
		return false
	}
	names := strings.Split(p, "/")
	for i := len(x.rules) - 1; i >= 0; i-- {
		if x.rules[i].match(names, dir) {
			return !x.rules[i].keep
		}
	}
	return false
}

// dropMount says whether the contents of a filesystem of this type stay out.
func (x *Excludes) dropMount(fs string) bool {
	for i := len(x.mounts) - 1; i >= 0; i-- {
		if x.mounts[i].fs.match(fs) {
			return !x.mounts[i].keep
		}
	}
	return false
}

// Mounts are the types of the filesystems that are mounted in a tree, by the
// path of the mount point in it.
type Mounts map[string]string

// ParseMounts reads a mountinfo (proc(5)) for the tree at root, an absolute path.
func ParseMounts(mountinfo io.Reader, root string) (Mounts, error) {
	mounts := make(Mounts)
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, types := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || len(types) == 0 {
			return nil, fmt.Errorf("mountinfo: %q is no mount", lines.Text())
		}
		at := unescape.Replace(fields[4])
		below, ok := strings.CutPrefix(at, strings.TrimSuffix(root, "/")+"/")
		if ok && below != "" {
			mounts[below] = types[0] // a later one lies over an earlier one
		}
	}
	return mounts, lines.Err()
}

// unescape undoes what the kernel does to names in /proc (mangle in fs/seq_file.c).
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// Rsync gives x as rsync's filter rules, for a source with these mounts that
// ends in a slash. There the first rule that matches decides.
func (x Excludes) Rsync(mounts Mounts) []string {
	var rules []string
	for at, fs := range mounts {
		if x.dropMount(fs) {
			var g glob
			for i := range len(at) {
				g = append(g, token{lit: at[i]})
			}
			rules = append(rules, "- /"+g.rsync(true)+"/*") // the star makes it wild
		}
	}
	slices.Sort(rules)
	for _, r := range slices.Backward(x.rules) {
		sign, tail := "- ", ""
		if r.keep {
			sign = "+ "
		}
		if r.dirOnly {
			tail = "/"
		}
		for _, p := range r.rsync() {
			rules = append(rules, sign+p+tail)
		}
	}
	return rules
}

// rsync gives the patterns that together match what r matches. Rsync's ** stands
// for any bytes: with "a/**/b" there is at least one directory between.
func (r *rule) rsync() []string {
	if len(r.parts) == 2 && r.parts[0] == nil && r.parts[1] != nil {
		return []string{r.parts[1].rsync(r.parts[1].wild())}
	}
	variants := [][]glob{nil}
	for i, g := range r.parts {
		without := variants
		variants = nil
		for _, v := range without {
			variants = append(variants, append(slices.Clone(v), g))
		}
		if g == nil && i+1 < len(r.parts) {
			variants = append(variants, without...)
		}
	}
	var patterns []string
	for _, v := range variants {
		wild := slices.ContainsFunc(v, func(g glob) bool { return g == nil || g.wild() })
		p := ""
		for _, g := range v {
			p += "/"
			if g == nil {
				p += "**"
			}
			p += g.rsync(wild)
		}
		patterns = append(patterns, p)
	}
	return patterns
}

// wild says whether rsync sees a wildcard in g: escaped ones are some as well.
func (g glob) wild() bool {
	return slices.ContainsFunc(g, func(t token) bool { return t.star || t.class != nil || strings.IndexByte("*?[", t.lit) >= 0 })
}

// rsync writes g for rsync, to which a backslash is itself in a pattern without
// wildcards (lib/wildmatch.c is not asked then, exclude.c).
func (g glob) rsync(wild bool) string {
	var b strings.Builder
	for _, t := range g {
		switch {
		case t.star:
			b.WriteByte('*')
		case t.class == anyByte:
			b.WriteByte('?')
		case t.class != nil:
			b.WriteString(rsyncClass(t.class))
		case wild && strings.IndexByte(`*?[\`, t.lit) >= 0:
			b.WriteString(`\` + string(t.lit))
		default:
			b.WriteByte(t.lit)
		}
	}
	return b.String()
}

func rsyncClass(class *[256]bool) string {
	s, not := "[", class[0xff] // what is named is ASCII
	if not {
		s += "^"
	}
	for from := 1; from < 0x80; from++ {
		if class[from] == not {
			continue
		}
		to := from
		for to < 0x7f && class[to+1] != not {
			to++
		}
		s += fmt.Sprintf(`\%c-\%c`, from, to)
		from = to
	}
	return s + "]"
}
