package wire

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"unicode"

	"rookery/disklayout"
)

// scriptVersion is the one version of a Script that this package understands.
const scriptVersion = 1

// signedAs keeps a signature over a script from being good for anything else
// that the site's key may sign.
const signedAs = "rookery install script 1\x00"

// ErrSignature says that an envelope was not signed by the site's key.
var ErrSignature = errors.New("signature does not match the site's key")

type envelope struct {
	Payload   []byte `json:"payload"`
	Signature []byte `json:"signature"`
}

// Seal checks s and returns it as a signed envelope.
func Seal(s Script, key ed25519.PrivateKey) ([]byte, error) {
	if err := s.Check(); err != nil {
		return nil, fmt.Errorf("script: %w", err)
	}
	payload, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("script: %w", err)
	}
	return json.Marshal(envelope{payload, ed25519.Sign(key, signed(payload))})
}

// Open returns the script in an envelope once its signature, its form and its
// values are right. The error for a foreign signature is ErrSignature.
func Open(sealed []byte, key ed25519.PublicKey) (Script, error) {
	var e envelope
	if len(sealed) > MaxScript {
		return Script{}, fmt.Errorf("script: envelope has %d bytes, at most %d are read", len(sealed), MaxScript)
	}
	if err := Strict(sealed, &e); err != nil {
		return Script{}, fmt.Errorf("script: envelope: %w", err)
	}
	if len(key) != ed25519.PublicKeySize {
		return Script{}, fmt.Errorf("script: site key has %d bytes, want %d", len(key), ed25519.PublicKeySize)
	}
	if !ed25519.Verify(key, signed(e.Payload), e.Signature) {
		return Script{}, fmt.Errorf("script: %w", ErrSignature)
	}
	var s Script
	if err := Strict(e.Payload, &s); err != nil {
		return Script{}, fmt.Errorf("script: %w", err)
	}
	if err := s.Check(); err != nil {
		return Script{}, fmt.Errorf("script: %w", err)
	}
	return s, nil
}

func signed(payload []byte) []byte { return append([]byte(signedAs), payload...) }

// Strict decodes b into v and refuses unknown keys and trailing data.
func Strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		var bad *json.UnmarshalTypeError
		if !errors.As(err, &bad) {
			return errors.New(strings.TrimPrefix(err.Error(), "json: "))
		}
		where := ""
		if bad.Field != "" {
			where = bad.Field + ": "
		}
		return fmt.Errorf("%s%s, want %s", where, bad.Value, jsonName(bad.Type.Kind()))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("data after the value, at byte %d of %d", d.InputOffset(), len(b))
	}
	return nil
}

// jsonName is what JSON calls the values of a kind of Go's.
func jsonName(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "string"
	case reflect.Bool:
		return "bool"
	case reflect.Slice, reflect.Array:
		return "array"
	case reflect.Struct, reflect.Map:
		return "object"
	case reflect.Float32, reflect.Float64:
		return "number"
	}
	return "whole number"
}

// Transports are the names a script's transports can have.
var Transports = []string{"bittorrent", "multicast", "http", "rsync"}

// Check says which key of s has a value that nobody can carry out, or nil.
func (s Script) Check() error {
	if s.Version != scriptVersion {
		return fmt.Errorf("version: %d, this program understands %d", s.Version, scriptVersion)
	}
	if !isHex(s.ID, 32) {
		return fmt.Errorf("id: %.80q is not 32 hex digits", s.ID)
	}
	if err := CheckHostname(s.Node); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	if s.Image.Name == "" {
		return errors.New("image.name: missing")
	}
	if err := s.Image.Manifest.Check(); err != nil {
		return fmt.Errorf("image.manifest: %w", err)
	}
	if len(s.Transports) == 0 {
		return errors.New("transports: none given")
	}
	for i, t := range s.Transports {
		if !slices.Contains(Transports, t) {
			return fmt.Errorf("transports: %.80q is not one of %s", t, strings.Join(Transports, ", "))
		}
		if slices.Contains(s.Transports[:i], t) {
			return fmt.Errorf("transports: %q stands twice", t)
		}
	}
	if s.Multicast != nil {
		if err := s.Multicast.Check(); err != nil {
			return fmt.Errorf("multicast.%w", err)
		}
	}
	if len(s.Mirrors) > maxMirrors {
		return fmt.Errorf("mirrors: %d, want at most %d", len(s.Mirrors), maxMirrors)
	}
	for _, m := range s.Mirrors {
		if err := checkMirror(m); err != nil {
			return fmt.Errorf("mirrors: %w", err)
		}
	}
	if err := checkRate(s.Upload); err != nil {
		return fmt.Errorf("uploadLimit: %w", err)
	}
	if err := checkRate(s.Download); err != nil {
		return fmt.Errorf("downloadLimit: %w", err)
	}
	if err := s.Layout.Check(); err != nil {
		return fmt.Errorf("layout: %w", err)
	}
	if err := s.Identity.Check(); err != nil {
		return fmt.Errorf("identity.%w", err)
	}
	if s.SeedFor < 0 || s.SeedFor > maxSeedFor {
		return fmt.Errorf("seedFor: %d seconds, want 0 to %d", s.SeedFor, maxSeedFor)
	}
	if err := s.Ending.Check(); err != nil {
		return fmt.Errorf("ending: %w", err)
	}
	if err := s.OnFailure.Check(); err != nil {
		return fmt.Errorf("onFailure: %w", err)
	}
	return nil
}

