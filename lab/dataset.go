package lab

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"rookery/disklayout"
	"rookery/server/site"
	"rookery/wire"
)

// datasetName is what the image is published as.
const datasetName = "random:1"

// A Dataset is an image of random bytes in a server's state directory, and its
// one layer as a file for those who know no images.
type Dataset struct {
	Programs Made
	State    string      // directory
	Tree     string      // what the image was made of
	Site     string      // site.json
	Digest   wire.Digest // of the layer
	Torrent  []byte
	File     string // the layer, or its first Size bytes
	Size     int64

	Multicast *wire.Multicast // for them

	key      ed25519.PrivateKey
	manifest wire.Digest
}

// NewDataset makes an image of about size bytes that do not compress, below dir.
func NewDataset(ctx context.Context, programs Made, dir string, size int64) (*Dataset, error) {
	d := &Dataset{
		Programs: programs,
		State:    filepath.Join(dir, "state"), Tree: filepath.Join(dir, "tree"), Site: filepath.Join(dir, "site.json"),
	}
	ifup := filepath.Join(d.Tree, "sbin/ifup") // or no record's network could be set up
	err := errors.Join(os.MkdirAll(filepath.Join(d.Tree, "srv"), 0o755), os.MkdirAll(filepath.Join(d.Tree, "etc"), 0o755),
		os.MkdirAll(filepath.Dir(ifup), 0o755), os.WriteFile(ifup, nil, 0o755))
	random := rand.NewChaCha8([32]byte{1})
	const piece = 8 << 20
	for i := 0; err == nil && size > 0; i++ {
		err = writeFrom(filepath.Join(d.Tree, "srv", fmt.Sprint(i)), io.LimitReader(random, min(size, piece)))
		size -= piece
	}
	if err != nil {
		return nil, err
	}
	server := &Server{Program: programs.Rookery, State: d.State}
	if _, err := server.Run(ctx, "image", "import", datasetName, d.Tree); err != nil {
		return nil, err
	}
	out, err := server.Run(ctx, "image", "show", datasetName, "-o", "json")
	if err != nil {
		return nil, err
	}
	var shown struct {
		Manifest wire.Digest
		Layers   []struct {
			Digest, Torrent wire.Digest
			Blob            string
			Size            int64
		}
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil || len(shown.Layers) != 1 {
		return nil, fmt.Errorf("image show: %d layers, want 1: %w", len(shown.Layers), err)
	}
	layer := shown.Layers[0]
	d.manifest, d.Digest, d.Size = shown.Manifest, layer.Digest, layer.Size
	// Where its torrent looks for it, and nobody else's files are.
	d.File = filepath.Join(dir, "layer", layer.Digest.Hex())
	if err := errors.Join(os.Mkdir(filepath.Dir(d.File), 0o755), os.Link(layer.Blob, d.File)); err != nil {
		return nil, err
	}
	if d.Torrent, err = os.ReadFile(filepath.Join(filepath.Dir(layer.Blob), layer.Torrent.Hex())); err != nil {
		return nil, err
	}
	keys, err := site.Open(filepath.Join(d.State, "site"))
	if err != nil {
		return nil, err
	}
	d.key = keys.Key
	trust, err := json.Marshal(keys.Public())
	if err != nil {
		return nil, err
	}
	return d, os.WriteFile(d.Site, trust, 0o644)
}

// Part is the dataset for those who copy a file, which then has size bytes.
func (d Dataset) Part(size int64) (Dataset, error) {
	if size >= d.Size {
		return d, nil
	}
	f, err := os.Open(d.File)
	if err != nil {
		return d, err
	}
	defer f.Close()
	d.File, d.Size = filepath.Join(filepath.Dir(d.Tree), fmt.Sprintf("part-%d", size)), size
	return d, writeFrom(d.File, io.LimitReader(f, size))
}

func writeFrom(path string, r io.Reader) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

// Script is the signed install script of node i, which fetches by those transports
// and serves others for up to seedFor.
func (d *Dataset) Script(i int, seedFor time.Duration, transports ...string) []byte {
	name, id := fmt.Sprintf("n%d", i+1), fmt.Sprintf("%032x", i+1)
	s := wire.Script{
		Version: 1, ID: id, Node: name,
		Image: wire.Image{Name: datasetName, Manifest: d.manifest}, Transports: transports, Multicast: d.Multicast,
		Layout:   disklayout.Default(),
		Identity: wire.Identity{Hostname: name, MachineID: id},
		SeedFor:  int(seedFor.Seconds()), Ending: wire.Exit, OnFailure: wire.Exit,
	}
	sealed, err := wire.Seal(s, d.key)
	if err != nil {
		panic(err) // nothing in it is anybody's input
	}
	return sealed
}

// Check compares the files of the image below root with those it was made of.
func (d *Dataset) Check(root string) error {
	return fs.WalkDir(os.DirFS(d.Tree), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		return Same(filepath.Join(d.Tree, path), filepath.Join(root, path))
	})
}

// Same says where two files differ, nil when they do not.
func Same(want, got string) error {
	a, err := os.Open(want)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := os.Open(got)
	if err != nil {
		return err
	}
	defer b.Close()
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); ; {
		n, errA := io.ReadFull(a, x)
		m, errB := io.ReadFull(b, y)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			return fmt.Errorf("%s and %s differ in the MiB at %d", want, got, at)
		}
		if errA != nil || errB != nil {
			if errors.Is(errA, io.EOF) || errors.Is(errA, io.ErrUnexpectedEOF) {
				return nil
			}
			return errors.Join(errA, errB)
		}
		at += int64(n)
	}
}
