package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"rookery/lab"
	"rookery/server/site"
	"rookery/wire"
)

const imageName = "bench:1"

// A dataset is an image in a server's state directory, and its one layer as a
// file for those who know no images.
type dataset struct {
	rookery, agent string // programs
	state          string // directory
	tree           string // what the image was made of
	site           string // site.json
	key            ed25519.PrivateKey
	manifest       wire.Digest
	digest         wire.Digest // of the layer
	torrent        []byte
	file           string // the layer, or its first size bytes
	size           int64
}

// newDataset makes an image of about size bytes that do not compress, below dir.
func newDataset(ctx context.Context, programs lab.Made, dir string, size int64) (*dataset, error) {
	d := &dataset{
		rookery: programs.Rookery, agent: programs.Agent,
		state: filepath.Join(dir, "state"), tree: filepath.Join(dir, "tree"), site: filepath.Join(dir, "site.json"),
	}
	err := errors.Join(os.MkdirAll(filepath.Join(d.tree, "srv"), 0o755), os.MkdirAll(filepath.Join(d.tree, "etc"), 0o755))
	random := rand.NewChaCha8([32]byte{1})
	const piece = 8 << 20
	for i := 0; err == nil && size > 0; i++ {
		err = writeFrom(filepath.Join(d.tree, "srv", fmt.Sprint(i)), io.LimitReader(random, min(size, piece)))
		size -= piece
	}
	if err != nil {
		return nil, err
	}
	server := &lab.Server{Program: d.rookery, State: d.state}
	if _, err := server.Run(ctx, "image", "import", imageName, d.tree); err != nil {
		return nil, err
	}
	out, err := server.Run(ctx, "image", "show", imageName, "-o", "json")
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
	d.manifest, d.digest, d.size = shown.Manifest, layer.Digest, layer.Size
	// Where its torrent looks for it, and nobody else's files are.
	d.file = filepath.Join(dir, "layer", layer.Digest.Hex())
	if err := errors.Join(os.Mkdir(filepath.Dir(d.file), 0o755), os.Link(layer.Blob, d.file)); err != nil {
		return nil, err
	}
	if d.torrent, err = os.ReadFile(filepath.Join(filepath.Dir(layer.Blob), layer.Torrent.Hex())); err != nil {
		return nil, err
	}
	keys, err := site.Open(filepath.Join(d.state, "site"))
	if err != nil {
		return nil, err
	}
	d.key = keys.Key
	trust, err := json.Marshal(keys.Public())
	if err != nil {
		return nil, err
	}
	return d, os.WriteFile(d.site, trust, 0o644)
}

// part is the dataset for those who copy a file, which then has size bytes.
func (d dataset) part(size int64) (dataset, error) {
	if size >= d.size {
		return d, nil
	}
	f, err := os.Open(d.file)
	if err != nil {
		return d, err
	}
	defer f.Close()
	d.file, d.size = filepath.Join(filepath.Dir(d.tree), fmt.Sprintf("part-%d", size)), size
	return d, writeFrom(d.file, io.LimitReader(f, size))
}

func writeFrom(path string, r io.Reader) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
