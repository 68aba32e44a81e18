"""One rule per primitive that can keep a parameter factored; importing this folder registers them.

`products` and `lookups` use a parameter, `structure` and `loops` carry it on.
"""

from lorax_kit.transform.rules import lookups, loops, products, structure

__all__ = ["lookups", "loops", "products", "structure"]
