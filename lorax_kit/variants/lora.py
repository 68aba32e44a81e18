"""LoRA: W' = W + s A^T B (Hu et al., arXiv 2106.09685); rsLoRA is the same with s = alpha / sqrt(r).

Symbols: A is `a` (r, in), drawn; B is `b` (r, out), zero; s is `scale`.
"""

from __future__ import annotations

from jax import Array

from lorax_kit.core.factors import Factors, init_lowrank
from lorax_kit.core.plan import Site
from lorax_kit.core.variant import Variant


def init(site: Site, w: Array, key: Array) -> Factors:
    """`a` drawn and `b` zero (the other way round for lookups); `w` plays no part."""
    del w
    return init_lowrank(site, key)


LORA = Variant(init=init)
