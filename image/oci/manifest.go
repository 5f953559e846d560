// Package oci is what image-spec v1.1 says of a version: manifest, config and
// the index of a layout, with the annotations that Rookery adds.
package oci

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"time"

	"rookery/image"
	"rookery/wire"
)

// Media types of image-spec v1.1.
const (
	TypeManifest = "application/vnd.oci.image.manifest.v1+json"
	TypeIndex    = "application/vnd.oci.image.index.v1+json"
	TypeConfig   = "application/vnd.oci.image.config.v1+json"
	TypeLayer    = "application/vnd.oci.image.layer.v1.tar+zstd"
)

// Annotations: of image-spec v1.1, and our own.
const (
	KeyRefName = "org.opencontainers.image.ref.name"
	KeyVersion = "rookery.version" // of a manifest: the NAME:TAG that it was published as

	keyIndexOffset = "rookery.index.offset"
	keyIndexSize   = "rookery.index.size"
	keyIndexDigest = "rookery.index.digest"
	keyTorrent     = "rookery.torrent"
)

// Labels of a config: where a version comes from and how it wants to be
// installed.
const (
	LabelSource   = "rookery.source"   // what was imported, captured or built
	LabelHost     = "rookery.host"     // the golden client
	LabelCaptured = "rookery.captured" // when, RFC 3339
	LabelLayout   = "rookery.layout"   // the default disk layout, JSON
	LabelFirmware = "rookery.firmware" // "bios" or "uefi"
	LabelParent   = "rookery.parent"   // NAME:TAG of the version that this one began as
)

// Bounds of what is read, in bytes: manifests and configs, and index.json with
// its 400 bytes a name.
const (
	MaxManifest = 4 << 20
	MaxIndex    = 64 << 20
)

