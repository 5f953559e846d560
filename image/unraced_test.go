package image_test

import "testing"

// unraced is said by a test that moves gigabytes, with nothing in it for the race
// detector to find.
func unraced(t *testing.T) {
	t.Helper()
	if raced {
		t.Skip("takes minutes with the race detector: run it without -race, as `make unit` does too")
	}
}
