"""Models that are run, not trained: one pass, a mixed batch, writing."""
