package lab

import (
	"context"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestConsole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewConsole()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()

		got := make(chan []string, 1)
		go func() {
			m, _ := c.Expect(ctx, `(\w+) login: `)
			got <- m
		}()
		// In pieces, with escapes cut anywhere, without a last newline.
		for _, s := range []string{"\x1bc\x1b[2", "J\x1b[01;31mboo", "ting\x1b[0m\r\nDebian\r\n", "n1 lo", "gin: "} {
			io.WriteString(c, s)
			synctest.Wait()
		}
		if m := <-got; !reflect.DeepEqual(m, []string{"n1 login: ", "n1"}) {
			t.Errorf("match %q", m)
		}
		if want := "booting\nDebian\nn1 login: "; c.Text() != want {
			t.Errorf("text %q, want %q", c.Text(), want)
		}

		// What was matched is not matched again; the error has the last lines.
		_, err := c.Expect(ctx, "login")
		if !errors.Is(err, ErrNotSeen) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "Debian | n1 login:") {
			t.Errorf("second login: %v", err)
		}
		c.end(io.EOF)
		if _, err := c.Expect(t.Context(), "more"); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
	})
}
