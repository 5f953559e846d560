// Package qemutests has the stories of whole sites: what happens between the
// power button and the login prompt, on virtual machines with real firmware
// and, where that does not matter, on agents in network namespaces.
package qemutests
