package apply

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// maxHolders is how many holders of a busy mount point an error names.
const maxHolders = 8

// holders says what keeps a mount point busy: mounts below it, and processes
// with files, their root or their program there. It is for an error message, so
// what cannot be read is left out.
func holders(point string) string {
	var found []string
	below := func(path string) bool { return strings.HasPrefix(path, point+"/") || path == point }
	if f, err := os.Open("/proc/self/mountinfo"); err == nil {
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if fields := strings.Fields(lines.Text()); len(fields) > 4 && fields[4] != point && below(fields[4]) {
				found = append(found, "mount "+fields[4])
			}
		}
	}
	links, _ := filepath.Glob("/proc/[0-9]*/*")
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range append(links, fds...) {
		target, err := os.Readlink(link)
		if err != nil || !below(target) {
			continue
		}
		pid := strings.Split(link, "/")[2]
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		found = append(found, fmt.Sprintf("%s (%s) %s", link, strings.TrimSpace(string(name)), target))
	}
	if len(found) > maxHolders {
		found = append(found[:maxHolders], fmt.Sprintf("%d more", len(found)-maxHolders))
	}
	if found == nil {
		return "nothing to be seen in /proc"
	}
	return strings.Join(found, ", ")
}
