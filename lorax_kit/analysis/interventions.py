"""What intruder dimensions do: an adapter with them scaled, beside changes of the same size that do not aim at them.

    D = (scale - 1) sum_i u_i s_i v_i^T    over the intruders i among the leading singular triples of W' = W + delta

The intervention is that of Shuttleworth et al. (arXiv 2410.21228): forgetting falls as intruders are scaled
down. What is disputed is why. W' + D also differs from W' in the size of the update, which alone moves forgetting, so
changes of the same size are needed beside it (Xie, arXiv 2607.23711, matches norms and finds that layers with a spike
above the bulk of W matter, not the size).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lorax_kit.analysis.intruders import (
    EPSILON,
    TOP,
    count_intruders,
    directions_of,
    generator,
    matrices_of,
    nearest,
    random_matrix,
)
from lorax_kit.arrays.svd import leading
from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.setting import is_number
from lorax_kit.errors import PlanError

ARMS = ("adapter", "intruders", "random", "shrunk")


def scale_intruders(
    plan: Plan,
    base: Params,
    factors: FactorTree,
    scale: float,
    *,
    epsilon: float = EPSILON,
    top: int = TOP,
    side: str = "outputs",
    seed: int = 0,
) -> dict[str, Params]:
    """Merge an adapter with its intruders scaled, beside controls that change the update as much without aiming.

    "intruders" is W' + D. "random" is W' + D' with D' of the singular values of D and random directions: a change of
    the same size elsewhere. "shrunk" is W + c delta with |c delta|_F = |delta + D|_F: an update of the same size in the
    adapter's own directions. Intruders matter where "intruders" forgets less than both. Where a matrix has no intruder
    all four are W'.

    Args:
      plan, base, factors, top, side, seed: as in `lorax_kit.analysis.adapter_intruders`.
      scale: what the singular values of intruders are multiplied by: 0 removes them, 1 changes nothing.
      epsilon: below which max |cos| makes an intruder, in (0, 1].

    Returns:
      Params by arm, "adapter", "intruders", "random", "shrunk", each as `lk.merge` gives them, rounded to the dtype of
      the parameter: for `held_out_change`, and for any evaluation of the task.

    Raises:
      PlanError: as `adapter_intruders`; an `epsilon` outside (0, 1], or a `scale` that is no number.
      AdapterError: as `adapter_intruders`.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, alpha=1, inputs=(0,))}), params)
      >>> spike = lk.Factors(a=jnp.ones((1, 4)), b=100 * jnp.ones((1, 4)))
      >>> arms = scale_intruders(plan, params, {"w": spike}, 0.5, epsilon=0.6, top=1)
      >>> {name: round(float(jnp.linalg.norm(arm["w"] - params["w"]))) for name, arm in arms.items()}
      {'adapter': 400, 'intruders': 199, 'random': 466, 'shrunk': 199}
    """
    count_intruders(np.ones(1), epsilon)  # refuses an epsilon outside (0, 1]
    if not is_number(scale):
        raise PlanError(f"scale is {scale!r}; it must be a number: 0 removes the intruders, 1 leaves them.")
    merged, treedef = flatten(merge(base, factors, plan))
    arms = {name: dict(merged) for name in ARMS}
    for site, w, delta in matrices_of(plan, base, factors, top, side):
        rng, has_intruders, updates = generator(site, seed), False, delta.matrices()
        after = {name: np.add(w, updates) for name in ARMS[1:]}  # each its own array
        for i, (before, update) in enumerate(zip(w, updates, strict=True)):
            u, s, vt = leading(before + update, min(top, site.max_rank))
            intruding = nearest(directions_of(before, side), u if side == "inputs" else vt.T) < epsilon
            if not intruding.any() or not update.any():
                continue
            factor, has_intruders = (scale - 1) * s[intruding], True
            change = (u[:, intruding] * factor) @ vt[intruding]
            after["intruders"][i] += change
            after["random"][i] += random_matrix(factor, before.shape, rng)
            after["shrunk"][i] = before + np.linalg.norm(update + change) / np.linalg.norm(update) * update
        for name, x in after.items() if has_intruders else ():
            arms[name][site.path] = jnp.asarray(site.from_matrices(x).astype(jnp.dtype(site.dtype)))
    return {name: unflatten(named, treedef) for name, named in arms.items()}
