package main

import (
	"context"
	"errors"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"rookery/image/registry"
	"rookery/image/store"
	"rookery/transport"
)

func imageCommand(dir func() stateDir) *cobra.Command {
	cmd := group("image", "Make, look into, change, publish and copy images",
		imageList(dir), imageShow(dir), imageDiff(dir), imageVerify(dir),
		imageImport(dir), imageBuild(dir), imageCapture(dir), imageExport(dir), imageExtract(dir), imageCopy(dir), imageRsync(dir),
		imageCheckout(dir), imageShell(dir), imagePublish(dir),
		imageTag(dir), imageUntag(dir), imageRemove(dir), imagePrune(dir),
	)
	cmd.Long = `Make, look into, change, publish and copy images.

An image is a root filesystem; each publication of it is a version, NAME:TAG, that
never changes. Where a version is read, NAME alone means the newest; where one is
made, the next number.`
	cmd.Example = `  rookery image import debian12 debian12.tar.zst
  rookery image list
  rookery image checkout debian12 debian12
  rookery image publish debian12 debian12`
	return cmd
}

func openImages(dir stateDir) (*store.Store, error) { return openStore(dir.images()) }

// openStore opens the images at a location: a directory, registry:HOST/PREFIX or,
// without TLS, registry+http:HOST/PREFIX.
func openStore(location string) (images *store.Store, err error) {
	if at, insecure, ok := registryAt(location); ok {
		var backend store.Backend
		if backend, err = registry.New(at, registry.Options{Insecure: insecure}); err == nil {
			images = store.New(backend)
		}
	} else {
		images, err = store.Open(location)
	}
	if err != nil {
		return nil, err
	}
	images.Torrent = transport.NewTorrent
	return images, nil
}

// registryAt says whether a location is one in a registry, and where.
func registryAt(location string) (at string, insecure, ok bool) {
	if at, ok := strings.CutPrefix(location, "registry+http:"); ok {
		return at, true, true
	}
	at, ok = strings.CutPrefix(location, "registry:")
	return at, false, ok
}

// numbered lets publish make the version name or, when that has no tag, the next
// number of it.
func numbered(ctx context.Context, images *store.Store, name string, publish func(name string) (store.Version, error)) (store.Version, error) {
	if strings.Contains(name, ":") {
		return publish(name)
	}
	for {
		next, err := images.Next(ctx, name)
		if err != nil {
			return store.Version{}, err
		}
		v, err := publish(next)
		if !errors.Is(err, store.ErrExists) { // somebody else took the number meanwhile
			return v, err
		}
	}
}

// checkNewName says what keeps name from being published under, before any work
// is done for it.
func checkNewName(name string) error {
	if !strings.Contains(name, ":") {
		name += ":1"
	}
	return store.CheckName(name)
}

// completeImages completes the names of versions and tags.
func completeImages(dir func() stateDir) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		const nothing = cobra.ShellCompDirectiveNoFileComp
		if configure(cmd, os.LookupEnv) != nil {
			return nil, nothing
		}
		images, err := openImages(dir())
		if err != nil {
			return nil, nothing
		}
		versions, err := images.List(cmd.Context())
		if err != nil {
			return nil, nothing
		}
		var names []cobra.Completion
		for _, v := range versions {
			names = append(names, v.Name)
			names = append(names, v.Tags...)
		}
		return names, nothing
	}
}

// completeTrees completes the names of trees, and of directories.
func completeTrees(dir func() stateDir) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if strings.Contains(word, "/") || configure(cmd, os.LookupEnv) != nil {
			return nil, cobra.ShellCompDirectiveFilterDirs
		}
		entries, err := os.ReadDir(dir().tree(""))
		if err != nil {
			return nil, cobra.ShellCompDirectiveFilterDirs
		}
		var names []cobra.Completion
		for _, e := range entries {
			if e.IsDir() {
				names = append(names, e.Name())
			}
		}
		return names, cobra.ShellCompDirectiveFilterDirs
	}
}

func completeDirs(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// words completes each word by the function of its place, and those that follow
// by the last.
func words(at ...cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) >= len(at) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return at[len(args)](cmd, args, word)
	}
}
