package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func imageTag(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:   "tag NAME[:TAG] NAME:TAG",
		Short: "Give a version another name, or move that name to it",
		Long: `Give a version another name, or move that name to it.

A tag can be moved at any time, which copies nothing: that is how to go back to an
older version, for a stage of the site (debian12:stable) or for all (debian12:latest).
The names that versions were published under never move.`,
		Example:           "  rookery image tag debian12:7 debian12:stable\n  rookery image tag debian12:6 debian12:latest",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: words(completeImages(dir), completeImages(dir)),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			v, err := images.Resolve(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := images.Tag(cmd.Context(), v.Name, args[1]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is %s\n", args[1], v.Name)
			return nil
		},
	}
}

func imageUntag(dir func() stateDir) *cobra.Command {
	return &cobra.Command{
		Use:               "untag NAME:TAG...",
		Short:             "Take a tag away; the version stays",
		Example:           "  rookery image untag debian12:stable",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeImages(dir),
		RunE: func(cmd *cobra.Command, args []string) error {
			images, err := openImages(dir())
			if err != nil {
				return err
			}
			for _, tag := range args {
				if err := images.Untag(cmd.Context(), tag); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: untagged\n", tag)
			}
			return nil
		},
	}
}
