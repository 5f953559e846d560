package oci_test

import (
	"encoding/json"
	"strings"
	"testing"

	"rookery/image/oci"
	"rookery/wire"
)

func marshal(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func index(t testing.TB) string {
	entry := func(name string) oci.Content {
		return oci.Content{MediaType: oci.TypeManifest, Digest: wire.DigestOf([]byte(name)), Size: 100, Annotations: map[string]string{oci.KeyRefName: name}}
	}
	return marshal(t, oci.Index{SchemaVersion: 2, MediaType: oci.TypeIndex, Manifests: []oci.Content{entry("a:1"), entry("a:2")}})
}

func config(t testing.TB) string {
	c := oci.Config{Architecture: "amd64", OS: "linux", Config: oci.Run{Labels: map[string]string{oci.LabelHost: "golden"}}}
	c.RootFS.DiffIDs = []wire.Digest{wire.DigestOf(nil), wire.DigestOf([]byte("x"))}
	return marshal(t, c)
}

// bad has parse refuse good with something replaced.
type bad struct{ name, old, new, want string }

func refuse(t *testing.T, good string, parse func([]byte) error, all []bad) {
	if err := parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range all {
		b := strings.Replace(good, tt.old, tt.new, 1)
		if b == good {
			t.Errorf("%s: %q is not there", tt.name, tt.old)
		}
		if err := parse([]byte(b)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestParseIndex(t *testing.T) {
	refuse(t, index(t), func(b []byte) error { _, err := oci.ParseIndex(b); return err }, []bad{
		{"no JSON", "{", "", "invalid character"},
		{"another version", `"schemaVersion":2`, `"schemaVersion":1`, "version 1"},
		{"another type", "image.index.v1", "image.index.v2", "is \"application/vnd.oci.image.index.v2+json\""},
		{"no manifests", `"manifests"`, `"manifest"`, "with manifests: false"},
		{"a manifest of another type", "image.manifest.v1", "image.index.v1", "manifest 0: is "},
		{"a digest", "sha256:", "sha256:0", "sha256 has 65 digits"},
		{"no name", oci.KeyRefName, "x", "manifest 0: name is \"\""},
		{"a name twice", "a:2", "a:1", "manifest 1: name is \"a:1\": want one of its own"},
		{"a size", `"size":100`, `"size":0`, "manifest 0: 0 bytes"},
		{"a size", `"size":100`, `"size":99999999`, "manifest 0: 99999999 bytes"},
		{"too large", "{", "{" + strings.Repeat(" ", oci.MaxIndex), "at most 67108864 are read"},
	})
}

func TestParseConfig(t *testing.T) {
	refuse(t, config(t), func(b []byte) error { _, err := oci.ParseConfig(b, 2); return err }, []bad{
		{"no JSON", "{", "", "config: invalid character"},
		{"no diff IDs", "diff_ids", "x", "config: 0 diff IDs, manifest has 2 layers"},
		{"a diff ID", "sha256:", "md5:", "config: diff ID 0: "},
		{"too large", "{", "{" + strings.Repeat(" ", oci.MaxManifest), "at most 4194304 are read"},
	})
}

func FuzzIndex(f *testing.F) {
	f.Add([]byte(index(f)))
	f.Add([]byte(`{"schemaVersion":2,"manifests":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := oci.ParseIndex(b)
		if err != nil {
			return
		}
		for _, c := range x.Manifests {
			if c.Digest.Check() != nil || c.Annotations[oci.KeyRefName] == "" || c.Size < 1 || c.Size > oci.MaxManifest {
				t.Fatalf("%+v", c)
			}
		}
		if _, err := oci.ParseIndex([]byte(marshal(t, x))); err != nil {
			t.Fatalf("it does not read what it wrote: %v", err)
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(config(f)))
	f.Add([]byte(`{"rootfs":{"diff_ids":null}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := oci.ParseConfig(b, 2)
		if err != nil {
			return
		}
		for _, d := range c.RootFS.DiffIDs {
			if err := d.Check(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
