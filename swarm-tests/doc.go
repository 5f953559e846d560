// Package swarmtests has the stories of a swarm to which something happens: a
// server and eight nodes in network namespaces, and what is the worst that a
// machine room or a neighbour does to them.
package swarmtests
