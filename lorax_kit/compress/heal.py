"""`heal`: a compressed model is trained a little, and stays as small as it is.

Low-rank updates of one factor, then of the other, and so on (SVD-LLM, Wang et al., arXiv 2403.07378, section 3.3):
each is merged into its factor, so nothing grows. The loss may follow the original's outputs (`distillation`).

`tune` trains whole parameters, those of a pruned model under the mask of what was pruned:

    W' = (W != 0) * (W + s A^T B)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from tqdm import tqdm

from lorax_kit.calibration.arguments import batches_of, check_function, check_values, planned
from lorax_kit.compress.arguments import check_count, check_key, check_positive, patterns_of
from lorax_kit.compress.distil import trained
from lorax_kit.compress.replace import low_rank
from lorax_kit.core.paths import Params, flatten, paths, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.core.specs.patterns import literal
from lorax_kit.core.specs.setting import Full
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import CompressError
from lorax_kit.methods import LoRA
from lorax_kit.transform import compressed

SIDES = ("b", "a")


def heal(
    fn: Callable[..., Any],
    params: Params,
    loss: Callable[[Any, Any], Array],
    batches: Iterable[Any],
    key: Array,
    *,
    steps: int,
    lr: float = 1e-3,
    rank: int | None = 8,
    rounds: int = 2,
    full: tuple[str, ...] = (),
    progress: bool = True,
) -> Params:
    """Train the factors of compressed params, alternately b and a.

    Args:
      fn: `fn(params, batch)`, of dense params.
      params: from `compress`; not changed.
      loss: `loss(outputs, batch)`, a scalar. `distillation` makes one that follows the original.
      batches: as many as `steps`, or more.
      key: random key of the updates.
      steps: in all, shared evenly among the rounds.
      lr: peak rate of AdamW in each round, reached in a tenth of its steps and decaying to 0 as a cosine. Factors
        trained themselves (`rank` None) want a tenth of what low-rank updates want.
      rank: of the updates; at most the rank of the smallest factor counts. None trains the factors themselves.
      rounds: how often the side changes: b, a, b, ... Where `rank` is None both sides train together, and
        `rounds` changes nothing.
      full: patterns of other parameters to train in full in every round (a head, norms).
      progress: show a bar.

    Returns:
      Params of the same structure, shapes and dtypes.

    Raises:
      CompressError: nothing is low-rank, fewer steps than rounds, batches that end early, a loss that is not finite.
    """
    check_function("fn", fn, "fn(params, batch)")
    small = compressed(fn)
    products = low_rank(params)
    if not products:
        raise CompressError("no parameter is low-rank: there is nothing to heal.\n  compress the params first")
    named = flatten(params)[0]
    for path in products:
        if isinstance(named[f"{path}/a"], Quantised) or isinstance(named[f"{path}/b"], Quantised):
            raise CompressError(f"the factors of {path!r} are quantised.\n  heal first, then lk.quantize")
    check_function("loss", loss, "loss(outputs, batch)")
    check_values(params)
    check_key(key)
    full = patterns_of("full", full)
    steps, rounds, lr = check_count("steps", steps), check_count("rounds", rounds), check_positive("lr", lr)
    rank = None if rank is None else check_count("rank", rank)
    sides: tuple[tuple[str, ...], ...] = (SIDES,) if rank is None else tuple((SIDES[i % 2],) for i in range(rounds))
    if steps < len(sides):
        raise CompressError(f"{steps} steps do not fill {rounds} rounds.")
    shapes, stream = paths(params), batches_of("the healing batches", batches)
    bar = tqdm(total=steps, desc="healing", unit="step", disable=None if progress else True)
    with bar:
        for i, side in enumerate(sides):
            rules: dict[str, Any] = dict.fromkeys(full, Full())
            for path in products:
                for name in side:
                    own = f"{path}/{name}"
                    most = min(shapes[own].shape[0], max(shapes[own].shape[1:]))
                    rules[own] = Full() if rank is None else LoRA(rank=min(rank, most), alpha=2 * min(rank, most))
            begun = steps * i // len(sides)
            count = steps * (i + 1) // len(sides) - begun
            own_key = jax.random.fold_in(key, i)
            params = trained(small, params, Spec(rules), loss, stream, own_key, count, lr, bar, begun=begun)
    return params


def tune(
    fn: Callable[..., Any],
    params: Params,
    sites: Plan,
    loss: Callable[[Any, Any], Array],
    batches: Iterable[Any],
    key: Array,
    *,
    steps: int,
    lr: float = 1e-3,
    rank: int | None = 8,
    keep_zeros: bool = False,
    full: tuple[str, ...] = (),
    progress: bool = True,
) -> Params:
    """Train the parameters at sites, by low-rank updates that are merged, or in full: what heals a pruned model.

    Args:
      fn: `fn(params, batch)`.
      params: from `prune`, or of the original; not changed.
      sites: from `lk.resolve`; their ranks do not matter.
      loss: `loss(outputs, batch)`, a scalar. `distillation` makes one that follows the original.
      batches: as many as `steps`, or more.
      key: random key of the updates.
      steps: of AdamW.
      lr: its peak rate, reached in a tenth of the steps and decaying to 0 as a cosine.
      rank: of the updates, at most that of the parameter; None trains the parameters themselves.
      keep_zeros: entries that are zero stay zero, bit for bit; a step then costs what one in full does.
      full: patterns of other parameters to train in full (a head, norms).
      progress: show a bar.

    Returns:
      Params of the same structure, shapes and dtypes.

    Raises:
      CompressError: quantised sites, no steps, batches that end early, a loss that is not finite.
      PlanError: params that do not fit the sites.

    Example:
      >>> import lorax_kit as lk
      >>> fn, x = lambda p, x: x @ p["w"], jnp.eye(2)
      >>> params = {"w": jnp.asarray([[1.0, 0.0], [0.0, 1.0]])}
      >>> sites = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params, fn, x)
      >>> options = {"steps": 3, "rank": None, "keep_zeros": True, "progress": False}
      >>> found = tune(fn, params, sites, lambda y, _: jnp.sum(y**2), [x] * 3, jax.random.key(0), **options)
      >>> bool((found["w"] != params["w"]).any()), (found["w"] == 0).tolist()
      (True, [[False, True], [True, False]])
    """
    check_function("fn", fn, "fn(params, batch)")
    check_function("loss", loss, "loss(outputs, batch)")
    check_key(key)
    full, named = patterns_of("full", full), planned(params, sites)[0]
    steps, lr = check_count("steps", steps), check_positive("lr", lr)
    rank = None if rank is None else check_count("rank", rank)
    rules: dict[str, Any] = dict.fromkeys(full, Full())
    for site in sites.sites:
        if isinstance(named[site.path], Quantised):
            raise CompressError(f"{site.path!r} is quantised, and cannot be trained.\n  tune first, then lk.quantize")
        most = min(prod(site.in_shape), prod(site.out_shape))
        rules[literal(site.path)] = Full() if rank is None else LoRA(rank=min(rank, most), alpha=2 * min(rank, most))
    masks = {site.path: named[site.path] != 0 for site in sites.sites}

    def under(params: Params) -> Params:
        own, treedef = flatten(params)
        zeroed = {path: jnp.where(mask, own[path], jnp.zeros((), own[path].dtype)) for path, mask in masks.items()}
        return unflatten(own | zeroed, treedef)

    stream = batches_of("the batches", batches)
    with tqdm(total=steps, desc="tuning", unit="step", disable=None if progress else True) as bar:
        return trained(fn, params, Spec(rules), loss, stream, key, steps, lr, bar, under if keep_zeros else None)
