//go:build race

package image_test

const raced = true
