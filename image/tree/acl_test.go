package tree_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"rookery/image"
	"rookery/image/imagetest"
	"rookery/image/tree"
)

// GNU tar writes ACLs as text, with names where it knows some.
func TestACLsOfGNUTar(t *testing.T) {
	imagetest.Root(t)
	d := t.TempDir()
	script := `set -e; cd "$1"; mkdir -p etc dir; echo x > file; echo x > plain; ln file other
grep -E '^(daemon|bin|nobody):' /etc/passwd > etc/passwd; grep -E '^(daemon|adm):' /etc/group > etc/group
setfacl -m u:nobody:rw,u:daemon:r,u:1234:-,g:4000000000:x,g:adm:rw,m::r file
setfacl -m u:bin:r,g::w dir; setfacl -d -m u:daemon:rwx dir
echo y > dir/inherits; setfacl -m u::r,g::-,o::r plain; chmod 0600 etc/passwd`
	if out, err := exec.Command("sh", "-c", script, "sh", d).CombinedOutput(); err != nil {
		t.Skipf("%v: %s: install acl (scripts/deps)", err, out)
	}
	tr, err := tree.FromDir(d, tree.Excludes{})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	want, err := image.Write(&b, tr.Entries, tr.Open)
	tr.Close()
	if err != nil {
		t.Fatal(err)
	}
	index := readIndex(t, b.Bytes(), want)
	for _, opts := range []string{"--acls", "--acls --xattrs", "--acls --numeric-owner", "--acls --xattrs --xattrs-include=*"} {
		t.Run(opts, func(t *testing.T) {
			tarball := filepath.Join(t.TempDir(), "tar")
			args := append(strings.Fields(opts), "--format=posix", "-cf", tarball, "-C", d, ".")
			if out, err := exec.Command("tar", args...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			tr, err := tree.FromTar(t.Context(), tarball, t.TempDir(), tree.Excludes{}, nil)
			same(t, tr, err, want, index)
		})
	}
}

func TestACLText(t *testing.T) {
	const base = "user::rw-\ngroup::r--\nother::---\n"
	passwd := member{Header: tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd"}, content: "root:x:0:0::/:/bin/sh\n\nshort:x\nlisa:x:502:502::/:/bin/sh\nlisa:x:1:1:::\n"}
	for _, tt := range []struct {
		name, text string
		want       string // tag perm id
		err        string
	}{
		{name: "no more than the mode", text: base},
		{name: "nothing", text: " \n"},
		{name: "names and numbers", text: base + "user:lisa:rwx\nuser:7:r--\ngroup:8:-w-\nmask::r-x", want: "1 6 -, 2 4 7, 2 7 502, 4 4 -, 8 2 8, 16 5 -, 32 0 -"},
		{name: "commas, short, effective", text: "u::rw,u:lisa:rwx #effective:r--,g::r,m:r,o:-", want: "1 6 -, 2 7 502, 4 4 -, 16 4 -, 32 0 -"},
		{name: "star's numbers", text: base + "user:else:r--:77,mask::r--", want: "1 6 -, 2 4 77, 4 4 -, 16 4 -, 32 0 -"},
		{name: "mask alone", text: base + "mask::r--", want: "1 6 -, 4 4 -, 16 4 -, 32 0 -"},

		{name: "unknown user", text: base + "user:bart:rwx\nmask::rwx", err: `"f": ACL entry "user:bart:rwx": etc/passwd of the tree has no "bart"`},
		{name: "no groups", text: base + "group:bart:rwx\nmask::rwx", err: `etc/group of the tree: is not there`},
		{name: "no mask", text: base + "user:1:rwx", err: "no entry for each of"},
		{name: "no others", text: "user::rw-\ngroup::r--", err: "no entry for each of"},
		{name: "twice", text: base + "user::r--", err: `"user::r--": comes twice`},
		{name: "the same user twice", text: base + "user:lisa:r--\nuser:502:r--\nmask::r", err: "comes twice"},
		{name: "permissions", text: base + "mask::rq-", err: `permissions "rq-"`},
		{name: "permissions twice", text: base + "mask::rr-", err: `permissions "rr-"`},
		{name: "tag", text: base + "everyone::rwx", err: `unknown tag "everyone"`},
		{name: "fields", text: base + "user", err: "1 fields"},
		{name: "mask of a user", text: base + "mask:lisa:r--", err: "mask with the name"},
		{name: "no id", text: base + "user:4294967295:r--", err: "is none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for key, xattr := range map[string]string{"SCHILY.acl.access": "system.posix_acl_access", "SCHILY.acl.default": "system.posix_acl_default"} {
				f := member{Header: tar.Header{Typeflag: tar.TypeDir, Name: "f", PAXRecords: map[string]string{key: tt.text}}}
				tr, err := tree.FromTar(t.Context(), write(t, []member{f, passwd}), t.TempDir(), tree.Excludes{}, nil)
				if tt.err != "" {
					if err == nil || !strings.Contains(err.Error(), tt.err) {
						t.Fatalf("FromTar: %v, want %q", err, tt.err)
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				tr.Close()
				var got []string
				v := tr.Entries[3].Xattrs[xattr]
				for i := 4; i < len(v); i += 8 {
					id := "-"
					if n := uint32(v[i+4]) | uint32(v[i+5])<<8 | uint32(v[i+6])<<16 | uint32(v[i+7])<<24; n != 1<<32-1 {
						id = fmt.Sprint(n)
					}
					got = append(got, fmt.Sprint(v[i], " ", v[i+2], " ", id))
				}
				want := tt.want
				if tt.name == "no more than the mode" && key == "SCHILY.acl.default" {
					want = "1 6 -, 4 4 -, 32 0 -" // of what is made in the directory
				}
				if s := strings.Join(got, ", "); s != want {
					t.Errorf("%s: got %s, want %s", key, s, want)
				}
			}
		})
	}
}

func FuzzACL(f *testing.F) {
	f.Add("user::rw-\nuser:lisa:rwx\ngroup::r--\nmask::rwx\nother::---\n", "root:x:0\nlisa:x:502:")
	f.Add("u::rw,u:lisa:rwx #effective:r--,g::r,m:r,o:-", "")
	f.Fuzz(func(t *testing.T, text, passwd string) {
		value, err := tree.ACL(text, passwd)
		if err == nil && value != "" && (len(value)-4)%8 != 0 {
			t.Fatalf("%q: %q", text, value)
		}
	})
}

// A tarball says where it is broken.
func TestBrokenTarballs(t *testing.T) {
	whole := write(t, []member{file("a", strings.Repeat("x", 5000)), file("b", "1"), file("c", "2")})
	b, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	pack := func(tool string, b []byte) []byte {
		t.Helper()
		cmd := exec.Command(tool, "-c")
		cmd.Stdin = bytes.NewReader(b)
		out, err := cmd.Output()
		if err != nil {
			t.Skipf("%s: %v: install it", tool, err)
		}
		return out
	}
	flip := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at] ^= 4
		return b
	}
	packed := func(tool string, cut int) []byte { p := pack(tool, b); return p[:len(p)-cut] }
	for _, tt := range []struct {
		name string
		b    []byte
		want string
	}{
		{"empty", nil, "ends without the mark"},
		{"no tarball", bytes.Repeat([]byte("text "), 1000), "at byte 512 of 5000, after the beginning: archive/tar: invalid tar header"},
		{"header cut", b[:100], "at byte 100 of 100, after the beginning: unexpected EOF"},
		{"content cut", b[:3000], `"a": content at 512+5000, tarball ends at 3000`},
		{"last content's padding cut", b[:6700], `after "b"`},
		{"cut between members", b[:5632], "ends without the mark"},
		{"cut between members later", b[:6656], "ends without the mark"},
		{"flipped name", flip(b, 5632), `at byte 6144 of 8704, after "a": archive/tar: invalid tar header`},
		{"gzip cut", packed("gzip", 9), "unpack: after 8704 bytes: unexpected EOF"},
		{"gzip flipped", flip(packed("gzip", 0), len(packed("gzip", 0))-6), "unpack: after 8704 bytes: gzip: invalid checksum"},
		{"zstd cut", packed("zstd", 9), "unpack: after"},
		{"xz cut", packed("xz", 9), "unpack: xz:"},
		{"gzip of nothing", pack("gzip", nil), "ends without the mark"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "t.tar")
			if err := os.WriteFile(name, tt.b, 0o644); err != nil {
				t.Fatal(err)
			}
			temp := t.TempDir()
			tr, err := tree.FromTar(t.Context(), name, temp, tree.Excludes{}, nil)
			if err == nil {
				tr.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "tarball "+name) {
				t.Errorf("FromTar: %v, want %q", err, tt.want)
			}
			if left, _ := os.ReadDir(temp); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	if tr, err := tree.FromLayers(t.TempDir(), tree.Excludes{}, stream("no mark", b[:6656])); err != nil {
		t.Errorf("a layer without the mark: %v", err)
	} else {
		tr.Close()
	}
}
