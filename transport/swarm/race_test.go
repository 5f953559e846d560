//go:build race

package swarm

const raced = true
