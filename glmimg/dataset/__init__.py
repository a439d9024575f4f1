"""Pictures of a user's own: found, read, checked, sorted by shape, and kept as the models see them."""
