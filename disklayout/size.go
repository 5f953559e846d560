package disklayout

import (
	"fmt"
	"strconv"
	"strings"
)

// Binary units of bytes.
const (
	KiB = 1 << 10
	MiB = 1 << 20
	GiB = 1 << 30
	TiB = 1 << 40
)

// maxSize is far above any disk; sums of 128 of it still fit into an int64.
const maxSize = 1 << 55

// A Size is how large a partition is to be: exactly one of its fields is set.
type Size struct {
	Bytes   int64
	Percent int  // of the whole disk, 1 to 99
	Rest    bool // what the other partitions leave
}

var units = []struct {
	suffix string
	bytes  int64
}{
	{"KiB", KiB}, {"MiB", MiB}, {"GiB", GiB}, {"TiB", TiB},
	{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12},
}

// ParseSize reads "512MiB" (also KiB, GiB, TiB and the decimal kB, MB, GB,
// TB), "20%" or "*".
func ParseSize(s string) (Size, error) {
	if s == "*" {
		return Size{Rest: true}, nil
	}
	if digits, ok := strings.CutSuffix(s, "%"); ok {
		n, err := number(digits)
		if err != nil || n < 1 || n > 99 {
			return Size{}, fmt.Errorf("size %.40q: want a whole number of 1 to 99 before the %%", s)
		}
		return Size{Percent: int(n)}, nil
	}
	for _, u := range units {
		digits, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := number(strings.TrimSuffix(digits, " "))
		if err != nil || n < 1 || n > maxSize/u.bytes {
			return Size{}, fmt.Errorf("size %.40q: want a whole number before %s, from 1 to %d", s, u.suffix, maxSize/u.bytes)
		}
		return Size{Bytes: n * u.bytes}, nil
	}
	return Size{}, fmt.Errorf(`size %.40q: want a number with MiB, GiB or TiB, a percentage, or "*"`, s)
}

// number reads digits alone: strconv would also take a sign.
func number(s string) (int64, error) {
	if strings.Trim(s, "0123456789") != "" {
		return 0, strconv.ErrSyntax
	}
	return strconv.ParseInt(s, 10, 64)
}

// human writes bytes for people, in the largest unit that leaves it readable.
func human(bytes int64) string {
	for _, u := range []struct {
		suffix string
		bytes  int64
	}{{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB}} {
		if bytes >= u.bytes {
			return strconv.FormatFloat(float64(bytes*10/u.bytes)/10, 'f', -1, 64) + " " + u.suffix
		}
	}
	return strconv.FormatInt(bytes, 10) + " B"
}
