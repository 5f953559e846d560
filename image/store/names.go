package store

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"rookery/image/oci"
	"rookery/wire"
)

// Tag lets a tag of the same image mean a version, whatever it meant before.
// version may be a tag, too.
func (s *Store) Tag(ctx context.Context, version, tag string) error {
	err := checkTag(tag)
	if err == nil && repoOf(tag) != repoOf(version) {
		err = fmt.Errorf("a tag of %s has to begin with %q", version, repoOf(version)+":")
	}
	if err == nil {
		err = s.setNames(ctx, func(names []Name) ([]Name, error) {
			if old, ok := find(names, tag); ok && s.ownName(ctx, names, old) == tag {
				return nil, fmt.Errorf("is a version, which no other can become: %w", ErrExists)
			}
			v, err := s.resolve(ctx, names, version)
			if err != nil {
				return nil, fmt.Errorf("image %q: %w", version, err)
			}
			n, _ := find(names, v.Name)
			n, err = s.renamed(ctx, n, tag)
			return set(names, n), err
		})
	}
	if err != nil {
		return fmt.Errorf("tag %s: %w", tag, err)
	}
	return nil
}

// renamed is n under a new name, with its manifest.
func (s *Store) renamed(ctx context.Context, n Name, name string) (Name, error) {
	b, err := s.readBlob(ctx, Ref{Repo: repoOf(n.Name), Digest: n.Manifest, Manifest: true})
	n.Name, n.Bytes = name, b
	return n, err
}

// Untag removes a tag. NAME:latest goes back to the newest version.
func (s *Store) Untag(ctx context.Context, tag string) error {
	err := s.setNames(ctx, func(names []Name) ([]Name, error) {
		n, ok := find(names, tag)
		if !ok {
			return nil, ErrNotFound
		}
		if own := s.ownName(ctx, names, n); own == tag {
			return nil, fmt.Errorf("is a version, not a tag")
		}
		return s.follow(ctx, without(names, tag), repoOf(tag))
	})
	if err != nil {
		return fmt.Errorf("untag %s: %w", tag, err)
	}
	return nil
}

// ownName is the version that n means, also when it cannot be read.
func (s *Store) ownName(ctx context.Context, names []Name, n Name) string {
	v, err := s.version(ctx, n)
	if err != nil {
		v = Version{}
	}
	return named(v, alike(names, n)).Name
}

// follow gives NAME:latest to the newest version when it has none.
func (s *Store) follow(ctx context.Context, names []Name, repo string) ([]Name, error) {
	if _, ok := find(names, repo+":"+latest); ok {
		return names, nil
	}
	versions, err := s.versions(ctx, ofRepo(names, repo))
	if err != nil {
		return nil, err
	}
	for _, v := range slices.Backward(versions) {
		if v.Err != nil {
			continue
		}
		n, _ := find(names, v.Name)
		if n, err = s.renamed(ctx, n, repo+":"+latest); err != nil {
			return nil, err
		}
		return set(names, n), nil
	}
	return names, nil
}

func ofRepo(names []Name, repo string) (of []Name) {
	for _, n := range names {
		if repoOf(n.Name) == repo {
			of = append(of, n)
		}
	}
	return of
}

func (s *Store) setNames(ctx context.Context, change func([]Name) ([]Name, error)) error {
	return s.backend.Write(ctx, func(w Writer) error { return w.SetNames(ctx, change) })
}

// Pruned is what Remove and Prune removed, or would remove.
type Pruned struct {
	Versions []Version // with their tags
	Blobs    []oci.Content
	Bytes    int64 // of the blobs
	Kept     []Kept
}

// A Kept version was not removed.
type Kept struct {
	Name, Why string
}

// Remove removes a version with its tags, and the blobs that nothing needs
// then. NAME:latest goes back to the newest version that remains.
func (s *Store) Remove(ctx context.Context, name string) (Pruned, error) {
	p, err := s.remove(ctx, name)
	if err != nil {
		return p, fmt.Errorf("remove %s: %w", name, err)
	}
	return p, nil
}

func (s *Store) remove(ctx context.Context, name string) (p Pruned, err error) {
	err = s.setNames(ctx, func(names []Name) ([]Name, error) {
		n, ok := find(names, name)
		if !ok {
			return nil, ErrNotFound
		}
		v, err := s.version(ctx, n)
		if err != nil {
			v = Version{Manifest: n.Manifest, Err: err}
		}
		if v = named(v, alike(names, n)); v.Name != name {
			return nil, fmt.Errorf("is a tag of %s", v.Name)
		}
		p.Versions = []Version{v}
		return s.gone(ctx, names, v)
	})
	if err != nil {
		return Pruned{}, err
	}
	return p, s.sweep(ctx, &p, false)
}

