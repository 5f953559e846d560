package tree

// Empties says whether nothing of a filesystem of type fs, mounted at the path
// at of a tree, belongs to an image: because of its type, or of where it is.
func (x Excludes) Empties(at, fs string) bool {
	for i := range at {
		if at[i] == '/' && x.drop(at[:i], true) {
			return true
		}
	}
	return x.drop(at, true) || x.dropMount(fs) || x.drop(at+"/\x00", false) // a name that only a * can mean
}
