package report

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
)

// Logger is a log whose lines go where the events go.
func (r *Reporter) Logger() *slog.Logger { return slog.New(handler{r: r}) }

type handler struct {
	r     *Reporter
	attrs string
	group string
}

func (h handler) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

func (h handler) Handle(_ context.Context, record slog.Record) error {
	var b strings.Builder
	if record.Level >= slog.LevelWarn {
		b.WriteString(strings.ToLower(record.Level.String()) + ": ")
	}
	b.WriteString(record.Message + h.attrs)
	record.Attrs(func(a slog.Attr) bool {
		b.WriteString(attr(h.group, a))
		return true
	})
	h.r.Log(b.String())
	return nil
}

func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	for _, a := range attrs {
		h.attrs += attr(h.group, a)
	}
	return h
}

func (h handler) WithGroup(name string) slog.Handler {
	h.group += name + "."
	return h
}

func attr(group string, a slog.Attr) string {
	if a.Equal(slog.Attr{}) {
		return ""
	}
	value := a.Value.Resolve().String()
	if strings.ContainsAny(value, " \"=") {
		value = fmt.Sprintf("%q", value)
	}
	return " " + group + a.Key + "=" + value
}
