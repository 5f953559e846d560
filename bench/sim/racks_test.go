package sim

import "testing"

// Four racks of eight behind uplinks of a quarter take what they do in transport/swarm's
// TestRacks, where the engine itself runs: 1.07 to 1.13 of what the uplinks allow, and the
// uplinks carry 1.06 to 1.11 copies.
func TestRacks(t *testing.T) {
	const pieces, rate = 512, 512 * 64 << 10 / 30
	r := Run(Scenario{N: 32, Bytes: pieces * 64 << 10, Piece: 64 << 10, Rate: rate, MTU: 9000, Window: 64 << 10, Rack: 8, Uplink: rate / 4})
	t.Logf("last %.3f of what the uplinks allow, copies by an uplink %.3f, egress %.3f", r.TOverIdeal/4, r.UplinkCopies, r.Egress)
	if last := r.TOverIdeal / 4; r.Unfinished > 0 || last < 1.02 || last > 1.18 {
		t.Errorf("%d unfinished, last %.3f, want 1.02 to 1.18", r.Unfinished, last)
	}
	if r.UplinkCopies < 1.02 || r.UplinkCopies > 1.16 {
		t.Errorf("copies by an uplink %.3f, want 1.02 to 1.16", r.UplinkCopies)
	}
}

// In racks of more nodes than one has connections mates leave some of these to others: without
// them a rack would get all it has from the server, and 1,000 nodes take six times as long.
func TestLargeRacks(t *testing.T) {
	r := Run(Scenario{N: 400, Bytes: 512 << 20, Piece: 2 << 20, Rate: 125e6, MTU: 1500, Packet: 512 << 10, Window: 2 << 20, Rack: 40, Uplink: 1250e6})
	t.Logf("last %.3f, egress %.3f, copies by an uplink %.3f", r.TOverIdeal, r.Egress, r.UplinkCopies)
	if r.Unfinished > 0 || r.TOverIdeal > 2 {
		t.Errorf("%d unfinished, last %.3f, want at most 2", r.Unfinished, r.TOverIdeal)
	}
}
