package fixup

import (
	"fmt"
	"slices"
	"strings"

	"rookery/disklayout"
)

func (m machine) fstab() (string, error) {
	if len(m.plan.Partitions) == 0 { // an installation into a directory
		return "", nil
	}
	old, err := m.read("etc/fstab")
	if err != nil {
		return "", err
	}
	text, n := withMounts(old, m.plan)
	return fmt.Sprintf("%d filesystems by UUID", n), m.write("etc/fstab", text, 0o644)
}

// withMounts is an fstab with the plan's filesystems; n is how many those are.
// Lines about network and virtual filesystems stay. Those about disks of the
// machine that the image was made on are kept as comments, since booting would
// wait for them.
func withMounts(old string, plan disklayout.Plan) (text string, n int) {
	out := []string{}
	for _, p := range plan.Mounts() {
		options, pass := "defaults", 2
		switch {
		case p.Mount == "/":
			options, pass = "errors=remount-ro", 1
		case p.Type == disklayout.ESP:
			options = "umask=0077"
		}
		out = append(out, fmt.Sprintf("UUID=%s %s %s %s 0 %d", p.FSUUID, p.Mount, p.FS, options, pass))
	}
	for _, p := range plan.Partitions {
		if p.FS == disklayout.SwapFS {
			out = append(out, fmt.Sprintf("UUID=%s none swap sw 0 0", p.FSUUID))
		}
	}
	n = len(out)
	const note = "# not on this machine: "
	for _, line := range lines(old) {
		f := strings.Fields(line)
		switch {
		case strings.Contains(line, "UNCONFIGURED FSTAB"), slices.Contains(out, line):
		case len(f) < 3 || strings.HasPrefix(f[0], "#"):
			out = append(out, line)
		case plan.At(f[1]).Number != 0:
		case !local(f[0]) || len(f) > 3 && optional(f[3]):
			out = append(out, line)
		default:
			out = append(out, note+line)
		}
	}
	return strings.Join(out, "\n") + "\n", n
}

// local says whether an fstab's first field is about a disk. Loop mounts of
// files are not; neither are mapped devices of a network, but who knows.
func local(device string) bool {
	for _, prefix := range []string{"UUID=", "LABEL=", "PARTUUID=", "PARTLABEL=", "ID=", "/dev/"} {
		if strings.HasPrefix(device, prefix) {
			return true
		}
	}
	return false
}

// optional says whether booting goes on without a filesystem with these options.
func optional(options string) bool {
	list := strings.Split(options, ",")
	return slices.Contains(list, "noauto") || slices.Contains(list, "nofail")
}
