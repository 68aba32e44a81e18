"""The ways of making a model smaller by name, from one word to a function, its params and their bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax_kit.commands.compress.subjects import Apply, Subject
from lorax_kit.compress import (
    METHODS,
    PRUNINGS,
    Moments,
    calibrate,
    compress,
    compress_sequentially,
    compressed,
    plan_ranks,
    prune,
    with_residuals,
)
from lorax_kit.compress.arguments import check_share
from lorax_kit.compress.replace import low_rank
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import matched
from lorax_kit.core.quantised import METHODS as QUANTISATIONS
from lorax_kit.core.quantised import quantize
from lorax_kit.core.specs.patterns import matches
from lorax_kit.errors import CompressError

STUDENT = "student"
TUNED = "original_tuned"
"""The original, as large as it is, trained as long as a smaller one is healed: what healing is to be compared with."""
ALL_METHODS = (
    *METHODS,
    *(f"{m}+{q}" for m in METHODS for q in QUANTISATIONS),
    *(f"{m}+residual-{q}" for m in METHODS for q in QUANTISATIONS),
    *(*PRUNINGS, "magnitude-2:4", "wanda-2:4"),
    *QUANTISATIONS,
    STUDENT,
    TUNED,
)


class Method(NamedTuple):
    """A method's parts.

    Attributes:
      name: as given.
      kind: "low-rank", "pruned", "quantised", "student" or "tuned".
      base: the decomposition or pruning.
      bits: how factors, or with `residual` what they leave, are quantised; "" for not at all.
      residual: whether what the factors leave is kept.
      pattern: of pruning.
    """

    name: str
    kind: str
    base: str
    bits: str = ""
    residual: bool = False
    pattern: str = "unstructured"

    @classmethod
    def parse(cls, name: str) -> Method:
        """From one of ALL_METHODS.

        Raises:
          CompressError: it is none.
        """
        if name not in ALL_METHODS:
            known = ", ".join((*METHODS, *PRUNINGS, "magnitude-2:4", "wanda-2:4", *QUANTISATIONS, STUDENT, TUNED))
            raise CompressError(
                f"method {name!r} is unknown; choose from {known}; or add +int8, +int4, +nf4, +residual-int8, "
                f"+residual-int4 or +residual-nf4 to {', '.join(METHODS)}."
            )
        if name in (STUDENT, TUNED):
            return cls(name, "student" if name == STUDENT else "tuned", name)
        if name in QUANTISATIONS:
            return cls(name, "quantised", name, name)
        base, _, extra = name.partition("+")
        if base in METHODS:
            return cls(name, "low-rank", base, extra.removeprefix("residual-"), extra.startswith("residual-"))
        base, _, pattern = name.partition("-")
        return cls(name, "pruned", base, pattern=pattern or "unstructured")

    @property
    def calibrated(self) -> bool:
        """Whether it reads calibration data."""
        return self.base in (*METHODS, "wanda") and self.base != "svd"

    def wants_gradients(self, allocation: str) -> bool:
        """Whether it reads gradients of the loss, too."""
        return self.base == "fisher" or (self.base == "whitened" and allocation == "loss")

    @property
    def healed(self) -> bool:
        """Whether training can follow."""
        return self.kind != "quantised"


class Small(NamedTuple):
    """A smaller model: `apply(params, batch)`."""

    apply: Apply
    params: Params


def statistics_for(
    subject: Subject, methods: Iterable[Method], batches: int, *, allocation: str = "loss", progress: bool = True
) -> dict[str, Moments] | None:
    """What the methods read of the first batches of the training stream; None where none of them is calibrated."""
    calibrated = [method for method in methods if method.calibrated]
    if not calibrated:
        return None
    stream = list(itertools.islice(subject.train(0), batches))  # a list: its bar knows the end
    loss = subject.loss if any(method.wants_gradients(allocation) for method in calibrated) else None
    return calibrate(
        subject.apply,
        subject.params,
        subject.sites,
        stream,
        loss=loss,
        weight=subject.problem.counts,
        progress=progress,
    )


def smaller(
    subject: Subject,
    method: Method,
    keep: float,
    stats: Mapping[str, Moments] | None,
    *,
    allocation: str = "loss",
    in_turn: int = 0,
    progress: bool = True,
) -> Small:
    """The model made smaller, before it is healed and its factors are quantised (`finished`).

    Args:
      keep: share of the targets' parameters (of each one's entries when pruning, of the layers for a student;
        quantising keeps all).
      stats: for methods that are calibrated.
      allocation: of ranks.
      in_turn: compress layer after layer, each calibrated anew on so many batches; 0 for all at once.

    Raises:
      CompressError: what `plan_ranks`, `compress` and `prune` raise.
    """
    sites = subject.sites
    if method.kind == "student":
        check_share("keep", keep)
        for layer in subject.problem.layers:
            if not any(matches(layer, site.path) for site in sites.sites):
                raise CompressError(
                    f"a student has fewer layers, and no target is in {layer!r}: leave the targets out."
                )
        return Small(*subject.student(students_layers(subject, keep)))
    if method.kind in ("quantised", "tuned"):
        return Small(subject.apply, subject.params)
    if method.kind == "pruned":
        pruned = prune(subject.params, sites, keep=keep, method=method.base, stats=stats, pattern=method.pattern)
        return Small(subject.apply, pruned)
    plan = plan_ranks(subject.params, sites, keep=keep, method=method.base, stats=stats, allocation=allocation)
    if in_turn:
        batches = list(itertools.islice(subject.train(0), in_turn))
        loss = subject.loss if method.base == "fisher" else None
        groups = [layer for layer in subject.problem.layers if any(matches(layer, site.path) for site in sites.sites)]
        small = compress_sequentially(
            subject.apply,
            subject.params,
            plan,
            batches,
            groups,
            loss=loss,
            weight=subject.problem.counts,
            progress=progress,
        )
    else:
        small = compress(subject.params, plan, stats)
    if method.residual:
        small = with_residuals(subject.params, small) if low_rank(small) else small
        products = low_rank(small)
        whole = [site.path for site in sites.sites if site.path not in products]
        small = quantize(small, [*(f"{path}/residual" for path in products), *whole], method.bits)
    return Small(compressed(subject.apply), small)


def students_layers(subject: Subject, keep: float) -> int:
    """How many layers a student has that keeps such a share of them."""
    return max(round(keep * len(subject.problem.layers)), 1)


def finished(subject: Subject, method: Method, small: Small) -> Small:
    """With what the method's last step quantises."""
    if not method.bits or method.residual:
        return small
    products = low_rank(small.params)
    factors = [f"{path}/{side}" for path in products for side in "ab"]
    whole = [site.path for site in subject.sites.sites if site.path not in products]
    return Small(compressed(subject.apply), quantize(small.params, [*factors, *whole], method.bits))


def stored_bytes(subject: Subject, method: Method, params: Params) -> int:
    """Bytes in which the targets can be stored.

    Low-rank and quantised leaves count as they are kept; zeros of pruning in a bitmap of one bit per entry beside the
    values (two per kept value for 2:4), which is how sparse formats for such shares store them.
    """
    named = flatten(params)[0]
    if method.kind == "pruned":
        arrays = [named[site.path] for site in subject.sites.sites]
        kept = [int(jnp.sum(x != 0)) for x in arrays]
        values = sum(x.dtype.itemsize * n for x, n in zip(arrays, kept, strict=True))
        return values + (sum(kept) // 4 if method.pattern == "2:4" else sum(x.size for x in arrays) // 8)
    if method.kind == "student":
        paths = {p for pattern in subject.targets for p in matched("the target", pattern, list(named))}
    else:
        paths = {site.path for site in subject.sites.sites}
    return sum(x.nbytes for p, x in named.items() if p in paths or p.rsplit("/", 1)[0] in paths)


def total_bytes(params: Params) -> int:
    """Of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(params))
