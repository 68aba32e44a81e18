"""Which optimiser trains which factors: one `optax.partition` over labels, frozen by `set_to_zero`.

Never `optax.masked`: its unmasked leaves receive the raw gradient. Clipping belongs inside the trained part:
outside it costs 65 % more FLOPs, 3.7x the temporaries, and clips by the wrong norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.method import frozen_leaves, trained_leaves
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.setting import is_number, plain
from lorax_kit.errors import PlanError
from lorax_kit.training.optimisers.extra import accepting, check_transformation, completing
from lorax_kit.training.optimisers.gains import from_start


def labels(plan: Plan) -> Callable[[FactorTree], dict[str, Any]]:
    """The function factors -> label of every leaf: its name, "full" for what is trained in full, or "frozen"."""
    frozen = {site.path: frozen_leaves(site.setting) for site in plan.sites}
    frozen |= {leaf.path: frozenset({"value"}) for leaf in plan.full if not leaf.trained}

    def of(path: str, leaf: Any) -> Any:
        # A nested partition sees its own leaves only, masked nodes in the places of the others.
        seen = [k for k, x in leaf._asdict().items() if x is not None and not isinstance(x, optax.MaskedNode)]
        if path not in frozen:
            return leaf._replace(**dict.fromkeys(seen, "full"))
        return leaf._replace(**{k: "frozen" if k in frozen[path] else k for k in seen})

    return lambda factors: {path: of(path, leaf) for path, leaf in factors.items()}


def partition(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    plan: Plan,
    *,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """An optimiser for the factors of `plan`.

    Leaves that start at a value other than zero and multiply the whole weight (`Method.gains`: DoRA's magnitudes, IA3's
    gains) are handed to `tx` as deviations from their values when the optimiser was made, which its state keeps. So
    weight decay pulls them to where they started, and not to zero; their updates are the same otherwise, unless a
    transformation scales by norms of params, as LAMB does: it sees the norm of what they moved by.

    Args:
      tx: one transformation for everything trained, or one per label: the names of the leaves ("a", "b",
        "magnitude", ...) and "full". LoRA+ is `lk.lora_plus`. Frozen leaves have no label: nothing moves them.
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
    for name, one in tx.items() if isinstance(tx, Mapping) else [("", tx)]:
        check_transformation(f"tx[{name!r}]" if name else "tx", one)
    if clip is not None and not (is_number(plain(clip)) and clip > 0):
        raise PlanError(f"clip is {clip!r}; it must be a positive number, or None.")
    named = labels(plan)
    if isinstance(tx, Mapping):
        needed = {name for site in plan.sites for name in trained_leaves(site)}
        needed |= {"full" for leaf in plan.full if leaf.trained}
        for word, names in (("lacks", needed - set(tx)), ("names the unknown", set(tx) - needed)):
            if names:
                raise PlanError(
                    f"partition {word} label {min(names)!r}: the plan trains {', '.join(sorted(needed))}.\n"
                    "  to freeze a label, give it optax.set_to_zero()"
                )
        parts = {"frozen": optax.set_to_zero(), **{name: accepting(one) for name, one in tx.items()}}
        inner = optax.partition(parts, named, mask_compatible_extra_args=True)
    else:
        inner = accepting(tx)
    trained = inner if clip is None else optax.chain(optax.clip_by_global_norm(clip), inner)

    def trained_or_frozen(factors: FactorTree) -> Any:
        return jax.tree.map(lambda name: "frozen" if name == "frozen" else "train", named(factors))

    parts = {"train": trained, "frozen": optax.set_to_zero()}
    whole = optax.partition(parts, trained_or_frozen, mask_compatible_extra_args=True)
    return from_start(completing(whole), plan)
