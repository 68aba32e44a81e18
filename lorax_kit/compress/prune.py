"""Pruning, the other way to drop parameters: by magnitude, or by Wanda, unstructured or 2 of 4.

Wanda (Sun et al., arXiv 2306.11695): the score of an entry is |w_kn| times the norm of input k over the calibration
data, compared among the entries of one output. Magnitude compares the entries of one matrix.
"""

from __future__ import annotations

from math import prod

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.finite import all_finite
from lorax_kit.calibration.arguments import planned
from lorax_kit.calibration.calibrate import Stats, check_finite, moments_of
from lorax_kit.compress.arguments import check_share, check_word
from lorax_kit.core.lowrank import dense
from lorax_kit.core.paths import Params, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.errors import CompressError

PRUNINGS = ("magnitude", "wanda")


def prune(
    params: Params,
    sites: Plan,
    *,
    keep: float,
    method: str = "wanda",
    stats: Stats | None = None,
    pattern: str = "unstructured",
) -> Params:
    """Params whose sites have zeros in place of the entries that count least.

    Args:
      params: left as they are.
      sites: from `lk.resolve`.
      keep: share of each site's entries that stays, in (0, 1]; 0.5 for "2:4".
      method: "magnitude" or "wanda".
      stats: from `calibrate`, for "wanda".
      pattern: "unstructured", or "2:4": two of every four consecutive inputs of an output, as sparse tensor cores want.

    Returns:
      The same tree, dense arrays of the same shapes.

    Raises:
      CompressError: unknown words, a share out of range, inputs not a multiple of 4 for "2:4", or missing data.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.asarray([[3.0, 1.0], [-2.0, 4.0]])}
      >>> sites = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params, lambda p, x: x @ p["w"], jnp.ones((1, 2)))
      >>> prune(params, sites, keep=0.5, method="magnitude")["w"].tolist()
      [[3.0, 0.0], [0.0, 4.0]]
    """
    check_word("pruning method", method, PRUNINGS)
    check_word("pattern", pattern, ("unstructured", "2:4"))
    keep = check_share("keep", keep)
    if pattern == "2:4" and keep != 0.5:
        raise CompressError(f"keep is {keep!r}; it must be 0.5 for 2:4.")
    named, treedef = planned(params, sites)
    out = dict(named)
    for site in sites.sites:
        w = site.matrices(dense(named[site.path]))  # (S, K, N)
        if not all_finite(w):
            raise CompressError(f"{site.path!r} holds values that are not finite.")
        least = w.shape[1] if method == "wanda" else w.shape[1] * w.shape[2]
        if round(keep * least) < 1:
            raise CompressError(f"keep={keep:g} leaves nothing of {site.path!r}: of {least} entries not one.")
        score = jnp.abs(w.astype(jnp.float32))
        if method == "wanda":
            score = score * _input_norms(stats, site)[..., None]
        if pattern == "2:4":
            if w.shape[1] % 4:
                raise CompressError(
                    f"{site.path!r} has {w.shape[1]} inputs; 2:4 needs a multiple of 4.\n  leave it out"
                )
            kept = _best(score.reshape(w.shape[0], -1, 4, w.shape[2]), 2, axis=2).reshape(w.shape)
        elif method == "wanda":
            kept = _best(score, round(keep * w.shape[1]), axis=1)
        else:
            kept = _best(score.reshape(w.shape[0], -1), round(keep * w.shape[1] * w.shape[2]), axis=1).reshape(w.shape)
        out[site.path] = site.from_matrices(jnp.where(kept, w, 0))
    return unflatten(out, treedef)


def _best(score: Array, count: int, axis: int) -> Array:
    """Which entries are among the `count` greatest along an axis; of equal ones the first."""
    order = jnp.argsort(jnp.argsort(-score, axis=axis), axis=axis)
    return order < count


def _input_norms(stats: Stats | None, site: Site) -> Array:
    """(S, K)."""
    moments = moments_of(stats, site.path, "wanda")
    squares = moments.squares
    if squares is None:
        raise CompressError(
            f"the calibration data of {site.path!r} lack what 'wanda' needs: gram, or a table's counts."
        )
    wanted = (prod(site.stack_shape), prod(site.in_shape))
    if squares.shape != wanted:
        raise CompressError(
            f"the calibration data of {site.path!r} are of (stacked, inputs) {squares.shape}, "
            f"the parameter {site.shape} has {wanted}.\n"
            "  they are of another model: calibrate this one"
        )
    check_finite(squares, site.path)
    return jnp.asarray(np.sqrt(squares), jnp.float32)
