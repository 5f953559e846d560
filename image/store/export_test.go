package store

// DirectoryOf is the backend of s.
func DirectoryOf(s *Store) Backend { return s.backend }
