"""Models in Flax NNX, with the names of their linen twins; imported apart, as NNX takes 0.3 s to import."""

from lorax_kit.models.nnx.llama import LlamaNnx, llama_nnx

__all__ = ["LlamaNnx", "llama_nnx"]
