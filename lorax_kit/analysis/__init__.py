"""What the trained deltas look like: spectra, effective rank."""
