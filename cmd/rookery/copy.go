package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"rookery/image/store"
)

func imageCopy(dir func() stateDir) *cobra.Command {
	var from, to string
	cmd := &cobra.Command{
		Use:   "copy NAME[:TAG] [NAME[:TAG]]",
		Short: "Copy a version to or from another server, disk or registry, or to another name",
		Long: `Copy a version to or from another server, disk or registry, or to another name.

A store is a directory, registry:HOST/PREFIX or, in plain HTTP, registry+http:HOST/PREFIX.
Layers that are there already are not sent again, the others are checked on the way.
The copy is called as the original, unless a second name is given.`,
		Example: `  rookery image copy --to /mnt/usb/images debian12:4
  rookery image copy --from registry:registry.example.org/rookery debian12
  rookery image copy debian12:4 lab:1`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: words(completeImages(dir), completeImages(dir)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if from == "" && to == "" && len(args) < 2 {
				return errors.New("copy: name another store with --from or --to, or a second name")
			}
			open := func(location string) (*store.Store, error) {
				if location == "" {
					location = dir().images()
				}
				return openStore(location)
			}
			source, err := open(from)
			if err != nil {
				return err
			}
			target, err := open(to)
			if err != nil {
				return err
			}
			v, err := source.Resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			name := v.Name
			if len(args) == 2 {
				name = args[1]
			}
			if err := checkNewName(name); err != nil {
				return err
			}
			_, err = copyVersion(cmd, target, source, v, name)
			return err
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "store to copy from (default that of --images)")
	cmd.Flags().StringVar(&to, "to", "", "store to copy to (default that of --images)")
	return cmd
}

// copyVersion copies v, a version of from, under a new name and says what it did.
func copyVersion(cmd *cobra.Command, to, from *store.Store, v store.Version, name string) (store.Version, error) {
	ctx := cmd.Context()
	var made store.Version
	before, err := to.List(ctx)
	if err != nil {
		return made, err
	}
	there := map[string]bool{}
	for _, old := range before {
		for d := range layersOf(old) {
			there[string(d)] = true
		}
	}
	var shared int64
	for d, n := range layersOf(v) {
		if there[string(d)] {
			shared += n
		}
	}
	began := time.Now()
	m := startMeter(cmd, "copy "+name, v.Size-shared)
	defer m.stop()
	from.Read = m.read
	made, err = numbered(ctx, to, name, func(name string) (store.Version, error) {
		return to.Copy(ctx, from, v, name)
	})
	if err != nil {
		return made, err
	}
	m.stop()
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %s copied, %s shared, in %.1f s\n", made.Name, size(v.Size-shared), size(shared), time.Since(began).Seconds())
	return made, nil
}
