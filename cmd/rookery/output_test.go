package main

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// A reader of YAML sees what a reader of JSON sees: names, strings that look
// like numbers, nothing.
func TestYAMLIsTheSameAsJSON(t *testing.T) {
	value := []imageView{{
		Name: "debian12:1", Tags: []string{"debian12:7"}, Manifest: "sha256:0123", Size: 1 << 40, Created: time.Unix(1e9, 0).UTC(),
		Layers: []layerView{{Digest: "12", Blob: "/a b/\u00e9\x00\n\"c\": <d>"}, {Digest: "~"}},
	}}
	var asJSON, text bytes.Buffer
	if err := show(&asJSON, "json", value, nil); err != nil {
		t.Fatal(err)
	}
	if err := show(&text, "yaml", value, nil); err != nil {
		t.Fatal(err)
	}
	var want, got any
	if err := json.Unmarshal(asJSON.Bytes(), &want); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text.Bytes(), &got); err != nil {
		t.Fatalf("%v\n%s", err, &text)
	}
	again, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	var back any
	if err := json.Unmarshal(again, &back); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, want) {
		t.Errorf("yaml:\n%s\njson:\n%s", &text, &asJSON)
	}
	if !bytes.HasPrefix(text.Bytes(), []byte("- name: debian12:1\n  tags:\n    - debian12:7\n  manifest: sha256:0123\n  size: 1099511627776\n")) {
		t.Errorf("yaml:\n%s", &text)
	}
}
