// Package site keeps what makes a site one site: the key that signs install
// scripts and the certificate authority of the agents' API. Both are made at
// the first start.
package site

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/crypto/ssh"

	"rookery/wire"
)

// A Site is the keys of one site.
type Site struct {
	Key ed25519.PrivateKey // signs install scripts

	ca    *x509.Certificate
	caKey crypto.Signer
}

// Names of the files in a site's directory.
const (
	keyFile   = "script.key" // PKCS #8, PEM
	caFile    = "ca.crt"
	caKeyFile = "ca.key"

	knownHostsFile = "known_hosts" // of ssh(1): the authority
)

// The authority outlives every machine that its initramfs starts: replacing
// it means replacing the initramfs. The server's own certificate is made anew
// at each start.
const (
	caLife     = 30 * 365 * 24 * time.Hour
	serverLife = 5 * 365 * 24 * time.Hour
)

// Open reads the site in dir; what is missing is made, readable by its owner
// alone.
func Open(dir string) (*Site, error) {
	s, err := open(dir)
	if errors.Is(err, fs.ErrExist) { // another command made it in the meantime
		return open(dir)
	}
	return s, err
}

func open(dir string) (*Site, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("site: %w", err)
	}
	key, err := loadKey(filepath.Join(dir, keyFile), func() (crypto.Signer, error) {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	})
	if err != nil {
		return nil, err
	}
	script, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("site: %s: is a %T, want an Ed25519 key", filepath.Join(dir, keyFile), key)
	}
	caKey, err := loadKey(filepath.Join(dir, caKeyFile), func() (crypto.Signer, error) {
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	})
	if err != nil {
		return nil, err
	}
	ca, err := loadCA(filepath.Join(dir, caFile), caKey)
	if err != nil {
		return nil, err
	}
	known, err := ssh.NewPublicKey(caKey.Public())
	if err != nil {
		return nil, fmt.Errorf("site: %s: %w", filepath.Join(dir, caKeyFile), err)
	}
	line := fmt.Sprintf("@cert-authority %s %s", wire.ServerName, ssh.MarshalAuthorizedKey(known))
	if was, err := os.ReadFile(KnownHostsFile(dir)); err != nil || string(was) != line {
		if err := write(KnownHostsFile(dir), []byte(line), os.Rename); err != nil {
			return nil, fmt.Errorf("site: %w", err)
		}
	}
	return &Site{Key: script, ca: ca, caKey: caKey}, nil
}

// CAFile is where the site in dir keeps the certificate of its authority.
func CAFile(dir string) string { return filepath.Join(dir, caFile) }

// KnownHostsFile is where the site in dir keeps what ssh(1) is to know of it: that
// its authority vouches for the host keys of wire.ServerName.
func KnownHostsFile(dir string) string { return filepath.Join(dir, knownHostsFile) }

// Public is what agents need of the site.
func (s *Site) Public() wire.Site {
	return wire.Site{
		Key: s.Key.Public().(ed25519.PublicKey),
		CA:  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.Raw})),
	}
}

// TokenKey is the secret that tokens of nodes are made with.
func (s *Site) TokenKey() []byte {
	key, err := hkdf.Key(sha256.New, s.Key.Seed(), nil, "rookery node token", 32)
	if err != nil {
		panic(err) // the lengths are constants
	}
	return key
}

// TLS is the configuration of the agents' API: a fresh certificate for
// wire.ServerName, issued by the site's authority.
func (s *Site) TLS() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("site: %w", err)
	}
	cert := template("rookery server", serverLife)
	cert.DNSNames = []string{wire.ServerName}
	cert.KeyUsage = x509.KeyUsageDigitalSignature
	cert.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, cert, s.ca, key.Public(), s.caKey)
	if err != nil {
		return nil, fmt.Errorf("site: certificate: %w", err)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}, nil
}

// HostKey is what the server proves by ssh to be wire.ServerName with: a fresh
// key, certified by the site's authority.
func (s *Site) HostKey() (ssh.Signer, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("site: %w", err)
	}
	key, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		return nil, fmt.Errorf("site: %w", err)
	}
	authority, err := ssh.NewSignerFromSigner(s.caKey)
	if err != nil {
		return nil, fmt.Errorf("site: %w", err)
	}
	as := template("rookery server", serverLife)
	cert := &ssh.Certificate{
		Key: key.PublicKey(), CertType: ssh.HostCert, KeyId: as.Subject.CommonName, ValidPrincipals: []string{wire.ServerName},
		ValidAfter: uint64(as.NotBefore.Unix()), ValidBefore: uint64(as.NotAfter.Unix()),
	}
	if err := cert.SignCert(rand.Reader, authority); err != nil {
		return nil, fmt.Errorf("site: ssh certificate: %w", err)
	}
	return ssh.NewCertSigner(cert, key)
}

func template(name string, life time.Duration) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-24 * time.Hour), // agents' clocks are often behind
		NotAfter:     time.Now().Add(life),
	}
}

func loadCA(path string, key crypto.Signer) (*x509.Certificate, error) {
	der, err := readPEM(path, "CERTIFICATE")
	if errors.Is(err, fs.ErrNotExist) {
		cert := template("rookery site", caLife)
		cert.IsCA, cert.BasicConstraintsValid = true, true
		cert.MaxPathLenZero = true
		cert.KeyUsage = x509.KeyUsageCertSign
		if der, err = x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key); err != nil {
			return nil, fmt.Errorf("site: certificate authority: %w", err)
		}
		err = writePEM(path, "CERTIFICATE", der)
	}
	if err != nil {
		return nil, fmt.Errorf("site: %w", err)
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("site: %s: %w", path, err)
	}
	if public, ok := ca.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return nil, fmt.Errorf("site: %s: belongs to another key than %s beside it", path, caKeyFile)
	}
	return ca, nil
}

func loadKey(path string, generate func() (crypto.Signer, error)) (crypto.Signer, error) {
	der, err := readPEM(path, "PRIVATE KEY")
	if errors.Is(err, fs.ErrNotExist) {
		key, err := generate()
		if err != nil {
			return nil, fmt.Errorf("site: %s: %w", path, err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fmt.Errorf("site: %s: %w", path, err)
		}
		if err := writePEM(path, "PRIVATE KEY", der); err != nil {
			return nil, fmt.Errorf("site: %w", err)
		}
		return key, nil
	}
	if err != nil {
		return nil, fmt.Errorf("site: %w", err)
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("site: %s: %w", path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("site: %s: a %T cannot sign", path, key)
	}
	return signer, nil
}

func readPEM(path, kind string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s: holds no %s in PEM form", path, kind)
	}
	return block.Bytes, nil
}

// writePEM links into place: two commands that start on an empty directory at
// once end up with one key.
func writePEM(path, kind string, der []byte) error {
	return write(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), os.Link)
}

// write writes beside, and has place put it where it belongs: half a file is never read.
func write(path string, text []byte, place func(from, to string) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return place(f.Name(), path)
}
