"""Which kernel a product is given, as a table of facts."""

import pytest

from lorax_kit.transform.cost import Costs, Facts, Product, choose

MANY, FEW = Product(1, 4096, 64, 64, 8), Product(1, 8, 64, 64, 8)
TABLE = [
    (MANY, {}, "merged", "4096 tokens outweigh two passes over 64x64"),
    (FEW, {}, "factored", "8 tokens are few against 64x64"),
    (MANY, {"trials": 3}, "factored", "3 stacked trials share one base product"),
    (MANY._replace(tokens="batch"), {}, "factored", "batch tokens may be few"),
    (FEW, {"asked": "merged"}, "merged", "asked for"),
    (MANY, {"asked": "factored"}, "factored", "asked for"),
    (MANY, {"asked": "plain", "trials": 3}, "plain", "asked for"),
    (MANY, {"quantised": True}, "factored", "the base is quantised"),
    (FEW, {"quantised": True}, "factored", "8 tokens are few"),
    (MANY, {"asked": "merged", "quantised": True}, "factored", "the base is quantised"),
    (MANY, {"asked": "plain", "quantised": True}, "plain", "asked for"),
    (MANY, {"dropout": True}, "factored", "dropout acts on the input of the low-rank path only"),
    (MANY, {"rounds": "bfloat16"}, "factored", "a sum in bfloat16 would round small updates away"),
    (MANY, {"quantised": True, "dropout": True, "rounds": "bfloat16"}, "factored", "the base is quantised"),
    (MANY, {"empty": True}, "factored", "two products: the parameter is low-rank"),
    (MANY, {"empty": True, "asked": "merged"}, "factored", "two products"),
    (MANY, {"empty": True, "asked": "plain"}, "plain", "two products"),
]


@pytest.mark.parametrize(("product", "facts", "how", "why"), TABLE)
def test_the_kernel_follows_from_the_facts(product, facts, how, why):
    chosen, reason = choose(product, Costs(), Facts(**facts))
    assert chosen == how
    assert why in reason
