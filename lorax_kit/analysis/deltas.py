"""The true delta W' - W of a site on the host in float64, and its singular values.

    rows alone:   delta = A^T B,   A^T = Q_a R_a,   B^T = Q_b R_b,   sigma(delta) = sigma(R_a R_b^T)
    with gains:   delta = (c - 1) W + c A^T B,   c = out_gain * in_gain, decomposed whole

Symbols: A is (R, in) and B (R, out), the rows of the update in its normal form, the scale folded into B.

Singular values up to 4 eps of the terms (|A|_2 |B|_2; with gains |c| (|W|_2 + |A|_2 |B|_2)) are what rounding leaves of
terms that cancel, eps being that of the dtype the update is computed in: they count as zero. What runs here runs once
for a site, in numpy: nothing is compiled but the update, and LAPACK takes stacks there one matrix after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from lorax_kit.algebra.delta import normal_form, reads_base
from lorax_kit.arrays.svd import smaller_gram
from lorax_kit.core.lowrank import dense
from lorax_kit.core.method import method_of
from lorax_kit.core.site import Site
from lorax_kit.errors import AdapterError

if TYPE_CHECKING:
    from jaxtyping import Float

ROUNDINGS = 4
GRAM = 1e-7
"""Singular values from a Gram matrix in float64 are right to about 1e-8 of the largest."""


class SiteDelta(NamedTuple):
    """The delta of one site: rows where it has no gains, S whole matrices of K inputs and N outputs where it has.

    Attributes:
      a, b: (S, R, K) and (S, R, N), float64; None where the delta is whole.
      whole: (S, K, N), float64; None where the rows are all.
      rounding: (S,), singular values up to here are zero.
    """

    a: Float[np.ndarray, "S R K"] | None
    b: Float[np.ndarray, "S R N"] | None
    whole: Float[np.ndarray, "S K N"] | None
    rounding: Float[np.ndarray, " S"]

    def matrices(self) -> Float[np.ndarray, "S K N"]:
        """The delta as matrices."""
        if self.whole is not None:
            return self.whole
        assert self.a is not None
        assert self.b is not None
        product: np.ndarray = np.swapaxes(self.a, 1, 2) @ self.b
        return product


def site_delta(site: Site, base: Any, leaves: Any) -> SiteDelta:
    """What the update of a site adds to its parameter, of any method, gains included.

    Args:
      site: of the plan.
      base: the parameter, in its own layout, quantised or not.
      leaves: the site's, trained.

    Raises:
      AdapterError: the delta is not finite.
    """
    w = _host(dense(base)) if reads_base(site) else None
    a, b, *gains = map(_host, _normal_form(site.unnamed(), method_of(site.setting).update)(w, jax.device_get(leaves)))
    s, k, n = prod(site.stack_shape), prod(site.in_shape), prod(site.out_shape)
    eps = max((np.finfo(x.dtype).eps for x in (a, b, *gains) if x is not None), default=np.finfo(np.float32).eps)
    if a is None or b is None:
        a, b = np.zeros((0, s, k)), np.zeros((0, s, n))
    a = np.swapaxes(a.astype(np.float64).reshape(-1, s, k), 0, 1)
    b = np.swapaxes(b.astype(np.float64).reshape(-1, s, n), 0, 1)
    out_gain, in_gain = gains
    if out_gain is None and in_gain is None:
        delta = SiteDelta(a, b, None, ROUNDINGS * eps * spectral_norms(a) * spectral_norms(b))
    else:
        assert w is not None
        w3, c = site.matrices(w).astype(np.float64), np.ones((1, 1, 1))
        if out_gain is not None:
            c = c * out_gain.astype(np.float64).reshape(s, 1, n)
        if in_gain is not None:
            c = c * in_gain.astype(np.float64).reshape(s, k, 1)
        terms = np.abs(c).max(axis=(1, 2)) * (spectral_norms(w3) + spectral_norms(a) * spectral_norms(b))
        delta = SiteDelta(None, None, (c - 1) * w3 + c * (np.swapaxes(a, 1, 2) @ b), ROUNDINGS * eps * terms)
    if not all(np.isfinite(x).all() for x in delta if x is not None):
        raise AdapterError(
            f"the delta at {site.path!r} holds values that are not finite.\n"
            "  look at its factors: did training diverge?"
        )
    return delta


@lru_cache(maxsize=1024)
def _normal_form(site: Site, update: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """One program for sites alike; `update` is the method's, which a notebook may have registered anew."""
    return jax.jit(partial(normal_form, site))