// A Content is an OCI descriptor.
type Content struct {
	MediaType   string            `json:"mediaType"`
	Digest      wire.Digest       `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// A Manifest is an OCI image manifest.
type Manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Config        Content           `json:"config"`
	Layers        []Content         `json:"layers"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

// An Index is the index.json of an OCI layout.
type Index struct {
	SchemaVersion int       `json:"schemaVersion"`
	MediaType     string    `json:"mediaType"`
	Manifests     []Content `json:"manifests"`
}

// A Config is an OCI image config.
type Config struct {
	Created      time.Time `json:"created"`
	Architecture string    `json:"architecture"`
	OS           string    `json:"os"`
	Config       Run       `json:"config"`
	RootFS       struct {
		Type    string        `json:"type"`
		DiffIDs []wire.Digest `json:"diff_ids"`
	} `json:"rootfs"`
	History []History `json:"history"`
}

// A Run is what a container of the image is and starts.
type Run struct {
	Env    []string          `json:"Env,omitempty"`
	Cmd    []string          `json:"Cmd,omitempty"`
	Labels map[string]string `json:"Labels,omitempty"`
}

// A History entry tells how a layer came to be.
type History struct {
	Created   time.Time `json:"created"`
	CreatedBy string    `json:"created_by"`
	Comment   string    `json:"comment,omitempty"`
}

// A Layer is what a manifest says of one layer.
type Layer struct {
	image.Descriptor
	Torrent wire.Digest // of the metainfo file; "" when it has none
}

// Content is the descriptor that a manifest has of l.
func (l Layer) Content() Content {
	c := Content{MediaType: TypeLayer, Digest: l.Digest, Size: l.Size, Annotations: map[string]string{
		keyIndexOffset: strconv.FormatInt(l.IndexOffset, 10),
		keyIndexSize:   strconv.FormatInt(l.IndexSize, 10),
		keyIndexDigest: string(l.IndexDigest),
	}}
	if l.Torrent != "" {
		c.Annotations[keyTorrent] = string(l.Torrent)
	}
	return c
}

// Torrent is what the descriptor of a layer says of its torrent, "" if nothing.
func (c Content) Torrent() wire.Digest { return wire.Digest(c.Annotations[keyTorrent]) }

// MaxLayers bounds the layers of a version: what overlayfs stacks.
const MaxLayers = 128

// ParseManifest reads a manifest and its layers, lowest first: their place of
// the index and their torrent are in its annotations. Their DiffID is not: the
// config has it.
func ParseManifest(b []byte) (m Manifest, layers []Layer, err error) {
	if err := decode(b, MaxManifest, &m); err != nil {
		return m, nil, fmt.Errorf("manifest: %w", err)
	}
	if m.SchemaVersion != 2 || m.MediaType != TypeManifest {
		return m, nil, fmt.Errorf("manifest: is %.80q, version %d", m.MediaType, m.SchemaVersion)
	}
	if len(m.Layers) < 1 || len(m.Layers) > MaxLayers {
		return m, nil, fmt.Errorf("manifest: image has %d layers, want 1 to %d", len(m.Layers), MaxLayers)
	}
	if err := m.Config.Digest.Check(); err != nil {
		return m, nil, fmt.Errorf("manifest: config: %w", err)
	}
	for i, c := range m.Layers {
		l, err := c.layer()
		if err != nil {
			return m, nil, fmt.Errorf("manifest: layer %d: %w", i, err)
		}
		layers = append(layers, l)
	}
	return m, layers, nil
}

func (c Content) layer() (l Layer, err error) {
	if c.MediaType != TypeLayer {
		return l, fmt.Errorf("is %.80q, want %s", c.MediaType, TypeLayer)
	}
	l.Digest, l.Size = c.Digest, c.Size
	if l.IndexOffset, err = number(c.Annotations, keyIndexOffset); err != nil {
		return l, err
	}
	if l.IndexSize, err = number(c.Annotations, keyIndexSize); err != nil {
		return l, err
	}
	l.IndexDigest = wire.Digest(c.Annotations[keyIndexDigest])
	if err := l.Descriptor.Check(); err != nil {
		return l, err
	}
	if _, ok := c.Annotations[keyTorrent]; ok {
		l.Torrent = c.Torrent()
		if err := l.Torrent.Check(); err != nil {
			return l, fmt.Errorf("%s: %w", keyTorrent, err)
		}
	}
	return l, nil
}

func number(annotations map[string]string, key string) (int64, error) {
	s, ok := annotations[key]
	if !ok {
		return 0, fmt.Errorf("%s is missing: not published by Rookery", key)
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil || strconv.FormatInt(v, 10) != s {
		return 0, fmt.Errorf("%s is %.40q, want a number", key, s)
	}
	return v, nil
}

// ParseConfig reads a config, which is to have a diff ID for each layer.
func ParseConfig(b []byte, layers int) (c Config, err error) {
	if err := decode(b, MaxManifest, &c); err != nil {
		return c, fmt.Errorf("config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != layers {
		return c, fmt.Errorf("config: %d diff IDs, manifest has %d layers", len(c.RootFS.DiffIDs), layers)
	}
	for i, d := range c.RootFS.DiffIDs {
		if err := d.Check(); err != nil {
			return c, fmt.Errorf("config: diff ID %d: %w", i, err)
		}
	}
	return c, nil
}

// ParseIndex reads an index.json in which every manifest has a name of its own.
func ParseIndex(b []byte) (x Index, err error) {
	if err := decode(b, MaxIndex, &x); err != nil {
		return x, err
	}
	if x.SchemaVersion != 2 || x.MediaType != TypeIndex || x.Manifests == nil {
		return x, fmt.Errorf("is %.80q, version %d, with manifests: %v", x.MediaType, x.SchemaVersion, x.Manifests != nil)
	}
	names := make(map[string]bool, len(x.Manifests))
	for i, c := range x.Manifests {
		name := c.Annotations[KeyRefName]
		err := c.Digest.Check()
		switch {
		case err != nil:
		case name == "" || names[name]:
			err = fmt.Errorf("name is %.300q: want one of its own", name)
		case c.MediaType != TypeManifest:
			err = fmt.Errorf("is %.80q, want %s", c.MediaType, TypeManifest)
		case c.Size <= 0 || c.Size > MaxManifest:
			err = fmt.Errorf("%d bytes, want 1 to %d", c.Size, MaxManifest)
		}
		if err != nil {
			return x, fmt.Errorf("manifest %d: %w", i, err)
		}
		names[name] = true
	}
	return x, nil
}

// ReadBounded reads all of r, which is to have at most MaxManifest bytes.
func ReadBounded(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxManifest+1))
	if err == nil && len(b) > MaxManifest {
		err = fmt.Errorf("more than the %d bytes that are read", MaxManifest)
	}
	return b, err
}

func decode(b []byte, limit int, v any) error {
	if len(b) > limit {
		return fmt.Errorf("%d bytes, at most %d are read", len(b), limit)
	}
	return json.Unmarshal(b, v)
}
