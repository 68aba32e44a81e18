"""Runs any traceable JAX function with low-rank parameters, without editing the model."""