// gone is names without those of v.
func (s *Store) gone(ctx context.Context, names []Name, v Version) ([]Name, error) {
	for _, name := range append(v.Tags, v.Name) {
		names = without(names, name)
	}
	return s.follow(ctx, names, repoOf(v.Name))
}

// Keep says which versions Prune leaves, beside those that a tag names. The zero
// Keep leaves all.
type Keep struct {
	Newest int                  // so many of each image
	Since  time.Time            // what was made since then
	Needed func(Version) string // who needs it, "" for nobody; nil: nobody does
}

// why says what keeps a version that newer newer ones of its image follow, or "".
func (k Keep) why(v Version, newer int) string {
	needed := ""
	if k.Needed != nil {
		needed = k.Needed(v)
	}
	switch {
	case v.Err != nil:
		return "cannot be read"
	case needed != "":
		return needed
	case len(v.Tags) > 0:
		return "tagged " + strings.Join(v.Tags, ", ")
	case newer < k.Newest:
		return fmt.Sprintf("one of the newest %d", k.Newest)
	case !k.Since.IsZero() && !v.Created.Before(k.Since):
		return "newer than " + k.Since.Format(time.RFC3339)
	case k.Newest == 0 && k.Since.IsZero():
		return "nothing says which to remove"
	}
	return ""
}

// choose sorts out what goes. Versions are in their order, the oldest first.
func (k Keep) choose(versions []Version) (p Pruned) {
	newer := map[string]int{}
	for _, v := range slices.Backward(versions) {
		repo := repoOf(v.Name)
		if why := k.why(v, newer[repo]); why != "" {
			p.Kept = append(p.Kept, Kept{v.Name, why})
		} else {
			p.Versions = append(p.Versions, v)
		}
		if v.Err == nil {
			newer[repo]++
		}
	}
	slices.Reverse(p.Kept)
	slices.Reverse(p.Versions)
	return p
}

// Prune removes the versions that keep does not leave, and every blob that no
// version needs: those of the versions, and what killed publishers left behind.
// With dry it only says what it would do.
func (s *Store) Prune(ctx context.Context, keep Keep, dry bool) (Pruned, error) {
	p, err := s.prune(ctx, keep, dry)
	if err != nil {
		return p, fmt.Errorf("prune: %w", err)
	}
	return p, nil
}

func (s *Store) prune(ctx context.Context, keep Keep, dry bool) (p Pruned, err error) {
	change := func(names []Name) ([]Name, error) {
		versions, err := s.versions(ctx, names)
		if err != nil {
			return nil, err
		}
		p = keep.choose(versions)
		for _, v := range p.Versions {
			if names, err = s.gone(ctx, names, v); err != nil {
				return nil, err
			}
		}
		return names, nil
	}
	names, err := s.backend.Names(ctx)
	if err == nil {
		_, err = change(names)
	}
	// Where no version goes nothing is written: a writer would take away what killed
	// ones left, and not tell.
	if err == nil && !dry && len(p.Versions) > 0 {
		err = s.setNames(ctx, change)
	}
	if err != nil {
		return Pruned{}, err
	}
	return p, s.sweep(ctx, &p, dry)
}

// sweep removes the blobs that nothing but p.Versions needs, and notes them in p.
func (s *Store) sweep(ctx context.Context, p *Pruned, dry bool) (err error) {
	p.Blobs, err = s.backend.Sweep(ctx, dry, func(names []Name) (map[wire.Digest]bool, error) {
		if dry {
			names = slices.DeleteFunc(names, func(n Name) bool {
				return slices.ContainsFunc(p.Versions, func(v Version) bool { return v.Name == n.Name || slices.Contains(v.Tags, n.Name) })
			})
		}
		return s.used(ctx, names)
	})
	for _, b := range p.Blobs {
		p.Bytes += b.Size
	}
	if err != nil && len(p.Versions) > 0 && !dry {
		err = fmt.Errorf("the names are gone, but blobs are left for the next prune: %w", err)
	}
	return err
}

// used are the blobs that names need. It reads manifests as anybody would: one
// that is not ours keeps its blobs, too.
func (s *Store) used(ctx context.Context, names []Name) (map[wire.Digest]bool, error) {
	used := map[wire.Digest]bool{}
	for _, n := range names {
		if used[n.Manifest] {
			continue
		}
		used[n.Manifest] = true
		var m oci.Manifest
		b, err := s.readBlob(ctx, Ref{Repo: repoOf(n.Name), Digest: n.Manifest, Manifest: true})
		if err == nil {
			err = json.Unmarshal(b, &m)
		}
		if err != nil {
			return nil, fmt.Errorf("nobody knows which blobs %s needs, remove or publish it again: %w", n.Name, err)
		}
		for _, c := range append(m.Layers, m.Config) {
			used[c.Digest] = true
			used[c.Torrent()] = true
		}
	}
	return used, nil
}
