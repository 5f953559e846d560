package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"rookery/server/dhcpd"
	"rookery/server/dhcpd/dhcpdtest"
	"rookery/server/store"
)

func TestSubnets(t *testing.T) {
	own := netip.MustParsePrefix("10.7.0.1/24")
	for _, tt := range []struct {
		name string
		c    dhcpConfig
		want string // prefix first-last router, one subnet after the other
		err  string
	}{
		{name: "fixed addresses only", want: "10.7.0.0/24 invalid IP-invalid IP invalid IP"},
		{name: "pool", c: dhcpConfig{pools: []string{"10.7.0.100-10.7.0.200"}, routers: []string{"10.7.0.254"}},
			want: "10.7.0.0/24 10.7.0.100-10.7.0.200 10.7.0.254"},
		{name: "behind a relay",
			c:    dhcpConfig{pools: []string{"10.8.0.10-10.8.0.20/24"}, routers: []string{"10.7.0.254", "10.8.0.254"}},
			want: "10.7.0.0/24 invalid IP-invalid IP 10.7.0.254 10.8.0.0/24 10.8.0.10-10.8.0.20 10.8.0.254"},
		{name: "elsewhere", c: dhcpConfig{pools: []string{"10.8.0.10-10.8.0.20"}}, err: "is not inside 10.7.0.0/24"},
		{name: "backwards", c: dhcpConfig{pools: []string{"10.7.0.9-10.7.0.3"}}, err: "10.7.0.3 comes before 10.7.0.9"},
		{name: "twice", c: dhcpConfig{pools: []string{"10.7.0.3-10.7.0.9", "10.7.0.30-10.7.0.90"}}, err: "has a pool already"},
		{name: "one address", c: dhcpConfig{pools: []string{"10.7.0.3"}}, err: "want FIRST-LAST"},
		{name: "nonsense", c: dhcpConfig{pools: []string{"a-b"}}, err: `pool "a-b"`},
		{name: "bad length", c: dhcpConfig{pools: []string{"10.8.0.3-10.8.0.9/x"}}, err: `prefix length "x"`},
		{name: "bad dns", c: dhcpConfig{dns: []string{"ns1"}}, err: `dns: "ns1" is not an IPv4 address`},
		{name: "bad router", c: dhcpConfig{routers: []string{"gw"}}, err: `router: "gw" is not an IPv4 address`},
		{name: "dns by IPv6", c: dhcpConfig{dns: []string{"fd00::1"}}, err: `dns: "fd00::1" is not an IPv4 address`},
		{name: "pool of IPv6", c: dhcpConfig{pools: []string{"fd00::1-fd00::9/64"}}, err: "want IPv4 addresses"},
		{name: "router elsewhere", c: dhcpConfig{routers: []string{"10.8.0.1"}}, err: "router: 10.8.0.1 is in none of the networks that have addresses: 10.7.0.0/24"},
		{name: "two routers", c: dhcpConfig{routers: []string{"10.7.0.2", "10.7.0.3"}}, err: "router: 10.7.0.2 and 10.7.0.3 are both in 10.7.0.0/24"},
	} {
		all, err := tt.c.subnets(own)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %v, want %s", tt.name, err, tt.err)
			}
			continue
		}
		var got []string
		for _, s := range all {
			got = append(got, fmt.Sprintf("%v %v-%v %v", s.Prefix, s.First, s.Last, s.Router))
		}
		if err != nil || strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %s, %v, want %s", tt.name, strings.Join(got, " "), err, tt.want)
		}
	}
}

func TestOwnAddress(t *testing.T) {
	if p, err := ownAddress("lo", ""); err != nil || p.String() != "127.0.0.1/8" {
		t.Errorf("ownAddress(lo): %v, %v", p, err)
	}
	if p, err := ownAddress("lo", "127.0.0.1"); err != nil || p.Bits() != 8 {
		t.Errorf("ownAddress(lo, 127.0.0.1): %v, %v", p, err)
	}
	if _, err := ownAddress("lo", "10.7.0.1/24"); err == nil || !strings.Contains(err.Error(), "has 127.0.0.1/8") {
		t.Errorf("ownAddress of another address: %v", err)
	}
	if _, err := ownAddress("nosuch0", ""); err == nil || !strings.Contains(err.Error(), `"nosuch0"`) {
		t.Errorf("ownAddress of no interface: %v", err)
	}
}

func TestLeasesAreKeptAmongTheRecords(t *testing.T) {
	records := store.Memory()
	dhcpdtest.Run(t, func(t *testing.T) dhcpd.Leases { return leases{t.Context(), records} })
}

func TestCompareVersions(t *testing.T) {
	for _, tt := range []struct{ a, b string }{
		{"vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-10-amd64"},
		{"vmlinuz-5.10.0-30-amd64", "vmlinuz-6.1.0-9-amd64"},
		{"vmlinuz-6.1.0-9", "vmlinuz-6.1.0-9-amd64"},
	} {
		if compareVersions(tt.a, tt.b) >= 0 || compareVersions(tt.b, tt.a) <= 0 {
			t.Errorf("compareVersions: %s is not before %s", tt.a, tt.b)
		}
	}
}
