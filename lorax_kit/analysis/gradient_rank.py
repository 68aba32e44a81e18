"""The rank of what training asks for: spectra of the gradient of the loss in the effective weights W' of the sites.

    G = dL/dW' at W' = W + delta,   rank used = exp(entropy of sigma(G)), or the rank that holds 90 % of |G|_F^2

A LoRA of rank r follows a gradient of about r directions; one of more is cut to r at every step. G is the gradient that
full fine-tuning would see at the same point, so that its rank can be followed through a training that never forms it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.analysis.deltas import gram_values
from lorax_kit.analysis.spectra import SiteSpectrum, spectra
from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.leaves import FactorTree, FullLeaf, check_factors
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import check_params, effective_weight
from lorax_kit.core.paths import Params, arrays_only, flatten
from lorax_kit.core.plan import Plan
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import AdapterError

if TYPE_CHECKING:
    from jaxtyping import Float

Measure = Callable[[FactorTree, Any], list[SiteSpectrum]]


def gradient_spectra(loss: Callable[[Params, Any], Array], plan: Plan, base: Params, *, energy: float = 0.9) -> Measure:
    """Make a function that measures the spectra of the full-weight gradients at the sites of an adapter.

    It compiles one forward and backward pass, of the merged params, for each shape of batch, and decomposes on the host
    by the eigenvalues of the smaller Gram matrices: values below about 1e-7 of the largest are noise. Gradients have
    the dtype of the params: bf16 rounds each entry by up to 0.2 %, which is noise of full rank.

    Args:
      loss: `loss(params, batch) -> ()`, traceable by JAX.
      plan: from `lk.resolve`.
      base: the params that were split, quantised or not; their buffers are not copied.
      energy: share of |G|_F^2, in (0, 1].

    Returns:
      `measure(factors, batch)`: one `SiteSpectrum` a site, of (*stack, min(in, out)) singular values, in the order of
      the plan. It raises an AdapterError for factors that do not fit the plan, and for gradients that are not finite.

    Raises:
      ValueError: `energy` outside (0, 1].
      PlanError: a base that does not fit the plan.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
      >>> factors = lk.split(params, plan, jax.random.key(0))[1]
      >>> measure = gradient_spectra(lambda p, x: jnp.sum((x @ p["w"]) ** 2), plan, params)
      >>> round(float(measure(factors, jnp.eye(4)[:1])[0].effective_rank), 3)  # one input: an outer product
      1.0
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share in (0, 1], got {energy}.")
    check_params(flatten(base)[0], plan)
    arrays, whole = arrays_only(base)

    @jax.jit
    def gradients(arrays: dict[str, Any], factors: FactorTree, batch: Any) -> dict[str, Array]:
        named = {path: dense(x) if isinstance(x, Quantised) else x for path, x in arrays.items()}
        for path, leaf in factors.items():
            if isinstance(leaf, FullLeaf):
                named[path] = leaf.value.astype(named[path].dtype)  # as merge does
        weights = {s.path: effective_weight(s, jnp.asarray(named[s.path]), factors[s.path]) for s in plan.sites}
        slopes = jax.grad(lambda weights: loss(whole({**named, **weights}), batch))(weights)
        return {s.path: s.matrices(slopes[s.path]).astype(wide(slopes[s.path].dtype)) for s in plan.sites}

    def measure(factors: FactorTree, batch: Any) -> list[SiteSpectrum]:
        check_factors(plan, factors)
        slopes = jax.device_get(gradients(arrays, dict(factors), batch))
        return spectra(plan.sites, [_values(site.path, slopes[site.path]) for site in plan.sites], energy)

    return measure


def at_steps(
    step: Callable[..., Any], measure: Measure, steps: Collection[int]
) -> tuple[Callable[..., Any], dict[int, list[SiteSpectrum]]]:
    """Wrap a training step so that it measures gradients before chosen steps; the others cost nothing more.

    Args:
      step: from `lk.make_step`: `step(state, base, batch)`, with `state.step` and `state.factors`.
      measure: from `gradient_spectra`.
      steps: numbers of updates done, at which to measure: 0 is before the first.

    Returns:
      (step, found): the wrapped step, for `lk.fit` or a loop; and a dict that it fills, number -> rows.

    Example:
      >>> from types import SimpleNamespace
      >>> step = lambda state, base, batch: (SimpleNamespace(step=state.step + 1, factors={}), None)
      >>> wrapped, found = at_steps(step, lambda factors, batch: [], [0, 2])
      >>> state = SimpleNamespace(step=0, factors={})
      >>> for batch in range(4):
      ...     state, _ = wrapped(state, None, batch)
      >>> sorted(found)
      [0, 2]
    """
    spectra_at: dict[int, list[SiteSpectrum]] = {}
    wanted = frozenset(steps)

    def run(state: Any, base: Params, batch: Any) -> Any:
        # A step donates its state: what is read of it is read first.
        if (number := int(state.step)) in wanted:
            spectra_at[number] = measure(state.factors, batch)
        return step(state, base, batch)

    return run, spectra_at


def _values(path: str, gradients: np.ndarray) -> Float[np.ndarray, "S k"]:
    """Singular values of each matrix, largest first."""
    if not np.isfinite(gradients).all():
        raise AdapterError(f"the gradient at {path!r} is not finite.\n  look at the loss: did training diverge?")
    return gram_values(gradients.astype(np.float64))
