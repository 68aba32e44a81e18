"""Decoders: GPT-2 and the LLaMA family."""
