// Package capture makes trees: from a machine that runs, over ssh and rsync, and
// from a distribution's packages.
package capture
