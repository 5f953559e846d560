package capture

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"rookery/image/tree"
)

// A Plan is what of a golden client is taken, and how.
type Plan struct {
	parts []part
	rules []string // rsync's filters
	notes []string
}

// How the files of one filesystem are read.
const (
	live  = "live"
	lvm   = "LVM snapshot"
	btrfs = "btrfs snapshot"
)

// A part is one mounted filesystem that is captured.
type part struct {
	mount
	how     string
	why     string // of live: why there is no snapshot
	volume  volume // of lvm
	extents int64  // of lvm, 0 in a thin pool
}

// NewPlan decides what of the machine is captured, with snapshots where it can
// make them.
func NewPlan(f Facts, excludes tree.Excludes, snapshots bool) Plan {
	var p Plan
	types := make(tree.Mounts)
	var wanted, kept []mount
	for _, m := range byPath(f.mounts) {
		at := strings.TrimPrefix(m.at, "/")
		if at != "" {
			types[at] = m.fs
		}
		if at == "" || !excludes.Empties(at, m.fs) {
			wanted = append(wanted, m)
		} else if strings.HasPrefix(m.source, "/dev/") || strings.Contains(m.source, ":/") || strings.HasPrefix(m.source, "//") {
			p.notes = append(p.notes, fmt.Sprintf("%s (%s) stays out", m.at, m.fs))
		}
	}
	for _, m := range wanted {
		i := slices.IndexFunc(wanted, func(o mount) bool { return m.shownBy(o) })
		if m.at == "/" || i < 0 {
			kept = append(kept, m)
			continue
		}
		p.notes = append(p.notes, fmt.Sprintf("%s stays out: it is in %s already", m.at, wanted[i].at))
		p.rules = append(p.rules, "- "+literal.Replace(m.at)+"/*")
	}
	p.rules = append(p.rules, excludes.Rsync(types)...)
	for _, m := range kept {
		p.parts = append(p.parts, part{mount: m, how: live})
	}
	if slices.ContainsFunc(kept, func(m mount) bool { return m.fs == "btrfs" }) {
		// btrfs.compression cannot be set on other filesystems. A rule for
		// system.* beside it makes rsync 3.5 lose ACLs when it comes again.
		p.rules = append(p.rules, "-x btrfs.*")
	}
	if !snapshots {
		for i := range p.parts {
			p.parts[i].why = "no snapshots are wanted"
		}
		return p
	}
	p.snapshots(f)
	p.nested(f)
	return p
}

