"""Which kernel runs a use of a site, and what it costs. Estimates steer speed only, never results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorax_kit.errors import PlanError
from lorax_kit.json_text import read_json


class Product(NamedTuple):
    """The shape of one use: `stack` independent products (M, K) x (K, N) with rank-r factors."""

    stack: int
    tokens: int
    inputs: int
    outputs: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the two forms cost beyond the products they share, forward and backward, as a machine was measured.

    Both forms multiply x and its cotangent by the base, and do four thin products for the factors. The factored form
    then passes over the activations, M (K + N) entries: it adds a rank-r product to y and to dx. The merged form
    passes twice over the weight, 2 K N entries: it adds a rank-r product to W, forward and again backward. So per
    entry the costs are `c[0] + c[1] r` nanoseconds, with a pair for activations and one for weights; only their ratio
    decides.

    Attributes:
      activation, weight: (ns per entry, ns per entry and rank).
      device: where they were measured; "" for none in particular.
    """

    activation: tuple[float, float] = (1.0, 0.0)
    weight: tuple[float, float] = (1.0, 0.0)
    device: str = ""

    def factored(self, product: Product) -> float:
        """Nanoseconds of the factored form beyond what both share."""
        s, m, k, n, r = product
        return s * m * (k + n) * (self.activation[0] + self.activation[1] * r)

    def merged(self, product: Product) -> float:
        """Nanoseconds of the merged form beyond what both share."""
        s, _, k, n, r = product
        return s * 2 * k * n * (self.weight[0] + self.weight[1] * r)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def read(cls, path: str | Path) -> Costs:
        """From a file of `lorax-kit bench calibrate --out`.

        Raises:
          PlanError: it is not such a file.
        """
        try:
            data: Any = read_json(path)
            (a0, a1), (w0, w1) = ((float(x) for x in data[name]) for name in ("activation", "weight"))
            device = str(data["device"])
        except (ValueError, KeyError, TypeError, OverflowError) as e:
            raise PlanError(
                f"{str(path)!r} holds no costs ({type(e).__name__}: {e}).\n"
                "  measure them: lorax-kit bench calibrate --out FILE"
            ) from None
        if not all(0 <= x < float("inf") for x in (a0, a1, w0, w1)):
            raise PlanError(f"{str(path)!r} has costs {(a0, a1)} and {(w0, w1)}; each must be a number of at least 0.")
        return cls(activation=(a0, a1), weight=(w0, w1), device=device)


NONE = Costs()
MEASURED = {"cpu": Costs(activation=(0.33, 0.019), weight=(0.40, 0.014), device="cpu")}


def measured_costs(backend: str) -> Costs:
    """Those that `lorax-kit bench calibrate` found for a kind of backend; equal ones where none was measured."""
    return MEASURED.get(backend, NONE)


class Facts(NamedTuple):
    """What decides how a product runs, besides its sizes.

    Attributes:
      asked: the kernel wanted, or "auto".
      trials: how many stacked trials a surrounding vmap runs.
      empty: whether the parameter is low-rank, with no base to multiply.
      quantised: whether the base is restored where it is used.
      dropout: whether the input of the low-rank path differs from that of the base.
      rounds: the dtype in which a merged parameter would lose small updates; "" where it loses none.
    """

    asked: str = "auto"
    trials: int = 1
    empty: bool = False
    quantised: bool = False
    dropout: bool = False
    rounds: str = ""


def choose(product: Product, costs: Costs, facts: Facts = Facts()) -> tuple[str, str]:  # noqa: B008  # it is immutable
    """Pick the kernel of a product, and say why.

    Example:
      >>> choose(Product(1, 512, 64, 64, 8), Costs())
      ('merged', '512 tokens outweigh two passes over 64x64')
      >>> choose(Product(1, 512, 64, 64, 8), Costs(), Facts(quantised=True))
      ('factored', 'the base is quantised, and restored for one product at a time')
    """
    if facts.empty:
        how = "plain" if facts.asked == "plain" else "factored"
        return how, "two products: the parameter is low-rank"
    how, why = (facts.asked, "asked for by adapt(kernel=...)")
    if facts.asked == "auto":
        how, why = _cheaper(product, facts.trials, costs)
    if how != "merged":
        return how, why
    if facts.quantised:
        return "factored", "the base is quantised, and restored for one product at a time"
    if facts.dropout:
        return "factored", "dropout acts on the input of the low-rank path only"
    if facts.rounds:
        return "factored", f"a sum in {facts.rounds} would round small updates away"
    return how, why


def _cheaper(product: Product, trials: int, costs: Costs) -> tuple[str, str]:
    """Compare the two forms.

    With stacked trials merging would form one W per trial, where the factored form multiplies all trials by the one
    shared W in a single product.
    """
    _, m, k, n, _ = product
    if trials > 1:
        return "factored", f"{trials} stacked trials share one base product"
    if not isinstance(m, int):  # traced for any number of them, for export
        return "factored", f"{m} tokens may be few against {k}x{n}"
    if costs.merged(product) <= costs.factored(product):
        return "merged", f"{m} tokens outweigh two passes over {k}x{n}"
    return "factored", f"{m} tokens are few against {k}x{n}"


def together(products: Sequence[Product], trials: int) -> bool:
    """Whether products of one input with several bases run as one wide product.

    Narrow products run below peak, but the bases are copied side by side and the outputs cut apart for it. On CPU a
    384-wide encoder's step gains nothing (0.72x of full fine-tuning, 0.71x apart; 8x128 tokens), so only narrower ones
    are joined, and not for few tokens. Stacked trials are rows of one product already.
    """
    tokens = products[0].tokens
    known = isinstance(tokens, int)  # not where a function is traced for any number of them
    return trials == 1 and known and tokens >= 64 and max(p.outputs for p in products) <= 256


def step_flops(product: Product, how: str) -> tuple[int, int]:
    """FLOPs of forward and backward of one use: (adapted, full fine-tuning).

    Full fine-tuning does three products of the base's size; an adapted one two, plus thin ones.
    """
    s, m, k, n, r = product
    full = 3 * 2 * m * k * n
    thin = 2 * m * r * (k + n)
    if how in ("factored", "plain"):
        ours = 2 * 2 * m * k * n + 3 * thin
    elif how == "merged":
        ours = 2 * 2 * m * k * n + 2 * thin + 2 * 2 * r * k * n
    else:
        ours = full + 3 * 2 * r * k * n
    return s * ours, s * full
