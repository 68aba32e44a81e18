"""Which optimiser trains which factors: one `optax.partition` over labels, frozen by `set_to_zero`.

Never `optax.masked`: its unmasked leaves receive the raw gradient. Clipping belongs inside the trained part:
outside it costs 65 % more FLOPs, 3.7x the temporaries, and clips by the wrong norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lorax_kit.core.errors import PlanError
from lorax_kit.core.factors import Factors, FactorTree, FullLeaf
from lorax_kit.core.plan import Plan
from lorax_kit.training.extra import accepting, completing

LABELS = ("a", "b", "magnitude", "full", "frozen")


def labels(factors: FactorTree) -> dict[str, Factors | FullLeaf]:
    """The label of every trainable leaf: "a", "b", "magnitude", "full"; per-trial scales are "frozen"."""

    names: Any = {"a": "a", "b": "b", "magnitude": "magnitude", "scale": "frozen", "value": "full"}

    def of(leaf: Factors | FullLeaf) -> Any:
        # A nested partition sees its own leaves only, masked nodes in the places of the others.
        seen = {k: x for k, x in leaf._asdict().items() if x is not None and not isinstance(x, optax.MaskedNode)}
        return leaf._replace(**{k: names[k] for k in seen})

    return {path: of(leaf) for path, leaf in factors.items()}


def partition(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    plan: Plan,
    *,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """An optimiser for the factors of `plan`.

    Args:
      tx: one transformation for everything trained, or one per label: "a", "b", "magnitude", "full". LoRA+
        (Hayou et al., arXiv 2402.12354) is `{"a": adamw(lr), "b": adamw(16 * lr), ...}`; LoRA-FA (arXiv
        2308.03303) is `{"a": optax.set_to_zero(), ...}`.
      plan: from `lk.resolve`.
      clip: clip by the global norm of all trained leaves together, before `tx`.

    Returns:
      An `optax.GradientTransformation` over the factor tree, which passes on what `tx` needs beside the gradient
      (`value`, `value_fn`, ...). A line search of one label holds the leaves of the others still.

    Raises:
      PlanError: a label that the plan needs has no transformation, or one is given that does not exist; a clip that is
        not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_kit import LoRA, Spec, resolve
      >>> plan = resolve(Spec({"w": LoRA(rank=2)}), {"w": jnp.ones((4, 3))})
      >>> tx = partition({"a": optax.adam(1e-3), "b": optax.adam(1.6e-2)}, plan)
    """
    if clip is not None and not 0 < clip < float("inf"):
        raise PlanError(f"clip is {clip!r}; it must be a positive number, or None.")
    if isinstance(tx, Mapping):
        needed = _needed(plan)
        for word, names in (("lacks", needed - set(tx)), ("names the unknown", set(tx) - set(LABELS))):
            if names:
                raise PlanError(
                    f"partition {word} label {min(names)!r}: the plan trains {', '.join(sorted(needed))}.\n"
                    "  to freeze a label, give it optax.set_to_zero()"
                )
        parts = {"frozen": optax.set_to_zero(), **{name: accepting(one) for name, one in tx.items()}}
        inner = optax.partition(parts, labels, mask_compatible_extra_args=True)
    else:
        inner = accepting(tx)
    trained = inner if clip is None else optax.chain(optax.clip_by_global_norm(clip), inner)
    parts = {"train": trained, "frozen": optax.set_to_zero()}
    return completing(optax.partition(parts, _trained_or_frozen, mask_compatible_extra_args=True))


def _needed(plan: Plan) -> set[str]:
    names = {"a", "b"} if plan.sites else set()
    if any(site.setting.variant == "dora" for site in plan.sites):
        names.add("magnitude")
    if plan.full:
        names.add("full")
    return names


def _trained_or_frozen(factors: FactorTree) -> Any:
    return jax.tree.map(lambda name: "frozen" if name == "frozen" else "train", labels(factors))
