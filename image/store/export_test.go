package store

// DirectoryOf is the backend of s.
func DirectoryOf(s *Store) Backend { return s.backend }

// OnStep has f called before each change of a directory.
func OnStep(f func(what, path string)) { step = f }