// literal writes a path for a rule of rsync with wildcards.
var literal = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`)

// byPath has what is mounted on others after those.
func byPath(mounts []mount) []mount {
	mounts = slices.Clone(mounts)
	slices.SortStableFunc(mounts, func(a, b mount) int { return strings.Compare(a.at, b.at) })
	return mounts
}

// shownBy says whether o has the files of m as well: m is a bind mount, or the
// same mounted twice. The subvolumes of btrfs look alike, but are not reached
// from each other.
func (m mount) shownBy(o mount) bool {
	if m.dev != o.dev || m.at == o.at {
		return false
	}
	if m.root == o.root {
		return o.at < m.at
	}
	return m.fs != "btrfs" && strings.HasPrefix(m.root, strings.TrimSuffix(o.root, "/")+"/")
}

// snapshots decides which parts get one.
func (p *Plan) snapshots(f Facts) {
	sharing := make(map[string]number) // how many want extents of a group
	for i := range p.parts {
		part := &p.parts[i]
		if part.fs == "btrfs" {
			part.how = btrfs
			continue
		}
		j := slices.IndexFunc(f.volumes, func(v volume) bool { return v.dev() == part.dev })
		if j < 0 {
			part.why = "neither on LVM nor btrfs"
			continue
		}
		part.volume = f.volumes[j]
		switch {
		case part.volume.Pool != "":
			part.how = lvm
		case part.volume.Origin != "":
			part.why = "is a snapshot itself"
		default:
			part.how = lvm
			sharing[part.volume.Group]++
		}
	}
	for i := range p.parts {
		part := &p.parts[i]
		if part.how != lvm || part.volume.Pool != "" {
			continue
		}
		// What is written to the origin in the meantime has to find room, with a
		// little for the books; more than everything is never written twice.
		group := f.groups[part.volume.Group]
		all := part.volume.Size/group.Extent + 1
		part.extents = int64(min(group.Free/sharing[group.Name], all+all/50+1))
		if part.extents == 0 {
			part.how, part.why = live, fmt.Sprintf("volume group %s has no free extents", group.Name)
		}
	}
}

// nested notes the subvolumes that a snapshot of the one around them leaves out.
func (p *Plan) nested(f Facts) {
	root, at := "", ""
	seen := 0
	for line := range strings.Lines(f.Raw["subvolumes"]) {
		if seen++; seen > maxMounts {
			break
		}
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "at "); ok {
			root, at, _ = strings.Cut(rest, " ")
			continue
		}
		// ID 257 gen 9 top level 256 path @/var/lib/machines
		_, below, ok := strings.Cut(line, " path ")
		if !ok {
			continue
		}
		inner := path.Join("/", strings.TrimPrefix("/"+below, root))
		full := path.Join(at, inner)
		mounted := slices.ContainsFunc(f.mounts, func(m mount) bool { return m.at == full || m.fs == "btrfs" && m.root == "/"+below })
		taken := slices.ContainsFunc(p.parts, func(part part) bool { return part.at == at && part.how == btrfs })
		if taken && !mounted {
			p.notes = append(p.notes, fmt.Sprintf("%s stays out: it is a subvolume of its own and not mounted", full))
		}
	}
}

// Live says which filesystems are read while they change, and why.
func (p Plan) Live() []string {
	var lines []string
	for _, part := range p.parts {
		if part.how == live {
			lines = append(lines, fmt.Sprintf("%s (%s): %s", part.at, part.fs, part.why))
		}
	}
	return lines
}

// frozen says whether any filesystem is read from a snapshot.
func (p Plan) frozen() bool {
	return slices.ContainsFunc(p.parts, func(part part) bool { return part.how != live })
}

// Describe tells what is captured, in lines for people.
func (p Plan) Describe() []string {
	var lines []string
	for _, part := range p.parts {
		line := fmt.Sprintf("%s (%s): %s", part.at, part.fs, part.how)
		switch {
		case part.how == live:
			line += ", " + part.why
		case part.how == lvm && part.extents > 0:
			line += fmt.Sprintf(" of %s/%s in %d extents", part.volume.Group, part.volume.Name, part.extents)
		case part.how == lvm:
			line += fmt.Sprintf(" of %s/%s in its pool", part.volume.Group, part.volume.Name)
		}
		lines = append(lines, line)
	}
	return append(lines, p.notes...)
}

// quote writes s as one word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// deaf is for how many seconds the client waits for a sign of life before it
// cleans up by itself: the connection may be cut without a word.
const deaf = 90

// script is what the client's shell does while files are transferred: it makes
// the snapshots, mounts them and what is live as one tree, says where, and takes
// all of it away when its input ends, when no line comes for so long, and when
// it is killed. name is that of the snapshots; lines for us begin with mark.
//
// Of a client without snapshots the tree is /, and nothing is made.
func (p Plan) script(mark, name string) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("n=0 dog=")
	line(`undo0() { rmdir "$d/view" "$d/top" "$d"; }`)
	line(`clean() {`)
	line(`	trap '' HUP INT TERM PIPE; trap - EXIT`)
	line(`	[ -z "$dog" ] || kill "$dog"`)
	line(`	while [ "$n" -gt 0 ]; do undo$n; n=$((n-1)); done`)
	line(`	undo0`)
	line(`}`)
	line(`bark() { trap 'kill $s' TERM; sleep %d & s=$!; wait $s && kill -TERM $$; }`, deaf)
	line(`say() { echo "%s $*"; }`, mark)
	if !p.frozen() {
		line(`say ready /`)
		line(`while read -r line; do :; done; exit`)
		return b.String()
	}
	line(`d=$(mktemp -d /run/rookery.XXXXXX) || exit`)
	line(`trap '' PIPE; trap exit HUP INT TERM; trap 'clean 2>/dev/null' EXIT`)
	line(`mkdir "$d/view" "$d/top" || exit`)
	for i, part := range p.parts {
		n := i + 1
		at := `"$d/view"` + quote(strings.TrimSuffix(part.at, "/"))
		bind := fmt.Sprintf(`{ mount --bind %s %s && mount -o remount,bind,ro %s; }`, quote(part.at), at, at)
		unmount := fmt.Sprintf(`umount %s || umount -l %s`, at, at)
		line("n=%d", n)
		switch part.how {
		case live:
			line(`undo%d() { %s; }`, n, unmount)
			line(`%s || exit`, bind)
			continue
		case lvm:
			snapshot := fmt.Sprintf("%s-%d", name, n)
			size := ""
			if part.extents > 0 {
				size = fmt.Sprintf("-l %d ", part.extents)
			}
			options := "ro"
			if part.fs == "xfs" {
				options += ",nouuid" // that of the origin, which is mounted
			}
			line(`undo%d() { %s; lvremove -q -f %s; }`, n, unmount, quote(part.volume.Group+"/"+snapshot))
			line(`make%d() { lvcreate -q -y -s -kn -ay %s-n %s %s && mount -t %s -o %s %s %s; }`, n, size, snapshot,
				quote(part.volume.Group+"/"+part.volume.Name), quote(part.fs), options, quote("/dev/"+part.volume.Group+"/"+snapshot), at)
		case btrfs:
			snapshot := fmt.Sprintf(`"$d/top/%s-%d"`, name, n)
			top := fmt.Sprintf(`mount -t btrfs -o subvolid=5 %s "$d/top"`, quote(part.source))
			line(`undo%d() { %s; mountpoint -q "$d/top" || %s; btrfs subvolume delete -c %s; umount "$d/top"; }`, n, unmount, top, snapshot)
			// The snapshot alone would have files that were written and not synced
			// yet with a length of 0.
			line(`make%d() { %s && btrfs filesystem sync %s && btrfs subvolume snapshot -r %s %s && mount --bind %s %s && mount -o remount,bind,ro %s && umount "$d/top"; }`,
				n, top, quote(part.at), quote(part.at), snapshot, snapshot, at, at)
		}
		line(`if said=$(make%d 2>&1 </dev/null); then :; else undo%d 2>/dev/null; %s || exit; undo%d() { %s; }; say live %d "$(echo "$said" | tail -n 1)"; fi`, n, n, bind, n, unmount, i)
	}
	line(`say ready "$d/view/"`)
	line(`bark </dev/null >/dev/null 2>&1 & dog=$!`)
	line(`while read -r line; do kill "$dog"; bark </dev/null >/dev/null 2>&1 & dog=$!; done`)
	return b.String()
}
