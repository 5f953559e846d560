package main

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		times []time.Duration
		want  time.Duration
	}{
		{nil, 0},
		{[]time.Duration{7}, 7},
		{[]time.Duration{9, 1, 5}, 5},
		{[]time.Duration{100, 2, 4, 1}, 3},
	} {
		if got := median(tt.times); got != tt.want {
			t.Errorf("median(%v) = %v, want %v", tt.times, got, tt.want)
		}
	}
}

func TestTable(t *testing.T) {
	rows := []row{
		{what: "speed", value: 1.999, op: atLeast, asked: 2, detail: "2 s, 1 s"},
		{what: "enough", value: 2, op: atLeast, asked: 2},
		{what: "size", value: 1.05, op: atMost, asked: 1.05},
		{what: "opened", value: 0, unit: "files", op: atMost, asked: 0},
		{what: "opened too", value: 1, unit: "files", op: atMost, asked: 0},
		{what: "by the way", value: 3.14159, unit: "s"},
	}
	const want = `| what | measured | asked | | of |
|---|---|---|---|---|
| speed | 1.999 | >= 2.000 | **MISSED** | 2 s, 1 s |
| enough | 2.000 | >= 2.000 | ok |  |
| size | 1.050 | <= 1.050 | ok |  |
| opened | 0 files | <= 0 files | ok |  |
| opened too | 1 files | <= 0 files | **MISSED** |  |
| by the way | 3.142 s |  |  |  |
`
	var b strings.Builder
	writeTable(&b, rows)
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
	if line, ok := summary(rows); ok || line != "bench: MISSED 2 of 5: speed; opened too" {
		t.Errorf("%q, %v", line, ok)
	}
	if line, ok := summary(rows[1:4]); !ok || line != "bench: all 3 ok" {
		t.Errorf("%q, %v", line, ok)
	}
}

func TestRace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts filesystems: run it as root")
	}
	r := &runner{ctx: t.Context(), work: t.TempDir(), rounds: 2}
	first := []string{"sh", "-c", `[ ! -e "$0/mine" ] && touch "$0/mine"`} // fails where another was before
	times, err := r.race(first, append(first[:2:2], first[2]+" && true"))
	if err != nil || len(times) != 2 || times[0] <= 0 {
		t.Fatalf("%v, %v", times, err)
	}
	if _, err := r.race([]string{"ls", "/does/not/exist"}); err == nil || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Error(err)
	}
	if left, err := os.ReadDir(r.work); err != nil || len(left) != 1 || left[0].Name() != "fresh" {
		t.Errorf("left: %v, %v", left, err)
	}
}
