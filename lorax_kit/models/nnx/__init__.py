"""Models in Flax NNX, with the names of their linen twins."""
