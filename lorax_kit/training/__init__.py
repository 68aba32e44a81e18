"""Trains the factors only: optimizer partition, the pure step, and a fit loop."""
