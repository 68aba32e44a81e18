"""Rematerialisation: keep matrix products and the narrow points between blocks, recompute everything elementwise.

A block is a function of its inputs and of the results that it keeps, those of its products. The forward pass keeps
both. The backward pass evaluates the block again with each kept equation replaced by its result, and differentiates
that: norms, activations, softmax and layout changes are formed again as the cotangent reaches the block, and no product
runs twice, unlike under `jax.checkpoint` of whole layers (Chen et al., arXiv 1604.06174). Unlike under its
`dots_saveable` policy a block is recomputed only when its own turn comes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lorax_kit.arrays.after import after
from lorax_kit.transform.interpreter.tape import Inference, Place, Player, Recorder, Tape, without_tangents


def recomputed(fn: Callable[[Tape, Any, Any], Any], made: Any, held: Any, everything: bool = False) -> Any:
    """`fn(tape, made, held)`, of which the backward pass keeps the arguments, and what the tape was asked to keep.

    Args:
      fn: runs what is kept by `tape`, at the same places each time.
      made: values of the program, formed by it.
      held: parameters and inputs, which are there anyway.
      everything: the backward pass keeps the arguments alone.
    """
    return without_tangents(_recomputed(fn, everything, made, held))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(fn: Callable[[Tape, Any, Any], Any], everything: bool, made: Any, held: Any) -> Any:
    return fn(Inference(), made, held)


def _recomputed_fwd(
    fn: Any, everything: bool, made: Any, held: Any
) -> tuple[Any, tuple[Any, Any, dict[Place, Any], list[Any]]]:
    # Which arguments are differentiated, told by structure: a residual cannot be a bool.
    moving = [() if x.perturbed else None for x in jax.tree.leaves((made, held))]
    made, held = jax.tree.map(lambda x: x.value, (made, held))
    if everything:
        return fn(Tape(), made, held), (made, held, {}, moving)
    tape = Recorder()
    return fn(tape, made, held), (made, held, tape.results, moving)


def _recomputed_bwd(
    fn: Any, everything: bool, residuals: tuple[Any, Any, dict[Place, Any], list[Any]], g: Any
) -> tuple[Any, Any]:
    made, held, kept, moving = residuals
    g = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x, g)
    floats = [x for x in jax.tree.leaves(g) if _float(x)]
    if floats:  # All that is formed again waits for the cotangent: XLA would form it early, and keep it.
        latest = max(floats, key=lambda x: x.size)
        made, kept = after(latest, (made, kept))
        # Frozen vectors too: XLA would spread the scale of a norm over the tokens once for both passes, and keep that
        # (a tenth of the temporaries of a step at 384 wide).
        flat, tree = jax.tree.flatten(held)
        still = [m is None and jnp.ndim(x) < 2 for x, m in zip(flat, moving[len(moving) - len(flat) :], strict=True)]
        held = jax.tree.unflatten(tree, [after(latest, x) if s else x for x, s in zip(flat, still, strict=True)])
    tape = Tape() if everything else Player(kept)
    leaves, tree = jax.tree.flatten((made, held))

    def again(differentiated: list[Any]) -> Any:
        queue = iter(differentiated)
        values = [x if m is None else next(queue) for x, m in zip(leaves, moving, strict=True)]
        return fn(tape, *jax.tree.unflatten(tree, values))

    (flat_grads,) = jax.vjp(again, [x for x, m in zip(leaves, moving, strict=True) if m is not None])[1](g)
    queue = iter(flat_grads)
    grads: tuple[Any, Any] = jax.tree.unflatten(tree, [None if m is None else next(queue) for m in moving])
    return grads


_recomputed.defvjp(_recomputed_fwd, _recomputed_bwd, symbolic_zeros=True)


def _float(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) and x.size > 0
