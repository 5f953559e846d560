package tree

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"rookery/wire"
)

// An Origin is the version that a tree was checked out from or published as last.
// It lies beside the tree: in it, it would become part of the next version.
type Origin struct {
	Image    string      `json:"image"` // NAME:TAG
	Manifest wire.Digest `json:"manifest"`
}

func originFile(dir string) string { return filepath.Clean(dir) + ".tree.json" }

// ReadOrigin reads what WriteOrigin left. For a tree of which nothing is known,
// the error is fs.ErrNotExist.
func ReadOrigin(dir string) (Origin, error) {
	var o Origin
	file := originFile(dir)
	b, err := os.ReadFile(file)
	if err != nil {
		return Origin{}, err
	}
	if err := wire.Strict(b, &o); err != nil {
		return Origin{}, fmt.Errorf("%s: %w", file, err)
	}
	if err := o.Manifest.Check(); err != nil {
		return Origin{}, fmt.Errorf("%s: manifest: %w", file, err)
	}
	return o, nil
}

// WriteOrigin notes the origin of the tree in dir.
func WriteOrigin(dir string, o Origin) (err error) {
	file := originFile(dir)
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
