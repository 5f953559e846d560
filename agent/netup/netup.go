// Package netup brings a machine onto its network: every interface up, DHCP on
// every one that has link, until one is answered.
package netup

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// A NIC is one interface and its state.
type NIC struct {
	Name    string
	MAC     string
	Up      bool
	Carrier bool
}

// A Lease is what DHCP gave to one interface.
type Lease struct {
	NIC         string
	Address     netip.Prefix
	Gateway     netip.Addr // not valid: none
	Nameservers []netip.Addr
	Domain      string
	NextServer  netip.Addr // siaddr, or else the server's identifier: who boots this machine
	Valid       time.Duration
}

// A Network is the machine's network: the Kernel's, or a fake.
type Network interface {
	NICs() ([]NIC, error)
	SetUp(nic string) error
	// Discover asks for a lease on one interface, for at most patience.
	Discover(ctx context.Context, nic string, patience time.Duration) (Lease, error)
	// Configure sets address, routes and name servers; again for the same lease it renews them.
	Configure(Lease) error
}

// How long things take, by the experience of switches: a port without
// "portfast" forwards nothing for 30 s after link.
const (
	poll          = 200 * time.Millisecond
	firstPatience = 2 * time.Second
	longPatience  = 20 * time.Second
	firstComplain = 5 * time.Second
	longComplain  = time.Minute
)

// Up returns when one interface has an address. Until then it keeps trying for
// ever, with growing pauses, and says on log what it sees; it fails only when
// ctx ends.
func Up(ctx context.Context, network Network, log *slog.Logger) (Lease, error) {
	begin := time.Now()
	asking, stop := context.WithCancel(ctx)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer stop()

	leases := make(chan Lease)
	asked := map[string]bool{}
	tick := time.NewTicker(poll)
	defer tick.Stop()
	complain, pause := begin.Add(firstComplain), firstComplain
	var last string // the last error, to say it once
	for {
		nics, err := look(network)
		if err != nil && err.Error() != last {
			last = err.Error()
			log.Warn("network", "err", err)
		}
		for _, nic := range nics {
			if nic.Carrier && !asked[nic.Name] {
				asked[nic.Name] = true
				log.Info("network: link, asking for an address", "nic", nic.Name, "mac", nic.MAC)
				clients.Go(func() { ask(asking, network, nic.Name, leases, log) })
			}
		}
		if !time.Now().Before(complain) {
			pause = min(2*pause, longComplain)
			complain = time.Now().Add(pause)
			log.Warn("network: no address yet: " + Describe(nics) +
				fmt.Sprintf(": tried for %d s, trying on", int(time.Since(begin).Seconds())))
		}
		select {
		case lease := <-leases:
			if err := network.Configure(lease); err != nil {
				log.Error("network: address refused by the kernel", "nic", lease.NIC, "address", lease.Address, "err", err)
				clients.Go(func() { // perhaps the next answer is a better one
					if pauseFor(asking, longPatience) {
						ask(asking, network, lease.NIC, leases, log)
					}
				})
				continue
			}
			log.Info("network: address", "nic", lease.NIC, "address", lease.Address, "gateway", lease.Gateway, "server", lease.NextServer)
			return lease, nil
		case <-tick.C:
		case <-ctx.Done():
			return Lease{}, fmt.Errorf("no address: %s: %w", Describe(nics), context.Cause(ctx))
		}
	}
}

// look lists the interfaces and sets up those that are down.
func look(network Network) ([]NIC, error) {
	nics, err := network.NICs()
	for _, nic := range nics {
		if !nic.Up {
			if e := network.SetUp(nic.Name); e != nil {
				err = fmt.Errorf("%s: set up: %w", nic.Name, e)
			}
		}
	}
	return nics, err
}

// ask asks on one interface until it is answered or ctx ends.
func ask(ctx context.Context, network Network, nic string, leases chan<- Lease, log *slog.Logger) {
	var last string
	for patience := firstPatience; ctx.Err() == nil; patience = min(2*patience, longPatience) {
		begin := time.Now()
		lease, err := network.Discover(ctx, nic, patience)
		if err == nil {
			select {
			case leases <- lease:
			case <-ctx.Done():
			}
			return
		}
		if ctx.Err() == nil && err.Error() != last {
			last = err.Error()
			log.Warn("network: no answer", "nic", nic, "err", err)
		}
		// What failed at once, such as an interface that vanished, waits all the same.
		pauseFor(ctx, patience-time.Since(begin))
	}
}

// pauseFor says whether ctx goes on after d.
func pauseFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// Keep renews lease until ctx ends, so that a machine may wait for days.
func Keep(ctx context.Context, network Network, lease Lease, log *slog.Logger) error {
	wait := lease.Valid / 2
	for pauseFor(ctx, max(wait, 10*time.Second)) {
		fresh, err := network.Discover(ctx, lease.NIC, longPatience)
		if err == nil {
			err = network.Configure(fresh)
		}
		switch {
		case err == nil:
			lease, wait = fresh, fresh.Valid/2
		case ctx.Err() == nil:
			wait /= 2
			log.Warn("network: lease not renewed", "nic", lease.NIC, "address", lease.Address, "err", err)
		}
	}
	return nil
}

// Describe says what interfaces there are and in what state, for a person
// before the screen.
func Describe(nics []NIC) string {
	if len(nics) == 0 {
		return "no network interface found (is its driver in the initramfs?)"
	}
	var parts []string
	for _, nic := range nics {
		state := "no link (cable? switch port?)"
		switch {
		case !nic.Up:
			state = "down"
		case nic.Carrier:
			state = "link, no DHCP answer"
		}
		parts = append(parts, fmt.Sprintf("%s (%s) %s", nic.Name, nic.MAC, state))
	}
	return strings.Join(parts, "; ")
}
