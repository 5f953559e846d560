package tree

// Drop says whether x leaves out a file.
func Drop(x Excludes, path string) bool { return x.drop(path, false) }
