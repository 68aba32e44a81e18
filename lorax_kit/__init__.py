"""Low-rank adaptation for any JAX function."""
