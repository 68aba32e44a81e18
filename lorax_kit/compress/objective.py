"""min 1/2 |W - A B|_F^2 + lam |A|_F + mu |B|_F over A (m, r) and B (r, n), solved exactly; the squared norms, too.

For one product M = A B the penalty is least where both factors split the singular values of M evenly, and is then
2 sqrt(lam mu |M|_*): by the inequality of the means, and |M|_* <= |A|_F |B|_F (Srebro, Rennie & Jaakkola, NIPS 2004).
So M has the singular vectors of W, and values t_i >= 0 that minimise

    f(t) = 1/2 sum (s_i - t_i)^2 + 2 sqrt(lam mu sum t_i)

Where f is stationary t_i = max(s_i - tau, 0) with tau = sqrt(lam mu / sum t_i), a scalar equation: with the k largest
values active, tau^2 (s_1 + ... + s_k - k tau) = lam mu. Each k gives a cubic with at most two roots; f is not convex,
so all of them and M = 0 are compared. With squared norms the penalty is 2 sqrt(lam mu) |M|_*, and tau is
2 sqrt(lam mu) (the nuclear norm's threshold, Cai, Candes & Shen, arXiv 0810.3286).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from lorax_kit.arrays.svd import leading
from lorax_kit.calibration.arguments import shown
from lorax_kit.compress.arguments import check_count, check_key, check_number, check_positive
from lorax_kit.errors import CompressError


class Solution(NamedTuple):
    """What `solve` found.

    Attributes:
      a, b: (m, r), (r, n) in the dtype of `w`; W ~ a @ b.
      objective: its value.
    """

    a: np.ndarray
    b: np.ndarray
    objective: float


def solve(w: Any, rank: int, lam: float = 0.0, mu: float = 0.0, *, squared: bool = False) -> Solution:
    """The minimum of 1/2 |W - A B|_F^2 + lam |A|_F + mu |B|_F, exactly (or of lam |A|_F^2 + mu |B|_F^2).

    Computed in float64 by one singular value decomposition.

    Args:
      w: (m, n), finite.
      rank: columns of A, 1 to min(m, n).
      lam, mu: at least 0; both or neither 0. With both 0 this is the truncated SVD.
      squared: penalise the squared norms.

    Returns:
      `Solution(a, b, objective)`. Columns beyond the active ones are zero; M = 0 gives zero factors.

    Raises:
      CompressError: anything out of range, or only one of `lam` and `mu` zero: its factor then grows for ever while
        the other's penalty goes to 0, and there is no minimum.

    Example:
      >>> a, b, objective = solve(np.diag([3.0, 1.0]), rank=1, lam=0.5, mu=0.5, squared=True)
      >>> round(float((a @ b)[0, 0]), 6), round(objective, 6)
      (2.0, 3.0)
    """
    matrix, rank, lam, mu = _checked(w, rank, lam, mu)
    u, s, vt = leading(matrix, rank)
    total, scale = float(np.vdot(matrix, matrix)), float(s[0])
    if not np.isfinite(total):
        raise CompressError("the squares of w are too large to be summed.\n  scale w down")
    rest = total - float(np.sum(s**2))
    if rest < 1e-4 * total:  # a small difference of large numbers: from the entries instead
        rest = float(np.sum((matrix - (u * s) @ vt) ** 2))
    t, value = np.zeros_like(s), 0.0
    if scale > 0:  # in units of the largest value, so that no cube of it over- or underflows
        scaled, penalty = s / scale, 0.0
        if lam > 0:
            power = 1.0 if squared else 1.5
            with np.errstate(over="ignore", divide="ignore"):
                penalty = float(np.float64(lam) / np.float64(scale) ** power * (mu / np.float64(scale) ** power))
        t, value = _shrunk(scaled, penalty, squared)
    # |A| = c sqrt(sum t), |B| = sqrt(sum t) / c: the split that costs least.
    c = (mu / lam) ** (0.25 if squared else 0.5) if lam > 0 and t.any() else 1.0
    root = np.sqrt(scale * t)
    dtype = np.asarray(w).dtype if jnp.issubdtype(np.asarray(w).dtype, jnp.floating) else np.dtype(np.float64)
    a, b = (c * u * root).astype(dtype), (root[:, None] * vt / c).astype(dtype)
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        raise CompressError(f"the factors do not fit {dtype}.\n  give w in a wider dtype")
    return Solution(a, b, 0.5 * rest + scale**2 * value)


def objective(w: Any, a: Any, b: Any, lam: float, mu: float, *, squared: bool = False) -> Any:
    """1/2 |W - A B|_F^2 + lam |A|_F + mu |B|_F of given factors (squared norms with `squared`); traceable."""
    sums = jnp.sum(jnp.square(a)), jnp.sum(jnp.square(b))
    norms = sums if squared else tuple(_root(x) for x in sums)
    return 0.5 * jnp.sum(jnp.square(w - a @ b)) + lam * norms[0] + mu * norms[1]


def solve_by_gradient(
    w: Array,
    rank: int,
    lam: float,
    mu: float,
    key: Array,
    *,
    squared: bool = False,
    steps: int = 1000,
    rate: float = 1.0,
) -> Solution:
    """The same minimum sought by Adam under jit, from a random start: for comparison, not for use.

    In the dtype of `w`; with the defaults it ends above the minimum by less than 1e-3 of it at 768 x 3072
    (`experiments/solver.py` has the figures).

    Args:
      key: random key of the start.
      steps: of Adam. One program serves any number of them.
      rate: at the first step, relative to the size of the start's entries; it decays to 0 as a cosine.

    Raises:
      CompressError: as `solve`; a key that is none, steps or a rate that are not positive.
    """
    _checked(w, rank, lam, mu)
    check_key(key)
    steps, rate = check_count("steps", steps), check_positive("rate", rate)
    matrix = jnp.asarray(w)
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        matrix = matrix.astype(jnp.float32)
    keys = jax.random.split(key)
    scale = (jnp.linalg.norm(matrix) / (matrix.size * rank) ** 0.5) ** 0.5
    start = tuple(
        scale * jax.random.normal(k, shape, matrix.dtype)
        for k, shape in zip(keys, ((matrix.shape[0], rank), (rank, matrix.shape[1])), strict=True)
    )
    (a, b), value = _descended(matrix, start, lam, mu, steps, rate * scale, squared=squared)
    return Solution(np.asarray(a), np.asarray(b), float(value))


@partial(jax.jit, static_argnames="squared")
def _descended(
    matrix: Array, start: Any, lam: Any, mu: Any, steps: Any, rate: Any, *, squared: bool
) -> tuple[tuple[Array, Array], Array]:
    """(factors, objective) after `steps`, which is traced: one program for each shape, however long it runs."""
    adam = optax.scale_by_adam()

    def loss(ab: tuple[Array, Array]) -> Any:
        return objective(matrix, ab[0], ab[1], lam, mu, squared=squared)

    def step(i: Array, carry: Any) -> Any:
        ab, state = carry
        updates, state = adam.update(jax.grad(loss)(ab), state)
        now = 0.5 * rate * (1 + jnp.cos(jnp.pi * i / steps))
        return jax.tree.map(lambda x, u: x - (now * u).astype(x.dtype), ab, updates), state

    ab, _ = jax.lax.fori_loop(0, steps, step, (start, adam.init(start)))
    return ab, loss(ab)


@jax.custom_jvp
def _root(x: Array) -> Array:
    """sqrt, with derivative 0 at 0 (a subgradient of the norm)."""
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = jnp.sqrt(primals[0])
    return y, jnp.where(y > 0, 0.5 / jnp.where(y > 0, y, 1), 0) * tangents[0]


def _shrunk(s: np.ndarray, penalty: float, squared: bool) -> tuple[np.ndarray, float]:
    """(t, f(t)) that minimise f for singular values s, with penalty = lam mu."""
    if squared or penalty == 0:
        t = np.maximum(s - 2 * np.sqrt(penalty), 0)
        return t, _value(s, t, penalty, squared)
    candidates = [np.zeros_like(s), *(np.maximum(s - tau, 0) for tau in _thresholds(s, penalty))]
    return min(((t, _value(s, t, penalty, squared)) for t in candidates), key=lambda pair: pair[1])


def _value(s: np.ndarray, t: np.ndarray, penalty: float, squared: bool) -> float:
    total = float(np.sum(t))
    cost = np.sqrt(penalty) * (total if squared else np.sqrt(total)) if total > 0 else 0.0
    return 0.5 * float(np.sum((s - t) ** 2)) + 2 * float(cost)


def _thresholds(s: np.ndarray, penalty: float) -> list[float]:
    """All tau with tau^2 sum max(s_i - tau, 0) = penalty: of each cubic the roots between its break points."""
    roots = []
    ends = np.append(s[1:], 0.0)
    for k, (total, upper, lower) in enumerate(zip(np.cumsum(s), s, ends, strict=True), 1):
        if upper <= lower:
            continue

        def excess(tau: float, total: float = total, k: int = k) -> float:
            return tau * tau * (total - k * tau) - penalty

        # tau^2 (total - k tau) rises to 2 total / 3k and falls from there: one root at most on each side.
        top = min(max(2 * total / (3 * k), lower), upper)
        for one, other in ((lower, top), (top, upper)):
            if excess(one) * excess(other) <= 0 and one < other:
                roots.append(_bisected(excess, one, other))
    return roots


def _bisected(fn: Callable[[float], float], one: float, other: float) -> float:
    """A root of `fn` between two places where its signs differ, to the last bit or nearly so."""
    sign = fn(one) <= 0
    for _ in range(200):
        middle = 0.5 * (one + other)
        if middle in (one, other):
            break
        if (fn(middle) <= 0) == sign:
            one = middle
        else:
            other = middle
    return 0.5 * (one + other)


def _checked(w: Any, rank: Any, lam: Any, mu: Any) -> tuple[np.ndarray, int, float, float]:
    if isinstance(w, jax.core.Tracer):
        raise CompressError(
            "w is traced; solve works on the host.\n  call it outside jit, or minimise lk.compress.objective"
        )
    given = np.asarray(w)
    if given.dtype.kind not in "biu" and not jnp.issubdtype(given.dtype, jnp.floating):
        raise CompressError(f"w is {shown(w)}; only real matrices are decomposed.")
    matrix = given.astype(np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise CompressError(f"w has shape {matrix.shape}; it must be a matrix.")
    if not np.isfinite(matrix).all():
        raise CompressError("w holds values that are not finite.")
    most = min(matrix.shape)
    if check_count("rank", rank) > most:
        raise CompressError(f"rank is {rank}; it must be 1 to min{matrix.shape} = {most}.")
    lam, mu = check_number("lam", lam, 0.0), check_number("mu", mu, 0.0)
    if (lam == 0) != (mu == 0):
        raise CompressError(
            f"lam is {lam!r} and mu is {mu!r}: with only one of them 0 its factor grows for ever, without a minimum.\n"
            "  give both, or neither (the truncated SVD)"
        )
    return matrix, int(rank), lam, mu
