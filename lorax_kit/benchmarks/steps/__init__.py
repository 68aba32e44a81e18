"""Training steps side by side: one, many sizes, every method."""
