package rookery_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every test that docs/features.md names is there.
func TestFeaturesNameTestsThatExist(t *testing.T) {
	text, err := os.ReadFile("docs/features.md")
	if err != nil {
		t.Fatal(err)
	}
	word := regexp.MustCompile("`([a-z0-9/-]+)`|\\b(Test\\w+)")
	named := 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 {
			continue
		}
		dir := ""
		for _, m := range word.FindAllStringSubmatch(cells[3], -1) {
			if m[1] != "" {
				dir = m[1]
				continue
			}
			named++
			if !hasTest(t, dir, m[2]) {
				t.Errorf("docs/features.md:%s: no %s in %s", cells[1], m[2], dir)
			}
		}
	}
	if named < 20 {
		t.Errorf("docs/features.md names %d tests: is the table still read right?", named)
	}
}

func hasTest(t *testing.T, dir, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "func "+name+"(") {
			return true
		}
	}
	return false
}
