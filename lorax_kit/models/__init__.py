"""Reference models in Flax that read top to bottom, and loaders of their real weights."""