// Check says which key of m nobody can listen by.
func (m Multicast) Check() error {
	group, err := netip.ParsePrefix(m.Group)
	if err != nil || !group.Addr().IsMulticast() || group.Addr().Is4In6() || group.Bits() < 8 {
		return fmt.Errorf("group: %.80q is not a range of multicast addresses such as 239.192.0.0/16 or ff15::1:0/112", m.Group)
	}
	server, err := netip.ParseAddr(m.Server)
	if err != nil || server.Is4() != group.Addr().Is4() || server.Zone() != "" {
		return fmt.Errorf("server: %.80q is not an address that sends to %s", m.Server, group)
	}
	if m.Port == 0 {
		return errors.New("port: 0, want 1 to 65535")
	}
	if err := checkRate(m.Rate); err != nil {
		return fmt.Errorf("rate: %w", err)
	}
	return nil
}

const (
	maxMirrors = 16
	minRate    = 16 << 10 // a second: a block of a piece
)

// checkMirror says why no layer is found by adding its digest to url. The
// agent has no certificates but the site's own, so it is plain HTTP.
func checkMirror(mirror string) error {
	u, err := url.Parse(mirror)
	if err != nil || u.Scheme != "http" || u.Hostname() == "" || u.User != nil || !strings.HasSuffix(u.Path, "/") || u.String() != mirror ||
		strings.ContainsAny(mirror, "?#") {
		return fmt.Errorf("%.80q is not the URL of layers without their digest, such as http://192.0.2.2:5000/v2/NAME/blobs/", mirror)
	}
	return nil
}

func checkRate(rate int64) error {
	if rate != 0 && rate < minRate {
		return fmt.Errorf("%d bytes a second, want 0 or at least %d", rate, minRate)
	}
	return nil
}

// ParseRate reads a limit in bytes a second: "10MB", "512KiB", or "none", which
// is 0, as "" is.
func ParseRate(s string) (int64, error) {
	if s == "" || s == "none" {
		return 0, nil
	}
	size, err := disklayout.ParseSize(s)
	if err != nil || size.Bytes == 0 {
		return 0, fmt.Errorf("%.40q is not a rate: want bytes a second, such as 10MB or 512KiB, or none", s)
	}
	return size.Bytes, checkRate(size.Bytes)
}

// maxSeedFor bounds how long a finished node may hold up its own start: a day.
const maxSeedFor = 24 * 60 * 60

// Check says whether e is an ending that exists.
func (e Ending) Check() error {
	switch e {
	case Reboot, Poweroff, Shell, Exit:
		return nil
	}
	return fmt.Errorf("%.80q is not one of reboot, poweroff, shell, exit", string(e))
}

// Check says which key of i has a bad value. What passes can be written into
// configuration files without quoting: no value holds a newline.
func (i Identity) Check() error {
	if err := CheckHostname(i.Hostname); err != nil {
		return fmt.Errorf("hostname: %w", err)
	}
	if i.Domain != "" {
		for label := range strings.SplitSeq(i.Domain, ".") {
			if err := CheckHostname(label); err != nil {
				return fmt.Errorf("domain: %w", err)
			}
		}
	}
	if !isHex(i.MachineID, 32) {
		return fmt.Errorf("machineID: %.80q is not 32 hex digits", i.MachineID)
	}
	for _, n := range i.Network {
		if err := n.check(); err != nil {
			return fmt.Errorf("network: %w", err)
		}
	}
	for _, ns := range i.Nameservers {
		if _, err := netip.ParseAddr(ns); err != nil {
			return fmt.Errorf("nameservers: %.80q is not an IP address", ns)
		}
	}
	for _, k := range i.AuthorizedKeys {
		if len(strings.Fields(k)) < 2 || hasControl(k) {
			return fmt.Errorf("authorizedKeys: %.80q is not a key in authorized_keys form", k)
		}
	}
	if hasControl(i.KernelArgs) {
		return fmt.Errorf("kernelArgs: %.80q has control characters", i.KernelArgs)
	}
	if strings.ContainsAny(i.KernelArgs, "\"'\\$`;{}") {
		return fmt.Errorf("kernelArgs: %.80q has characters that the boot loader's configuration takes for its own", i.KernelArgs)
	}
	if strings.Trim(i.Serial, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,") != "" {
		return fmt.Errorf("serial: %.80q is not a console such as ttyS0,115200", i.Serial)
	}
	return nil
}

func (n Network) check() error {
	if _, err := net.ParseMAC(n.MAC); err != nil {
		return fmt.Errorf("mac: %.80q is not a MAC address", n.MAC)
	}
	if n.Address != "" {
		if _, err := netip.ParsePrefix(n.Address); err != nil {
			return fmt.Errorf("address: %.80q is not an address with a prefix length, such as 10.0.0.7/24", n.Address)
		}
	}
	if n.Gateway != "" {
		if _, err := netip.ParseAddr(n.Gateway); err != nil {
			return fmt.Errorf("gateway: %.80q is not an IP address", n.Gateway)
		}
	}
	return nil
}

// CheckHostname says whether name is one label of a host name (RFC 1123).
func CheckHostname(name string) error {
	if len(name) < 1 || len(name) > 63 {
		return fmt.Errorf("%.80q has %d characters, want 1 to 63", name, len(name))
	}
	if strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("%.80q: want letters a-z, digits and hyphens", name)
	}
	if name[0] == '-' || name[len(name)-1] == '-' {
		return fmt.Errorf("%.80q begins or ends with a hyphen", name)
	}
	return nil
}

func isHex(s string, digits int) bool {
	return len(s) == digits && strings.Trim(s, "0123456789abcdef") == ""
}

func hasControl(s string) bool {
	return strings.ContainsFunc(s, unicode.IsControl)
}
