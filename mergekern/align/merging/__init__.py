"""Models made of matched ones."""
