package tree_test

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"rookery/image/imagetest"
	"rookery/image/tree"
)

func excludes(t testing.TB, lines ...string) tree.Excludes {
	t.Helper()
	x, err := tree.ParseExcludes("lines", strings.NewReader(strings.Join(lines, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// plant makes files, and directories where a name ends in a slash.
func plant(t testing.TB, paths ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, p := range paths {
		full := filepath.Join(dir, p)
		if strings.HasSuffix(p, "/") {
			p = p[:len(p)-1]
		} else {
			full = filepath.Dir(full)
		}
		if err := os.MkdirAll(full, 0o755); err != nil {
			t.Fatal(err)
		}
		if full == filepath.Join(dir, p) {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, p), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// chosen are the paths that FromDir takes.
func chosen(t testing.TB, dir string, x tree.Excludes) []string {
	t.Helper()
	tr, err := tree.FromDir(dir, x)
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	var paths []string
	for _, e := range tr.Entries[1:] {
		paths = append(paths, e.Path)
	}
	slices.Sort(paths)
	return paths
}

func TestExcludes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		lines []string
		paths []string // what is left out begins with a minus
	}{
		{"nothing", nil, []string{"a", "b/c"}},
		{"comments and blanks", []string{"# a", "", "  \t", "b  ", "c\r"}, []string{"a", "-b", "-c"}},
		{"name", []string{"x"}, []string{"-x", "d/-x", "d/xx", "e/-x/y"}},
		{"anchored", []string{"/x"}, []string{"-x", "d/x"}},
		{"anchored deeper", []string{"/d/x"}, []string{"d/-x", "x", "e/d/x"}},
		{"contents", []string{"/d/*"}, []string{"d/", "d/-x", "d/-y/z", "e/d/x"}},
		{"directory only", []string{"x/"}, []string{"-x/y", "d/x"}},
		{"one name", []string{"/*.log", "/d/?", "/e/[a-c!]", "/f/[!a]"}, []string{"-a.log", "d/a.log", "d/-x", "d/xy", "e/-b", "e/d", "e/-!", "f/a", "f/-b"}},
		{"any depth between", []string{"/a/**/b"}, []string{"a/-b", "a/x/-b", "a/x/y/-b", "b", "a/c", "a/xb"}},
		{"any depth before", []string{"**/a/b"}, []string{"a/-b", "x/a/-b", "b", "x/b"}},
		{"all inside", []string{"/a/**"}, []string{"a/", "a/-b", "a/-c/d", "b"}},
		{"everything", []string{"**"}, []string{"-a", "-b/c"}},
		{"all but", []string{"/*", "!/etc"}, []string{"-a", "-b/c", "etc/passwd"}},
		{"last wins", []string{"*.deb", "!keep.deb", "/x/*"}, []string{"-a.deb", "keep.deb", "x/-keep.deb"}},
		{"nothing below what is left out", []string{"/d", "!/d/x"}, []string{"-d/x"}},
		{"kept in what is emptied", []string{"/d/*", "!/d/x"}, []string{"d/x/y", "d/-z"}},
		{"escapes", []string{`\#a`, `\!b`, `\fs:c`, `d\*`, `e\ `, `f\[`}, []string{"-#a", "-!b", "-fs:c", "-d*", "dd", `b\\x`, "-e ", "e", "-f["}},
		{"bracket in a class", []string{`[]a]`, `b[\]-]`}, []string{"-]", "-a", "-b]", "-b-", "b"}},
		{"stars", []string{"a*b*c"}, []string{"-abc", "-axbxc", "abcd", "-abcbc"}},
		{"bytes", []string{"ä", "x?"}, []string{"-ä", "-xy", "xä"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var want, all []string
			for _, p := range tt.paths {
				kept, _, dropped := strings.Cut("/"+p, "/-")
				plain := strings.TrimPrefix(strings.Replace("/"+p, "/-", "/", 1), "/")
				all = append(all, plain)
				if !dropped {
					kept = plain
				}
				for kept = strings.Trim(kept, "/"); kept != "" && kept != "."; kept = filepath.Dir(kept) {
					want = append(want, kept)
				}
			}
			slices.Sort(want)
			want = slices.Compact(want)
			dir, x := plant(t, all...), excludes(t, tt.lines...)
			if got := chosen(t, dir, x); !slices.Equal(got, want) {
				t.Errorf("FromDir took %q, want %q", got, want)
			}
			if got := rsynced(t, dir, x.Rsync(nil)); !slices.Equal(got, want) {
				t.Errorf("rsync took %q, want %q, by %q", got, want, x.Rsync(nil))
			}
			var members []member
			for _, p := range all {
				if strings.HasSuffix(p, "/") {
					members = append(members, dirMember(p))
				} else {
					members = append(members, file(p, ""))
				}
			}
			tr, err := tree.FromTar(t.Context(), write(t, members), t.TempDir(), x, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer tr.Close()
			var got []string
			for _, e := range tr.Entries[1:] {
				got = append(got, e.Path)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("FromTar took %q, want %q", got, want)
			}
		})
	}
}

func dirMember(name string) member { return dir(name) }

// rsynced are the paths that rsync copies by these rules.
func rsynced(t testing.TB, dir string, rules []string) []string {
	t.Helper()
	if _, err := exec.LookPath("rsync"); err != nil {
		t.Skipf("%v: run scripts/deps", err)
	}
	to := t.TempDir()
	args := []string{"-r"}
	for _, r := range rules {
		args = append(args, "--filter="+r)
	}
	if out, err := exec.Command("rsync", append(args, dir+"/", to+"/")...).CombinedOutput(); err != nil {
		t.Fatalf("rsync %q: %v: %s", args, err, out)
	}
	var paths []string
	err := filepath.WalkDir(to, func(p string, _ fs.DirEntry, err error) error {
		if p != to {
			paths = append(paths, strings.TrimPrefix(p, to+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(paths)
	return paths
}

// Whatever the patterns, rsync takes what FromDir takes.
func TestExcludesAsRsync(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 1))
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	names := []string{"a", "b", "ab", "a b", "a*", "[a]", `a\b`, "ä", ".a", "#a", "!a", "- a", "-", "a?"}
	var paths []string
	for range 120 {
		p := pick(names...)
		for range r.IntN(4) {
			p += "/" + pick(names...)
		}
		paths = append(paths, p+"/")
	}
	for i := range 80 {
		paths = append(paths, pick(paths...)+fmt.Sprintf("f%d", i%7))
	}
	dir := plant(t, paths...)
	globs := []string{"*", "a*", "?", "[ab]", "[!a]", "[^a-z]", "a", "b", "ab", "a b", `a\*`, `\[a\]`, `a\\b`, "ä", ".*", "*b", "f[0-4]", "f?", `[[a\]-]*`, "**", `\#a`, "a?", "- a"}
	for range 40 {
		var lines []string
		for range 1 + r.IntN(6) {
			line := pick("", "", "!") + pick("/", "/", "**/")
			for n := range 1 + r.IntN(3) {
				if n > 0 {
					line += "/"
				}
				line += pick(globs...)
			}
			if r.IntN(3) == 0 {
				line = pick("", "!") + pick(globs[:15]...)
			}
			lines = append(lines, line+pick("", "", "/"))
		}
		x := excludes(t, lines...)
		got, want := rsynced(t, dir, x.Rsync(nil)), chosen(t, dir, x)
		if !slices.Equal(got, want) {
			more := slices.DeleteFunc(slices.Clone(got), func(p string) bool { return slices.Contains(want, p) })
			less := slices.DeleteFunc(slices.Clone(want), func(p string) bool { return slices.Contains(got, p) })
			t.Fatalf("%q: rsync takes more: %.9q, less: %.9q, by %q", lines, more, less, x.Rsync(nil))
		}
	}
}

func TestBadExcludes(t *testing.T) {
	for line, want := range map[string]string{
		"var/cache":                 `site:2: "var/cache": which directory`,
		"/":                         "empty name",
		"!":                         "empty name",
		"/a//b":                     "empty name",
		"/a/../b":                   `name ".."`,
		"[a":                        "without its ]",
		"[":                         "without its ]",
		"[z-a]":                     "from",
		"[ä]":                       "ASCII",
		`a\`:                        "ends in a backslash",
		"a**":                       "part of a name",
		"/**b/c":                    "part of a name",
		"/**/a/**/b/**/c/**/d/**/e": "more than 4 times",
		"fs:":                       "empty",
		"a\x00":                     "NUL",
		strings.Repeat("x", 1<<17):  "site:2: ",
	} {
		_, err := tree.ParseExcludes("site", strings.NewReader("# first\n"+line+"\n/last\n"))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "site:2: ") {
			t.Errorf("%.40q: %v, want %q", line, err, want)
		}
	}
}

func TestBuiltinExcludes(t *testing.T) {
	dir := plant(t, "proc/1/", "sys/x/", "dev/pts/", "run/x/", "tmp/x", "var/tmp/x", "var/tmp/systemd-private-1/tmp/", "lost+found/#1", "home/lost+found/",
		"swapfile", "swap.img", "swap/file", "home/swapfile", "var/cache/apt/pkgcache.bin", "var/cache/apt/archives/lock", "var/cache/apt/archives/a.deb", "root/a.deb")
	want := []string{"dev", "home", "home/swapfile", "proc", "root", "root/a.deb", "run", "swap", "sys", "tmp", "var", "var/cache", "var/cache/apt",
		"var/cache/apt/archives", "var/cache/apt/archives/lock", "var/tmp", "var/tmp/x"}
	if got := chosen(t, dir, tree.Builtin()); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if got := rsynced(t, dir, tree.Builtin().Rsync(nil)); !slices.Equal(got, want) {
		t.Errorf("rsync: got  %q\nwant %q", got, want)
	}
	kept := chosen(t, dir, tree.Builtin().With(excludes(t, "!/swapfile")))
	if !slices.Contains(kept, "swapfile") {
		t.Error("a later line does not keep /swapfile")
	}
}

func TestMountedFilesystems(t *testing.T) {
	imagetest.Root(t)
	dir := plant(t, "a b\n/", "c/", "d/")
	for _, m := range []string{"a b\n", "c", "d"} {
		at := filepath.Join(dir, m)
		fs := "tmpfs"
		if m == "d" {
			fs = "ramfs"
		}
		if err := unix.Mount("none", at, fs, 0, ""); err != nil {
			t.Skipf("mount: %v: run as a root who may", err)
		}
		t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
		if err := os.Mkdir(filepath.Join(at, "x"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		lines []string
		want  []string
	}{
		{nil, []string{"a b\n", "a b\n/x", "c", "c/x", "d", "d/x"}},
		{[]string{"fs:tmpfs"}, []string{"a b\n", "c", "d", "d/x"}},
		{[]string{"fs:*", "!fs:ram*"}, []string{"a b\n", "c", "d", "d/x"}},
		{[]string{"fs:tmpfs", "fs:ramfs", "!/d/x"}, []string{"a b\n", "c", "d"}},
	} {
		x := excludes(t, tt.lines...)
		if got := chosen(t, link, x); !slices.Equal(got, tt.want) {
			t.Errorf("%q: got %q, want %q", tt.lines, got, tt.want)
		}
		info, err := os.Open("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		mounts, err := tree.ParseMounts(info, dir)
		info.Close()
		if err != nil || len(mounts) != 3 {
			t.Fatalf("mounts: %v, %v", mounts, err)
		}
		if got := rsynced(t, dir, x.Rsync(mounts)); !slices.Equal(got, tt.want) {
			t.Errorf("%q: rsync took %q, want %q", tt.lines, got, tt.want)
		}
	}
	if got := chosen(t, filepath.Join(dir, "c"), excludes(t, "fs:tmpfs")); len(got) != 1 {
		t.Errorf("a tree on a tmpfs: got %q", got)
	}
}

func FuzzParseExcludes(f *testing.F) {
	for _, s := range []string{"/a/**/b\n!*.x\nfs:nfs*\n# c\n[!a-z]\\ \n", "[]]\n", "/**\n"} {
		f.Add(s, "a/b/c")
	}
	f.Fuzz(func(t *testing.T, lines, p string) {
		x, err := tree.ParseExcludes("f", strings.NewReader(lines))
		if err != nil {
			if !strings.HasPrefix(err.Error(), "f:") {
				t.Fatal(err)
			}
			return
		}
		for _, r := range x.Rsync(tree.Mounts{p: "nfs"}) {
			if !strings.HasPrefix(r, "- ") && !strings.HasPrefix(r, "+ ") {
				t.Fatalf("rule %q", r)
			}
		}
		tree.Drop(x, p)
	})
}
