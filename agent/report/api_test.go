package report

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"rookery/wire"
)

func decodeAgain(events []wire.Event) ([]wire.Event, error) {
	b, err := json.Marshal(events)
	if err != nil {
		return nil, err
	}
	return wire.DecodeEvents(b)
}

// site makes a CA, and a certificate of it for name.
func site(t *testing.T, name string) (ca string, cert tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "site"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	root, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{name}, NotBefore: template.NotBefore, NotAfter: template.NotAfter}
	der, err := x509.CreateCertificate(rand.Reader, leaf, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root})), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// quietServer does not print the handshakes that are meant to fail.
func quietServer(t *testing.T, cert tls.Certificate, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	server.Config.ErrorLog = nil
	server.StartTLS()
	t.Cleanup(server.Close)
	return server
}

func TestAPI(t *testing.T) {
	ca, cert := site(t, wire.ServerName)
	server := quietServer(t, cert, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path != wire.PathHello && r.Header.Get("Authorization") != "Bearer t0ken" {
			http.Error(w, "no token", http.StatusUnauthorized)
			return
		}
		switch r.URL.Path {
		case wire.PathHello:
			_, _ = io.WriteString(w, `{"do":"install","node":"n1","token":"t0ken"}`)
		case wire.PathScript:
			_, _ = w.Write(make([]byte, wire.MaxScript+1))
		case wire.PathEvents:
			if strings.Contains(string(body), "bad") {
				http.Error(w, "events: bad\nmore", http.StatusBadRequest)
			}
		}
	})
	api, err := NewAPI(server.URL, ca)
	if err != nil {
		t.Fatal(err)
	}
	if err := api.Send(t.Context(), nil); err == nil || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "401") {
		t.Errorf("events without token: %v, want a 401 that is tried again", err)
	}
	welcome, err := api.Hello(t.Context(), wire.Hello{})
	if err != nil || welcome.Node != "n1" {
		t.Fatalf("Hello: %+v, %v", welcome, err)
	}
	if _, err := api.Script(t.Context()); err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") {
		t.Errorf("a script without end: %v", err)
	}
	if err := api.Send(t.Context(), []wire.Event{{Text: "good"}}); err != nil {
		t.Error(err)
	}
	if err := api.Send(t.Context(), []wire.Event{{Text: "bad"}}); !errors.Is(err, ErrRefused) || !strings.HasSuffix(err.Error(), "events: bad") {
		t.Errorf("refused events: %v", err)
	}
}

func TestAPITrustsTheSiteAlone(t *testing.T) {
	ca, _ := site(t, wire.ServerName)
	_, stranger := site(t, wire.ServerName)
	ours, misnamed := site(t, "elsewhere")
	for name, tt := range map[string]struct {
		ca   string
		cert tls.Certificate
	}{"another site's server": {ca, stranger}, "another name": {ours, misnamed}} {
		server := quietServer(t, tt.cert, func(http.ResponseWriter, *http.Request) { t.Errorf("%s: was asked", name) })
		api, err := NewAPI(server.URL, tt.ca)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := api.Hello(t.Context(), wire.Hello{}); err == nil {
			t.Errorf("%s: believed", name)
		}
	}
	for _, tt := range [][2]string{{"http://192.0.2.1", ca}, {"https://192.0.2.1", ""}, {"https://192.0.2.1", "junk"}} {
		if _, err := NewAPI(tt[0], tt[1]); err == nil {
			t.Errorf("NewAPI(%q, CA of %d bytes): no error", tt[0], len(tt[1]))
		}
	}
}

func TestAWrongClock(t *testing.T) {
	ca, _ := site(t, wire.ServerName)
	for _, year := range []int{1970, 2026, 2106} {
		config, err := tlsConfig(ca, func() time.Time { return time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC) })
		if err != nil {
			t.Fatal(err)
		}
		if d := time.Since(config.Time()); d < -2*time.Hour || d > 2*time.Hour {
			t.Errorf("in %d the clock is %v off", year, d)
		}
	}
}
