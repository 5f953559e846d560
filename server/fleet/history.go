package fleet

import (
	"slices"

	"rookery/wire"
)

// A NodeEvent is an event with the node it happened on.
type NodeEvent struct {
	N    int64  `json:"n"` // grows with every event of the fleet, also over restarts
	Node string `json:"node"`
	wire.Event
}

// Bounds of the history that is kept of one node.
const (
	maxHistory      = 300
	maxHistoryBytes = 64 << 10
)

// remember is history with e at its end, and within its bounds: log lines go
// first, so that the story of the phases is kept the longest.
func remember(history []NodeEvent, e NodeEvent) []NodeEvent {
	history = append(slices.Clone(history), e)
	bytes := 0
	for _, e := range history {
		bytes += e.size()
	}
	for len(history) > maxHistory || bytes > maxHistoryBytes {
		i := max(0, slices.IndexFunc(history, func(e NodeEvent) bool { return e.State == wire.Log }))
		bytes -= history[i].size()
		history = slices.Delete(history, i, i+1)
	}
	return history
}

// size is about how many bytes e takes in the store.
func (e NodeEvent) size() int { return 200 + len(e.Text) }
