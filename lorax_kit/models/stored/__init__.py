"""Weights on disk as params: folders of Hugging Face, GGUF files, and the names that tensors have there."""
