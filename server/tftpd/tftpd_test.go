package tftpd

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/pin/tftp/v3"
)

// serve runs a server on a port of its own until the test ends.
func serve(t *testing.T, s *Server) (port int) {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Conn = conn
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v, want nil after ctx", err)
		}
	})
	return conn.LocalAddr().(*net.UDPAddr).Port
}

func payload(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func get(t *testing.T, port int, name string, block int) ([]byte, error) {
	t.Helper()
	c, err := tftp.NewClient("127.0.0.1:" + strconv.Itoa(port))
	if err != nil {
		t.Fatal(err)
	}
	c.SetBlockSize(block)
	c.RequestTSize(true)
	r, err := c.Receive(name, "octet")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	_, err = r.WriteTo(&b)
	if size, ok := r.(tftp.IncomingTransfer).Size(); ok && err == nil && size != int64(b.Len()) {
		t.Errorf("%s: told %d bytes, sent %d", name, size, b.Len())
	}
	return b.Bytes(), err
}

func TestGet(t *testing.T) {
	files := fstest.MapFS{
		"snponly.efi": {Data: payload(300_001)},
		"even":        {Data: payload(2 * 512)}, // ends with an empty block
		"empty":       {Data: nil},
		"a/b":         {Data: payload(10)},
	}
	port := serve(t, &Server{Files: files})
	for _, tt := range []struct{ ask, file string }{
		{"snponly.efi", "snponly.efi"},
		{"/snponly.efi", "snponly.efi"},
		{"//a//b", "a/b"},
		{`\a\b`, "a/b"},
		{"../../a/b", "a/b"},
		{"even", "even"},
		{"empty", "empty"},
	} {
		for _, block := range []int{512, 1468, 65464} {
			got, err := get(t, port, tt.ask, block)
			if err != nil || !bytes.Equal(got, files[tt.file].Data) {
				t.Errorf("%s in blocks of %d: %d bytes, %v", tt.ask, block, len(got), err)
			}
		}
	}
	for _, name := range []string{"", "/", "..", "a", "missing", "a/b/c", strings.Repeat("x", 300)} {
		if got, err := get(t, port, name, 512); err == nil {
			t.Errorf("%q: %d bytes, want an error", name, len(got))
		}
	}
}

// Nothing outside the directory can be had, by dots or by symbolic link.
func TestNoWayOut(t *testing.T) {
	dir := t.TempDir()
	inside := filepath.Join(dir, "tftp")
	for _, err := range []error{
		os.Mkdir(inside, 0o755),
		os.WriteFile(filepath.Join(dir, "secret"), []byte("secret"), 0o644),
		os.WriteFile(filepath.Join(inside, "public"), []byte("public"), 0o644),
		os.Symlink("../secret", filepath.Join(inside, "link")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(inside)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	port := serve(t, &Server{Files: root.FS()})
	if got, err := get(t, port, "public", 512); string(got) != "public" {
		t.Errorf("public: %q, %v", got, err)
	}
	for _, name := range []string{"../secret", "/../secret", `..\secret`, "link", "./../tftp/../secret", filepath.Join(dir, "secret")} {
		if got, err := get(t, port, name, 512); err == nil {
			t.Errorf("%q: %q, want an error", name, got)
		}
	}
}

// rrq is a read request.
func rrq(name, mode string, options ...string) string {
	return "\x00\x01" + strings.Join(append([]string{name, mode}, options...), "\x00") + "\x00"
}

// request sends a packet and gives the first answer. The transfer it started is
// given up at the end of the test.
func request(t *testing.T, port int, packet string) (net.PacketConn, []byte, net.Addr) {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := c.WriteTo([]byte(packet), &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 2048)
	n, from, err := c.ReadFrom(buf)
	if err != nil {
		t.Fatalf("%q: %v", packet, err)
	}
	t.Cleanup(func() { c.WriteTo([]byte(giveUp), from) })
	return c, buf[:n], from
}

// giveUp is what OVMF says when it has the size.
const giveUp = "\x00\x05\x00\x08User aborted the transfer\x00"

func TestTransfersAreBounded(t *testing.T) {
	port := serve(t, &Server{Files: fstest.MapFS{"x": {Data: payload(5000)}}, Transfers: 2})
	first, _, from := request(t, port, rrq("x", "octet"))
	request(t, port, rrq("x", "octet"))
	if _, got, _ := request(t, port, rrq("x", "octet")); got[1] != 5 || !bytes.Contains(got, []byte("too many transfers")) {
		t.Errorf("third: %q, want an error that says why", got)
	}
	// One that is given up makes room, as soon as the server has seen it.
	if _, err := first.WriteTo([]byte(giveUp), from); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if _, got, _ := request(t, port, rrq("x", "octet")); got[1] == 3 {
			return
		}
	}
	t.Error("no room after a transfer was given up")
}

// Options that leave no room for their answer do not stop the server.
func TestOptionsTooLong(t *testing.T) {
	port := serve(t, &Server{Files: fstest.MapFS{"x": {Data: payload(1_000_000)}}})
	c, err := net.Dial("udp4", "127.0.0.1:"+strconv.Itoa(port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for pad := 489; pad <= 491; pad++ { // up to 516 bytes, all that the server reads
		c.Write([]byte(rrq("x", "", "tsize", "0", "blksize", strings.Repeat("0", pad)+"512")))
	}
	if _, err := get(t, port, "x", 1468); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// As OVMF does before each download.
func TestSizeAloneIsNoError(t *testing.T) {
	var log bytes.Buffer
	t.Run("ask", func(t *testing.T) {
		port := serve(t, &Server{Files: fstest.MapFS{"x": {Data: payload(5000)}}, Log: slog.New(slog.NewTextHandler(&log, nil))})
		c, got, from := request(t, port, rrq("x", "octet", "tsize", "0", "blksize", "1468"))
		if got[1] != 6 || !bytes.Contains(got, []byte("tsize\x005000\x00")) {
			t.Errorf("answer %q, want the size", got)
		}
		c.WriteTo([]byte(giveUp), from)
	})
	if log.Len() > 0 { // the server has ended
		t.Errorf("log: %s", log.String())
	}
}

func TestWritesAreRefused(t *testing.T) {
	port := serve(t, &Server{Files: fstest.MapFS{}})
	c, err := tftp.NewClient("127.0.0.1:" + strconv.Itoa(port))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := c.Send("new", "octet"); err == nil {
		if _, err = r.ReadFrom(strings.NewReader("text")); err == nil {
			t.Error("a file was taken")
		}
	}
}

// A stalled client does not hold up the end, nor does noise.
func TestRealClients(t *testing.T) {
	data := payload(1_000_000)
	port := serve(t, &Server{Files: fstest.MapFS{"ipxe.efi": {Data: data}}})
	noise, err := net.Dial("udp4", "127.0.0.1:"+strconv.Itoa(port))
	if err != nil {
		t.Fatal(err)
	}
	defer noise.Close()
	for n := range 500 {
		noise.Write(append([]byte{0, byte(n)}, payload(n)...))
	}
	out := filepath.Join(t.TempDir(), "got")
	for _, args := range [][]string{
		{"tftp", "-m", "binary", "127.0.0.1", strconv.Itoa(port), "-c", "get", "ipxe.efi", out},
		{"curl", "-sS", "--tftp-blksize", "1468", "-o", out, "tftp://127.0.0.1:" + strconv.Itoa(port) + "/ipxe.efi"},
		{"busybox", "tftp", "-g", "-b", "1468", "-r", "ipxe.efi", "-l", out, "127.0.0.1", strconv.Itoa(port)},
	} {
		t.Run(args[0], func(t *testing.T) {
			if _, err := exec.LookPath(args[0]); err != nil {
				t.Skipf("%v: install tftp-hpa, curl and busybox", err)
			}
			os.Remove(out)
			if msg, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, msg)
			}
			if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v; want %d", len(got), err, len(data))
			}
		})
	}
}

func FuzzOpen(f *testing.F) {
	for _, name := range []string{"a/b", "/a/b", `\a\b`, "../secret", "", ".", "a\x00b", "a/./b/.."} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		file, size, err := open(strict{t, fstest.MapFS{"a/b": {Data: payload(10)}}}, name)
		if err != nil {
			return
		}
		defer file.Close()
		if b, err := io.ReadAll(file); err != nil || int64(len(b)) != size {
			t.Fatalf("%q: %d bytes, %v, want %d", name, len(b), err, size)
		}
	})
}

// strict fails when it is asked for what is not a clean name.
type strict struct {
	t *testing.T
	fs.FS
}

func (s strict) Open(name string) (fs.File, error) {
	if !fs.ValidPath(name) {
		s.t.Fatalf("open(%q)", name)
	}
	return s.FS.Open(name)
}
