package loader

import (
	"reflect"
	"strings"
	"testing"
)

func TestKernels(t *testing.T) {
	got := kernels([]string{
		"vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-56-amd64", "vmlinuz-6.12.1-amd64", "vmlinuz-0-rescue-b09e", "vmlinuz", "vmlinuz-",
		"initrd.img-6.1.0-56-amd64", "initramfs-6.12.1-amd64.img", "initrd-6.1.0-9-amd64", "System.map-6.1.0-9-amd64", "grub",
	})
	want := []kernel{
		{"6.12.1-amd64", "vmlinuz-6.12.1-amd64", "initramfs-6.12.1-amd64.img"},
		{"6.1.0-56-amd64", "vmlinuz-6.1.0-56-amd64", "initrd.img-6.1.0-56-amd64"},
		{"6.1.0-9-amd64", "vmlinuz-6.1.0-9-amd64", "initrd-6.1.0-9-amd64"},
		{"0-rescue-b09e", "vmlinuz-0-rescue-b09e", ""},
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("kernels: %+v, want %+v", got, want)
	}
}

func TestCompareVersions(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"6.1.0-9", "6.1.0-10", -1}, {"6.10", "6.9", 1}, {"6.1", "6.1", 0}, {"6.1", "6.1.1", -1},
		{"6.1.007", "6.1.7", 0}, {"5.14.0-427.el9", "5.14.0-70.el9", 1}, {"a", "1", 1},
	} {
		if got := compareVersions(tt.a, tt.b); got != tt.want {
			t.Errorf("compareVersions(%s, %s): %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

// A /boot of its own has the kernels at its top, and a kernel without an
// initramfs cannot find a filesystem by its UUID.
func TestConfigOfOwnBoot(t *testing.T) {
	m := menu{
		title: "Bob's", fsModule: "ext2", fsUUID: "B", dir: "/", root: "UUID=R", bareRoot: "PARTUUID=P",
		kernels: []kernel{{"1", "vmlinuz-1", ""}},
	}
	want := "menuentry 'Bob'\\''s, 1' {\n\tlinux /vmlinuz-1 root=PARTUUID=P ro\n}\n"
	if got := m.config(); !strings.HasSuffix(got, "--set=root B\n"+want) {
		t.Fatalf("config:\n%s\nwant at its end:\n%s", got, want)
	}
}

func TestGRUBSerial(t *testing.T) {
	for in, want := range map[string]string{
		"ttyS0,115200": "serial --unit=0 --speed=115200", "ttyS1,57600n8": "serial --unit=1 --speed=57600",
		"ttyS2": "serial --unit=2 --speed=115200", "": "", "ttyAMA0": "", "ttyS": "", "ttySX": "",
	} {
		if got := grubSerial(in); got != want {
			t.Errorf("grubSerial(%q): %q, want %q", in, got, want)
		}
	}
}

func TestSetDefaults(t *testing.T) {
	settings := []setting{{"A", "1"}, {"B", `x "y" $z`}}
	for in, want := range map[string]string{
		"":                              "A=\"1\"\nB=\"x \\\"y\\\" \\$z\"\n",
		"A=0\n# B=2\nC=3\nA=4":          "A=\"1\"\n# B=2\nC=3\nB=\"x \\\"y\\\" \\$z\"\n",
		"B=\"x \\\"y\\\" \\$z\"\nA=1\n": "B=\"x \\\"y\\\" \\$z\"\nA=\"1\"\n",
	} {
		if got := setDefaults(in, settings); got != want {
			t.Errorf("setDefaults(%q): %q, want %q", in, got, want)
		}
		if got := shellValue(setDefaults(in, settings), "B"); got != settings[1].value {
			t.Errorf("read back: %q, want %q", got, settings[1].value)
		}
	}
}
