"""What several problems are made of: rows of files as batches, heads on a backbone, decoders."""
