package main

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"rookery/server/fleet"
	"rookery/wire"
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

// What turned a node's phases another way is shown, on lines of their own.
func TestShowTellsTurns(t *testing.T) {
	var b strings.Builder
	at := time.Date(2026, 11, 26, 14, 5, 37, 0, time.Local)
	describe(&b, fleet.View{Name: "n1", Turns: []fleet.Turn{{Phase: wire.PhaseFetch, Time: at, Text: "http joins bittorrent:\x1b[2J no new bytes"}}})
	if want := "turn\t14:05:37 fetch: http joins bittorrent: [2J no new bytes\n"; !strings.Contains(b.String(), want) {
		t.Errorf("%q, want %q in it", b.String(), want)
	}
}

func TestShowTellsTheSwitch(t *testing.T) {
	var b strings.Builder
	nic := wire.NIC{Name: "eth0", MAC: "52:54:00:00:00:01", Neighbor: &wire.Neighbor{Switch: "leaf07", Port: "Gi1/0/7"}}
	describe(&b, fleet.View{Name: "n1", Rack: &fleet.Rack{Name: "leaf07", From: "LLDP"}, Inventory: &wire.Inventory{NICs: []wire.NIC{nic, {Name: "eth1"}}}})
	for _, want := range []string{"rack\tleaf07 (LLDP)\n", "switch\tleaf07 Gi1/0/7 (eth0)\n"} {
		if strings.Count(b.String(), want) != 1 {
			t.Errorf("%q, want %q in it", b.String(), want)
		}
	}
}
