"""A warning where a training step is compiled again, with the argument that made it so."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr

from lorax_kit.measure import compilations
from lorax_kit.training.step import Info, State, Step

NAMED = 3


class Form(NamedTuple):
    """What a step is compiled for: the structure of its arguments, and each leaf by its path in words."""

    structure: Any
    leaves: dict[str, str]


def form_of(state: Any, base: Any, batch: Any) -> Form:
    """Describe the arguments of a step; donated arrays may be gone, their types are not."""
    named, structure = jax.tree.flatten_with_path({"state": state, "base": base, "batch": batch})
    return Form(structure, {keystr(path, simple=True, separator="/"): leaf_text(leaf) for path, leaf in named})


def leaf_text(x: Any) -> str:
    """Dtype, shape, weak type and place of an array, as far as programs differ by them.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf_text(jnp.ones((2, 3))), leaf_text(jnp.asarray(1.0)), leaf_text(1.0)
      ('float32 (2, 3)', 'weak float32 ()', 'float')
    """
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return type(x).__name__
    weak = "weak " if getattr(x, "weak_type", False) else ""
    place = f" on {x.sharding}" if getattr(x, "committed", False) else ""
    return f"{weak}{x.dtype} {tuple(x.shape)}{place}"


def changes(before: Form, now: Form) -> list[str]:
    """The leaves that differ, each with both sides; one line of structure where leaves do not tell."""
    both = {**before.leaves, **now.leaves}
    pairs = {path: (before.leaves.get(path, "absent"), now.leaves.get(path, "absent")) for path in both}
    told = [f"{path}: {was} -> {text}" for path, (was, text) in pairs.items() if was != text]
    if not told and before.structure != now.structure:
        told = ["the containers or static fields of the arguments"]
    return told


def watched(step: Step) -> Step:
    """The same step, which warns the first time that it is compiled for arguments unlike those of its first call."""
    first: Form | None = None
    calls, warned = 0, False

    def run(state: State, base: Any, batch: Any) -> tuple[State, Info]:
        nonlocal first, calls, warned
        if warned:
            return step(state, base, batch)
        calls += 1
        if first is None:
            first = form_of(state, base, batch)
            return step(state, base, batch)
        with compilations() as seconds:
            out = step(state, base, batch)
        changed = changes(first, form_of(state, base, batch)) if seconds else []
        if changed:
            warned = True
            more = f"; and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
            warnings.warn(
                f"the step was compiled again at its call {calls}, in {sum(seconds):.1f} s, for other arguments:\n"
                f"  {'; '.join(changed[:NAMED])}{more}\n"
                "  each form is compiled once: fill or leave out batches of another size, keep dtypes and devices",
                stacklevel=5,  # the caller of `fit`, whose decorator is a frame, too
            )
        return out

    return run
