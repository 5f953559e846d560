// Package oci is what image-spec v1.1 says of a version: manifest, config and
// the index of a layout, with the annotations that Rookery adds.
package oci

import (
	"encoding/json"
	"errors"
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

// Annotations of image-spec v1.1, and our own.
const (
	KeyRefName = "org.opencontainers.image.ref.name"
	KeyCreated = "org.opencontainers.image.created"

	keyIndexOffset = "rookery.index.offset"
	keyIndexSize   = "rookery.index.size"
	keyIndexDigest = "rookery.index.digest"
	keyTorrent     = "rookery.torrent"
	KeyVersion     = "rookery.version" // of NAME:latest: the version it means
)

// MaxManifest bounds manifests, configs and index.json, in bytes.
const MaxManifest = 4 << 20

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
	RootFS       struct {
		Type    string        `json:"type"`
		DiffIDs []wire.Digest `json:"diff_ids"`
	} `json:"rootfs"`
	History []History `json:"history"`
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

// MaxLayers bounds the layers of a version: what overlayfs stacks.
const MaxLayers = 128

// ParseManifest reads a manifest and its layers, lowest first: their place of
// the index and their torrent are in its annotations. DiffID is not: the config
// has it.
func ParseManifest(b []byte) (m Manifest, layers []Layer, err error) {
	if len(b) > MaxManifest {
		return m, nil, fmt.Errorf("manifest: %d bytes, at most %d are read", len(b), MaxManifest)
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, nil, fmt.Errorf("manifest: %w", err)
	}
	if m.SchemaVersion != 2 || m.MediaType != TypeManifest {
		return m, nil, fmt.Errorf("manifest: is %.80q, version %d", m.MediaType, m.SchemaVersion)
	}
	if len(m.Layers) < 1 || len(m.Layers) > MaxLayers {
		return m, nil, fmt.Errorf("manifest: image has %d layers, want 1 to %d", len(m.Layers), MaxLayers)
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
	if t, ok := c.Annotations[keyTorrent]; ok {
		l.Torrent = wire.Digest(t)
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

// ReadBounded reads all of r, which is to have at most MaxManifest bytes.
func ReadBounded(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxManifest+1))
	if err == nil && len(b) > MaxManifest {
		err = errors.New("too large")
	}
	return b, err
}
