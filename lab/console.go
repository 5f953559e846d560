package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
)

// A Console is what a machine has said on its serial line, without the
// terminal's escape sequences. It lives through reboots and power cycles.
type Console struct {
	mu     sync.Mutex
	text   []byte
	read   int           // Expect has seen that much
	more   chan struct{} // closed at the next change
	ended  error         // why no more comes, until the next power on
	escape []byte        // an unfinished escape sequence
}

// NewConsole is the console of nothing yet: write to it what is to be expected.
func NewConsole() *Console { return &Console{more: make(chan struct{})} }

// ErrNotSeen is a console's answer when the wanted text did not come.
var ErrNotSeen = errors.New("not seen")

// Expect waits until pattern (see regexp/syntax) is on one line of the console,
// after everything matched before, and returns the match and its groups. The
// error has the console's last lines.
func (c *Console) Expect(ctx context.Context, pattern string) ([]string, error) {
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	from := c.read
	c.mu.Unlock()
	for {
		c.mu.Lock()
		// The tail without a newline counts: a login prompt has none.
		if m := re.FindSubmatchIndex(c.text[from:]); m != nil {
			groups := make([]string, len(m)/2)
			for i := range groups {
				if start, end := m[2*i], m[2*i+1]; start >= 0 {
					groups[i] = string(c.text[from+start : from+end])
				}
			}
			c.read = from + m[1]
			c.mu.Unlock()
			return groups, nil
		}
		// Characters come one by one: only the last line can still match.
		from += bytes.LastIndexByte(c.text[from:], '\n') + 1
		more, ended := c.more, c.ended
		c.mu.Unlock()
		if ended != nil {
			return nil, fmt.Errorf("console: %q %w: %w: %s", pattern, ErrNotSeen, ended, c.Tail(3))
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, fmt.Errorf("console: %q %w: %w: %s", pattern, ErrNotSeen, context.Cause(ctx), c.Tail(3))
		}
	}
}

// Ended is why nothing more comes, nil while there is power.
func (c *Console) Ended() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// Text is all that has been said.
func (c *Console) Text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}

// Tail is the last n lines that are not empty, on one line.
func (c *Console) Tail(n int) string {
	var lines []string
	for line := range strings.Lines(c.Text()) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], " | ")
}

// Write adds what came over the line.
func (c *Console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, char := range b {
		c.put(char)
	}
	c.changed()
	return len(b), nil
}

// put drops ECMA-48 control sequences, ESC [ ... letter, and two-byte escapes.
func (c *Console) put(char byte) {
	switch {
	case char == 0x1b:
		c.escape = []byte{char}
	case len(c.escape) == 1:
		c.escape = append(c.escape, char)
		if char != '[' {
			c.escape = nil
		}
	case len(c.escape) > 1:
		// Past any real sequence: what looked like one was noise.
		if c.escape = append(c.escape, char); char >= 0x40 || len(c.escape) > 32 {
			c.escape = nil
		}
	case char != '\r' && char != 0:
		c.text = append(c.text, char)
	}
}

func (c *Console) changed() {
	close(c.more)
	c.more = make(chan struct{})
}

// end says why nothing more comes; nil means that the line is open again.
func (c *Console) end(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = why
	c.changed()
}

var _ io.Writer = (*Console)(nil)

// last is the last line of b that is not empty.
func last(b []byte) string {
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return strings.TrimSpace(string(lines[len(lines)-1]))
}
