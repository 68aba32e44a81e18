"""Riemannian preconditioning of low-rank factors (Zhang and Pilanci, arXiv 2402.02347, eq. 2).

    dA <- (B B^T + delta I)^-1 dA        dB <- (A A^T + delta I)^-1 dB

Symbols: A is (r, in) and B (r, out) as everywhere here; the two Grams are r x r, one pair for each stacked matrix.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.arrays.svd import one_by_one
from lorax_kit.core.leaves import FactorTree
from lorax_kit.core.method import leaf_shapes, method_of
from lorax_kit.core.plan import Plan
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError

if TYPE_CHECKING:
    from jaxtyping import Float

HIGHEST = jax.lax.Precision.HIGHEST


def riemannian(plan: Plan, *, delta: float = 1e-6) -> optax.GradientTransformation:
    """Precondition the gradients of LoRA's factors: how A and B share the size of the update then matters no more.

    It goes before the optimiser; with AdamW it is the paper's scaled AdamW. Rows that are zero in both factors stay
    zero, so stacked trials of different rank may use it.

    Args:
      plan: from `lk.resolve`; the sites of methods without two such factors keep their gradients.
      delta: damping, positive: at the start B is zero, and so is its Gram.

    Returns:
      An `optax.GradientTransformation` over the whole factor tree, to be chained before `lk.partition`.

    Raises:
      PlanError: a delta that is not positive, a plan without such factors; when called, without params or within a
        partition that hides a factor.

    Example:
      >>> import jax, lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params)
      >>> base, factors = lk.split(params, plan, jax.random.key(0))
      >>> tx = optax.chain(riemannian(plan), lk.partition(optax.adamw(1e-3), plan))
      >>> updates, _ = tx.update(factors, tx.init(factors), factors)
      >>> updates["w"].b.shape
      (2, 3)
    """
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < float("inf"):
        raise PlanError(f"delta is {delta!r}; it must be a positive number.")
    sites = [site for site in plan.sites if method_of(site.setting).factors is not None]
    if not sites:
        kinds = ", ".join(sorted({site.setting.kind for site in plan.sites})) or "none"
        raise PlanError(f"the plan has no site with two factors to precondition; its methods: {kinds}.")

    def preconditioned(grads: FactorTree, params: FactorTree | None) -> FactorTree:
        if params is None:
            raise PlanError("riemannian needs the factors: tx.update(grads, state, factors).")
        out = dict(grads)
        for site in sites:
            out[site.path] = _preconditioned(site, grads[site.path], params[site.path], delta)
        return out

    return optax.stateless(preconditioned)


def _preconditioned(site: Site, grads: Any, leaves: Any, delta: float) -> Any:
    # Within a partition what the method does without is masked, too; only what is hidden is missing.
    wanted = leaf_shapes(site)._asdict()
    leaves = leaves._replace(**{name: None for name, x in wanted.items() if x is None})
    if any(isinstance(x, optax.MaskedNode) for x in leaves):
        raise PlanError(
            f"a partition hides factors of {site.path!r} from riemannian.\n"
            "  chain it before: optax.chain(lk.riemannian(plan), lk.partition(tx, plan))"
        )
    factors = method_of(site.setting).factors
    assert factors is not None
    a, b = (_matrices(site, x.astype(wide(x.dtype))) for x in factors(leaves))
    alive = jnp.any(a != 0, (0, 2)) | jnp.any(b != 0, (0, 2))  # (r,)

    def solved(grad: Array, other: Float[Array, "s r n"]) -> Array:
        g = _matrices(site, grad.astype(other.dtype))
        values, vectors = one_by_one(jnp.linalg.eigh)(jnp.einsum("srn,sqn->srq", other, other, precision=HIGHEST))
        # Rounding makes small eigenvalues negative: a Cholesky factor of the damped Gram need not exist.
        damped = 1 / (jnp.maximum(values, 0) + delta)
        inverse = jnp.einsum("srk,sk,sqk->srq", vectors, damped, vectors, precision=HIGHEST)
        x = jnp.einsum("srq,sqn->srn", inverse, g, precision=HIGHEST)
        x = jnp.where(alive[:, None], x, 0)
        return jnp.moveaxis(x, 0, 1).reshape(grad.shape).astype(grad.dtype)

    return grads._replace(a=solved(grads.a, b), b=solved(grads.b, a))


def _matrices(site: Site, x: Array) -> Float[Array, "s r n"]:
    """(r, *stack, *axes) as a matrix (r, n) for each stacked one."""
    return jnp.moveaxis(x.reshape(x.shape[0], prod(site.stack_shape), -1), 0, 1)
