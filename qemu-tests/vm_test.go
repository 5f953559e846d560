package qemutests

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"rookery/disklayout"
	"rookery/lab"
	"rookery/server/fleet"
	"rookery/wire"
)

// These stories are told by real firmware.

func TestABIOSAndAUEFINodeInstallTogetherAndStartFromTheirOwnDisks(t *testing.T) {
	s := begin(t, 8*time.Minute, record(1, "")+record(2, ""))
	s.must(s.server.Start(s.ctx))
	nodes := []*lab.VM{s.vm(1, disklayout.BIOS, 0), s.vm(2, disklayout.UEFI, 0)}

	var views []fleet.View
	for i, vm := range nodes {
		v := s.until(i+1, installed)
		if v.Firmware != vm.Firmware {
			t.Errorf("%s says it has %s firmware, it has %s", v.Name, v.Firmware, vm.Firmware)
		}
		views = append(views, v)
	}
	if shared := views[0].Fetch.FromPeers + views[1].Fetch.FromPeers; shared == 0 {
		t.Errorf("two nodes at the same time shared nothing: %+v, %+v", *views[0].Fetch, *views[1].Fetch)
	}
	for i, vm := range nodes {
		s.starts(vm, layered)
		vm.PowerOff()
		s.holds(views[i])
	}
}

func TestANodeOutlivesItsServerAndItsPower(t *testing.T) {
	s := begin(t, 8*time.Minute, record(1, ""))
	s.must(s.server.Start(s.ctx))
	vm := s.vm(1, disklayout.UEFI, 0)
	before := s.until(1, fetched(5))
	s.must(s.server.Kill())
	s.must(s.server.Start(s.ctx))
	again := s.until(1, func(v fleet.View) bool { return v.Fetch != nil && v.Percent > before.Percent })
	if len(again.Boots) != 1 {
		t.Errorf("the agent started %d times, want the one that was there before the server was killed", len(again.Boots))
	}
	s.must(vm.PowerCycle())
	after := s.until(1, installed)
	if after.ID != before.ID || len(after.Boots) != 2 {
		t.Errorf("installation %s of boot %v became %s of %v, want the same of two boots", before.ID, before.Boots, after.ID, after.Boots)
	}
	s.starts(vm, layered)
}

// The machine is unknown, then accepted by an impostor, then known to its own
// server, which wants more of it than it has. It is started once for all of it.
func TestAnUnknownMachineWaitsAndRefusesWhatIsNotRight(t *testing.T) {
	const size = 200 << 20
	s := begin(t, 4*time.Minute, "")
	restore := s.impostor()
	vm := s.vm(1, disklayout.BIOS, size)
	s.expect(vm.Console, "waiting: this machine is "+mac(1))
	nodes, err := s.server.Admin().Nodes(s.ctx)
	s.must(err)
	if len(nodes) != 1 || !nodes[0].New || nodes[0].MAC != mac(1) || nodes[0].Firmware != disklayout.BIOS {
		t.Errorf("nodes: %+v, want the new one", nodes)
	}

	s.rookery("node", "accept", mac(1), "--name", "n1", "--image", "debian12")
	s.expect(vm.Console, "script: FAILED .*signature")
	restore()
	s.expect(vm.Console, "plan: FAILED .*too small")
	tooSmall(t, s.retried(1, func(v fleet.View) bool { return v.Error != nil && v.Error.Step == wire.PhasePlan }), size)
	if v, err := s.server.Admin().Node(s.ctx, "n1"); err != nil || len(v.Boots) != 1 {
		t.Errorf("n1 started %d times (%v), want once", len(v.Boots), err)
	}
	vm.PowerOff()
	untouched(t, filepath.Join(vm.Dir, "disk.img"))
}

// starts waits until vm has started from its own disk, by the server's word and
// with its own name. issue begins the /etc/issue of its image.
func (s *site) starts(vm *lab.VM, issue string) {
	s.t.Helper()
	s.expect(vm.Console, fmt.Sprintf("%s .* starts from its own disk", vm.Name))
	s.expect(vm.Console, issue+" "+vm.Name)
	s.expect(vm.Console, vm.Name+" login: ")
}