def _host(x: Any) -> Any:
    return None if x is None else np.asarray(x)


def spectral_norms(matrices: Float[np.ndarray, "S m n"]) -> Float[np.ndarray, " S"]:
    """Largest singular value of each matrix to about a tenth, from below, by power iteration."""
    m = matrices if matrices.shape[1] <= matrices.shape[2] else np.swapaxes(matrices, 1, 2)
    if 0 in m.shape:
        return np.zeros(len(m))
    longest = np.argmax(np.sum(m * m, axis=2), axis=1)
    x = m[np.arange(len(m)), longest][:, :, None]
    length = np.linalg.norm(x, axis=1, keepdims=True)
    for _ in range(10):
        y = m @ (x / np.where(length > 0, length, 1))
        top = np.linalg.norm(y, axis=1)[:, 0]
        x = np.swapaxes(m, 1, 2) @ y
        length = np.linalg.norm(x, axis=1, keepdims=True)
    return top


def triangles(delta: SiteDelta) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Q_a, R_a, Q_b, R_b of a delta that is rows alone."""
    assert delta.a is not None
    assert delta.b is not None
    return (*np.linalg.qr(np.swapaxes(delta.a, 1, 2)), *np.linalg.qr(np.swapaxes(delta.b, 1, 2)))


def without_rounding(values: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """Values (S, k), 0 up to `rounding` (S,)."""
    return np.where(values > rounding[:, None], values, 0.0)


def gram_values(matrices: Float[np.ndarray, "S m n"]) -> Float[np.ndarray, "S k"]:
    """Singular values of each matrix, largest first, by the smaller Gram matrix: a quarter of the time of an SVD."""
    rows = []
    for matrix in matrices:
        gram = smaller_gram(matrix)
        if gram is None:  # entries whose squares over- or underflow, and zeros
            rows.append(np.linalg.svd(matrix, compute_uv=False))
        else:
            rows.append(np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)))
    return np.stack(rows)


def singular_values(deltas: Sequence[SiteDelta]) -> list[Float[np.ndarray, "S k"]]:
    """Of each delta, largest first; those of rows of one shape in one call, whole ones in turn, to save memory."""
    alike: dict[tuple[int, ...], list[int]] = {}
    out: list[np.ndarray] = [np.zeros(0)] * len(deltas)
    for i, delta in enumerate(deltas):
        if delta.whole is not None:
            values = gram_values(delta.whole)
            out[i] = without_rounding(values, np.maximum(delta.rounding, GRAM * values[:, 0]))
        else:
            assert delta.a is not None
            assert delta.b is not None
            alike.setdefault((*delta.a.shape[1:], delta.b.shape[2]), []).append(i)
    for members in alike.values():
        group = [deltas[i] for i in members]
        a, b = (np.concatenate([getattr(d, name) for d in group]) for name in ("a", "b"))
        rounding = np.concatenate([d.rounding for d in group])
        _, r_a, _, r_b = triangles(SiteDelta(a, b, None, rounding))
        core = r_a @ np.swapaxes(r_b, 1, 2)
        values = np.linalg.svd(core, compute_uv=False) if 0 not in core.shape else np.zeros((len(a), 0))
        values = without_rounding(values, rounding)
        ends = np.cumsum([len(d.rounding) for d in group])[:-1]
        for i, part in zip(members, np.split(values, ends), strict=True):
            out[i] = part
    return out
