package store_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"rookery/server/store"
	"rookery/server/store/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, func(*testing.T) store.Store { return store.Memory() })
}

func TestBolt(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return open(t, filepath.Join(t.TempDir(), "rookery.db")) })
}

func open(t *testing.T, file string) store.Store {
	t.Helper()
	s, err := store.Open(file)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

func TestASecondProcessIsToldWhoHoldsTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rookery.db")
	open(t, file)
	_, err := store.Open(file)
	if want := "store: " + file + ": another rookery holds it"; err == nil || err.Error() != want {
		t.Errorf("Open: %v, want %s", err, want)
	}
}

func TestOpenNamesTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rookery.db")
	if err := os.WriteFile(file, []byte(strings.Repeat("this is no database\n", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("Open: %v, want an error with %s", err, file)
	}
}

// writerEnv makes TestMain write records to the file it names, for ever.
const writerEnv = "STORE_TEST_WRITE_TO"

func TestMain(m *testing.M) {
	if file := os.Getenv(writerEnv); file != "" {
		write(file)
	}
	os.Exit(m.Run())
}

// write puts records n1, n2, ... and prints each name once it is kept.
func write(file string) {
	s, err := store.Open(file)
	for n := 1; err == nil; n++ {
		name := fmt.Sprintf("n%d", n)
		if _, err = s.Put(context.Background(), store.Record{Kind: "node", Name: name, Value: []byte(`{}`)}); err == nil {
			fmt.Println(name)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func TestWhatWasPutSurvivesKill9(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rookery.db")
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), writerEnv+"="+file)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var kept []string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		kept = append(kept, lines.Text())
		if len(kept) == 25 { // in the middle of the next ones
			child.Process.Kill()
		}
	}
	child.Wait()
	if len(kept) < 25 {
		t.Fatalf("the writer kept %d records, want at least 25", len(kept))
	}
	s := open(t, file)
	for _, name := range kept {
		if _, err := s.Get(t.Context(), "node", name); err != nil {
			t.Errorf("Get: %v, but it was kept before the kill", err)
		}
	}
}
