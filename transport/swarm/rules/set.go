package rules

// A Set is a set of pieces.
type Set []uint64

// NewSet has room for pieces below n, and none.
func NewSet(n int) Set { return make(Set, (n+63)/64) }

func (s Set) Has(n int) bool { return s[n/64]>>(n%64)&1 == 1 }
func (s Set) Add(n int)      { s[n/64] |= 1 << (n % 64) }
