package report

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"rookery/wire"
)

// A Console shows events on the terminals of a machine. A terminal that does
// not take what is written (a serial port with flow control and nobody there)
// loses lines and holds nobody up.
type Console struct {
	screens []*screen
	wg      sync.WaitGroup
}

// A Screen is one terminal. Redraw means that a progress line can be drawn
// over the last one; others get a line now and then.
type Screen struct {
	W      io.Writer
	Redraw bool
}

type screen struct {
	Screen
	lines chan shown
	drawn bool      // the cursor stands on a progress line
	last  time.Time // of the last progress line
}

// shown is what one event looks like.
type shown struct {
	text     string
	progress bool
	at       time.Time
}

// seldom is the time between progress lines where they cannot be redrawn.
const seldom = 5 * time.Second

// NewConsole starts writing to the screens, until Close.
func NewConsole(screens ...Screen) *Console {
	c := &Console{}
	for _, s := range screens {
		scr := &screen{Screen: s, lines: make(chan shown, 256)}
		c.screens = append(c.screens, scr)
		c.wg.Go(func() {
			for line := range scr.lines {
				_, _ = io.WriteString(scr.W, scr.render(line)) // a console that is gone is nobody's error
			}
		})
	}
	return c
}

// Show shows one event.
func (c *Console) Show(e wire.Event) {
	c.show(shown{text: Line(e), progress: e.State == wire.Progress, at: e.Time})
}

// Print shows lines of text as they are.
func (c *Console) Print(text string) {
	c.show(shown{text: strings.TrimSuffix(text, "\n"), at: time.Now()})
}

func (c *Console) show(line shown) {
	for _, s := range c.screens {
		select {
		case s.lines <- line:
		default:
		}
	}
}

// Close writes out what waits, for at most patience, and stops.
func (c *Console) Close(patience time.Duration) {
	for _, s := range c.screens {
		close(s.lines)
	}
	done := make(chan struct{})
	go func() { c.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience): // a terminal that stands still; the process is about to end
	}
}

// render is what to write for a line, by what is on the screen now.
func (s *screen) render(line shown) string {
	const erase = "\r\x1b[K"
	var b strings.Builder
	if s.drawn {
		b.WriteString(erase)
		s.drawn = false
	}
	switch {
	case !line.progress:
		b.WriteString(strings.ReplaceAll(line.text, "\n", "\r\n") + "\r\n")
	case s.Redraw:
		b.WriteString("\r" + line.text)
		s.drawn = true
	case line.at.Sub(s.last) >= seldom:
		s.last = line.at
		b.WriteString(line.text + "\r\n")
	}
	return b.String()
}

// Line is an event as people read it: "fetch: finished in 3.1 s: debian12:1".
func Line(e wire.Event) string {
	var b strings.Builder
	b.WriteString("rookery: ")
	if e.State == wire.Log {
		b.WriteString(e.Text)
		return printable(b.String())
	}
	b.WriteString(string(e.Phase))
	switch {
	case e.State == wire.Progress && e.Fetch != nil:
		b.WriteString(" " + Bar(*e.Fetch))
		return b.String()
	case e.State == wire.Failed:
		b.WriteString(": FAILED")
	case e.State != wire.Progress && e.State != wire.Switched:
		b.WriteString(": " + string(e.State))
	}
	if e.Took > 0 {
		fmt.Fprintf(&b, " after %.1f s", e.Took)
	}
	if e.Text != "" {
		b.WriteString(": " + e.Text)
	}
	return printable(b.String())
}

// printable keeps what came from elsewhere from steering a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f || 0x80 <= r && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// Bar is a transfer in so few columns that its line has less than 80: a longer
// one cannot be drawn over.
func Bar(t wire.Transfer) string {
	const width = 16
	percent := int64(0)
	if t.Total > 0 {
		percent = max(0, min(100, 100*t.Done/t.Total))
	}
	full := int(percent * width / 100)
	return fmt.Sprintf("[%s%s] %3d%% of %.1f MB %6.1f MB/s %d peers",
		strings.Repeat("#", full), strings.Repeat(".", width-full), percent,
		mega(t.Total), mega(t.Rate), t.Peers)
}

func mega(n int64) float64 { return float64(n) / 1e6 }
