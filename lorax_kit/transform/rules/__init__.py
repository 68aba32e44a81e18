"""One rule per primitive that can keep a parameter factored; importing this folder registers them.

`products`, `convolutions` and `lookups` use a parameter; `layout`, `scaling` and `joins` turn it into another;
`calls` and `loops` carry it into other functions.
"""

from lorax_kit.transform.rules import calls, convolutions, joins, layout, lookups, loops, products, scaling

__all__ = ["calls", "convolutions", "joins", "layout", "lookups", "loops", "products", "scaling"]
