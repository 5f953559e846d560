package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// A meter shows how far something is on one line of a terminal. Where standard
// error is none it says nothing. Its methods may be called from any goroutine.
type meter struct {
	what        string
	began       time.Time
	done, total atomic.Int64
	stop        func() // takes the line away
}

// startMeter starts a meter of what cmd does, in bytes. A total of 0 is not
// known yet.
func startMeter(cmd *cobra.Command, what string, total int64) *meter {
	m := &meter{what: what, began: time.Now(), stop: func() {}}
	m.total.Store(total)
	if f, ok := cmd.ErrOrStderr().(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		m.drawOn(f, func() int {
			width, _, err := term.GetSize(int(f.Fd()))
			if err != nil || width == 0 { // a serial console does not say
				return 80
			}
			return width
		})
	}
	return m
}

// redraw is how often the line changes.
const redraw = 200 * time.Millisecond

func (m *meter) drawOn(w io.Writer, width func() int) {
	quit := make(chan struct{})
	var drawing sync.WaitGroup
	drawing.Go(func() {
		tick := time.NewTicker(redraw)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				fmt.Fprint(w, "\r\x1b[K", bar(width(), m.what, m.done.Load(), m.total.Load(), time.Since(m.began)))
			case <-quit:
				fmt.Fprint(w, "\r\x1b[K")
				return
			}
		}
	})
	m.stop = sync.OnceFunc(func() {
		close(quit)
		drawing.Wait()
	})
}

func (m *meter) add(n int64) { m.done.Add(n) }
func (m *meter) read(n int)  { m.done.Add(int64(n)) }

func (m *meter) set(done, total int64) {
	m.done.Store(done)
	m.total.Store(total)
}

// reader counts what is read of r.
func (m *meter) reader(r io.ReadCloser) io.ReadCloser { return meteredReader{r, m} }

type meteredReader struct {
	io.ReadCloser
	meter *meter
}

func (r meteredReader) Read(b []byte) (int, error) {
	n, err := r.ReadCloser.Read(b)
	r.meter.add(int64(n))
	return n, err
}

// bar is the line of a terminal of that width when done of total bytes, 0 being
// not known, took so long.
func bar(width int, what string, done, total int64, took time.Duration) string {
	rate := 0.0
	if took > 0 {
		rate = float64(done) / took.Seconds()
	}
	text := fmt.Sprintf("%s, %s/s", size(done), size(int64(rate)))
	if total > 0 {
		done = min(done, total)
		text = fmt.Sprintf("%3d %% of %s, %s/s", done*100/total, size(total), size(int64(rate)))
		if left := float64(total-done) / max(rate, 1); took > time.Second && left < 100*3600 {
			text += fmt.Sprintf(", %s left", time.Duration(left*float64(time.Second)).Round(time.Second))
		}
	}
	line := what + ": " + text
	// The last column stays empty: some terminals go on to the next line there.
	const frame = len("  []")
	if room := min(width-1-len(line)-frame, 40); total > 0 && room >= 10 {
		full := int(done * int64(room) / total)
		line = fmt.Sprintf("%s: [%s%s]  %s", what, strings.Repeat("#", full), strings.Repeat(".", room-full), text)
	}
	if len(line) >= width {
		line = line[:max(width-1, 0)]
	}
	return line
}
