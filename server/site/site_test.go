package site

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"rookery/wire"
)

func TestOpenKeepsWhatItMade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "site")
	first, err := Open(dir)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	again, err := Open(dir)
	if err != nil {
		t.Fatalf("Open again: %v", err)
	}
	if a, b := first.Public(), again.Public(); !bytes.Equal(a.Key, b.Key) || a.CA != b.CA {
		t.Error("the second start has other keys than the first")
	}
	if !bytes.Equal(first.TokenKey(), again.TokenKey()) || bytes.Equal(first.TokenKey(), first.Key.Seed()) {
		t.Error("the token key is not kept, or is the signing key itself")
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 4 {
		t.Fatalf("ReadDir: %v, %v; want four files", files, err)
	}
	for _, f := range files {
		if info, _ := f.Info(); info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", f.Name(), info.Mode().Perm())
		}
	}
}

func TestAgentsVerifyTheServerByTheSitesAuthority(t *testing.T) {
	ours, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := handshake(t, ours, ours); err != nil {
		t.Errorf("handshake with the own server: %v", err)
	}
	if err := handshake(t, foreign, ours); err == nil {
		t.Error("handshake with a foreign server: no error")
	}
}

// What ssh is told of the site is what its host keys are certified by, also
// when the authority was replaced.
func TestHostKey(t *testing.T) {
	dir := t.TempDir()
	for range 2 {
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		line, err := os.ReadFile(KnownHostsFile(dir))
		if err != nil {
			t.Fatal(err)
		}
		marker, hosts, authority, _, _, err := ssh.ParseKnownHosts(line)
		if err != nil || marker != "cert-authority" || len(hosts) != 1 || hosts[0] != wire.ServerName {
			t.Fatalf("%s: %s %q, %v", line, marker, hosts, err)
		}
		key, err := s.HostKey()
		if err != nil {
			t.Fatal(err)
		}
		checker := ssh.CertChecker{IsHostAuthority: func(key ssh.PublicKey, _ string) bool {
			return bytes.Equal(key.Marshal(), authority.Marshal())
		}}
		if err := checker.CheckHostKey(wire.ServerName+":22", nil, key.PublicKey()); err != nil {
			t.Error(err)
		}
		if err := checker.CheckHostKey("other:22", nil, key.PublicKey()); err == nil {
			t.Error("it is certified for another name")
		}
		for _, file := range []string{caFile, caKeyFile} {
			if err := os.Remove(filepath.Join(dir, file)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func handshake(t *testing.T, server, agent *Site) error {
	config, err := server.TLS()
	if err != nil {
		t.Fatalf("TLS: %v", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(agent.Public().CA))
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c, err := l.Accept(); err == nil {
			c.(*tls.Conn).Handshake()
			c.Close()
		}
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: roots, ServerName: wire.ServerName})
	if err == nil {
		c.Close()
	}
	l.Close()
	<-done
	return err
}

func TestOpenNamesTheFileThatIsBroken(t *testing.T) {
	for _, name := range []string{keyFile, caFile, caKeyFile} {
		dir := t.TempDir()
		if _, err := Open(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("nonsense"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("Open with nonsense in %s: %v, want the file named", name, err)
		}
	}
	dir, other := t.TempDir(), t.TempDir()
	Open(dir)
	Open(other)
	b, _ := os.ReadFile(filepath.Join(other, caFile))
	os.WriteFile(filepath.Join(dir, caFile), b, 0o600)
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), caFile) {
		t.Errorf("Open with a foreign certificate: %v, want the file named", err)
	}
}
