package main

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestBar(t *testing.T) {
	const M = 1 << 20
	for _, tt := range []struct {
		name        string
		width       int
		done, total int64
		took        time.Duration
		want        string
	}{
		{"wide", 100, 30 * M, 120 * M, 3 * time.Second, "import a:1: [##########..............................]   25 % of 120 MiB, 10 MiB/s, 9s left"},
		{"narrow", 72, 30 * M, 120 * M, 3 * time.Second, "import a:1: [#####...............]   25 % of 120 MiB, 10 MiB/s, 9s left"},
		{"no room for a bar", 60, 30 * M, 120 * M, 3 * time.Second, "import a:1:  25 % of 120 MiB, 10 MiB/s, 9s left"},
		{"no room", 20, 30 * M, 120 * M, 3 * time.Second, "import a:1:  25 % o"},
		{"no terminal's width", 0, 30 * M, 120 * M, 3 * time.Second, ""},
		{"just begun", 60, 0, 120 * M, 0, "import a:1: [....................]    0 % of 120 MiB, 0 B/s"},
		{"nothing comes", 60, 0, 120 * M, time.Minute, "import a:1: [....................]    0 % of 120 MiB, 0 B/s"},
		{"all", 60, 120 * M, 120 * M, 3 * time.Second, "import a:1: 100 % of 120 MiB, 40 MiB/s, 0s left"},
		{"more than all", 60, 121 * M, 120 * M, 121 * time.Second, "import a:1: 100 % of 120 MiB, 1 MiB/s, 0s left"},
		{"who knows", 60, 30 * M, 0, 3 * time.Second, "import a:1: 30 MiB, 10 MiB/s"},
	} {
		got := bar(tt.width, "import a:1", tt.done, tt.total, tt.took)
		if got != tt.want || tt.width > 0 && len(got) >= tt.width {
			t.Errorf("%s:\n got %q\nwant %q", tt.name, got, tt.want)
		}
	}
}

func TestMeterCountsAndCleansUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		m := &meter{what: "import a:1", began: time.Now()}
		m.total.Store(2048)
		m.drawOn(&out, func() int { return 50 })
		if _, err := io.Copy(io.Discard, m.reader(io.NopCloser(strings.NewReader(strings.Repeat("x", 1024))))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(redraw) // of the bubble
		synctest.Wait()
		m.stop()
		m.stop()
		if got := out.String(); !strings.Contains(got, " 50 % of 2 KiB") || !strings.HasSuffix(got, "\r\x1b[K") {
			t.Errorf("%q", got)
		}
	})
}
