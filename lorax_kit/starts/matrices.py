"""What starts that are computed share: float64 on the host, one stacked matrix after another, and the data they need.

The host's float64 decides for every backend alike, and singular vectors of the smallest values still mean something.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.core.method import Hints
from lorax_kit.core.site import Site
from lorax_kit.errors import PlanError
from lorax_kit.starts.start import Start


def by_matrix(fn: Callable[..., tuple[np.ndarray, np.ndarray]], site: Site, *stacked: Any) -> Start:
    """The factors that `fn` gives for each of the site's stacked matrices.

    Args:
      fn: numpy arrays, float64, one of each of `stacked` -> (a (r, K), b (r, N)).
      stacked: (S, ...) each; where one is traced, the host is called back.

    Raises:
      PlanError: an entry that is not finite (outside of jit).
    """
    shapes = [jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for shape in (site.a_shape, site.b_shape)]

    def host(*stacked: Any) -> list[np.ndarray]:
        arrays = [np.asarray(x).astype(np.float64) for x in stacked]
        if not all(np.isfinite(x).all() for x in arrays):
            raise PlanError(f"{site.path!r}, or the hints of it, hold values that are not finite.")
        pairs = [fn(*(x[i] for x in arrays)) for i in range(prod(site.stack_shape))]
        rows = [np.stack(side, axis=1) for side in zip(*pairs, strict=True)]
        return [x.reshape(shape.shape).astype(shape.dtype) for x, shape in zip(rows, shapes, strict=True)]

    if any(isinstance(x, jax.core.Tracer) for x in stacked):
        constant = jax.lax.stop_gradient(stacked)  # where factors begin is not differentiated
        return Start(*jax.pure_callback(host, shapes, *constant, vmap_method="sequential"))
    return Start(*(jnp.asarray(x) for x in host(*stacked)))


def balanced(u: np.ndarray, s: np.ndarray, vt: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with scale a^T b = u diag(s) vt, the singular values shared evenly; rows up to one sign for both.

    Where s is zero, so is `b`; `a` is not, or neither could ever learn.
    """
    root = np.sqrt(s / scale)[:, None]
    alive = s > np.finfo(np.float64).eps * max(float(s.max(initial=0.0)), np.finfo(np.float64).tiny)
    a, b = np.where(alive[:, None], root, 1.0) * u.T, root * vt
    sign = signs(a)
    return sign * a, sign * b


def signs(rows: np.ndarray) -> np.ndarray:
    """(r, 1): +1 or -1, what makes the largest entry of each row positive: the same on every machine."""
    largest = np.take_along_axis(rows, np.argmax(np.abs(rows), axis=1)[:, None], axis=1)
    return np.where(largest < 0, -1.0, 1.0)


def needed(site: Site, hints: Hints, name: str, start: str) -> Any:
    """The gram (S, K, K) or the gradient of a site.

    Raises:
      PlanError: it was not given, is of another shape, or zero; or the site is a table, which has no gram.
    """
    x = getattr(hints, name)
    if x is None and name == "gram" and site.lookup:
        raise PlanError(f"start {start!r} reads what is multiplied, and the rows of a table are looked up.\n"
                        "  give its rule another start, such as 'kaiming'")  # fmt: skip
    if x is None:
        how = "loss=loss, collect=['gradient']" if name == "gradient" else "collect=['inputs']"
        raise PlanError(
            f"start {start!r} at {site.path!r} needs the {WORDS[name]} there: give lk.split(..., hints=stats), "
            "or a study's problem those hints.\n"
            f"  stats = lk.calibrate(fn, params, plan, batches, {how})"
        )
    wanted = site.shape if name == "gradient" else (prod(site.stack_shape), *2 * (prod(site.in_shape),))
    if tuple(x.shape) != wanted:
        raise PlanError(
            f"the {name} of {site.path!r} in hints= has shape {tuple(x.shape)}; the parameter needs {wanted}.\n"
            "  it is of another model: calibrate this one"
        )
    if not isinstance(x, jax.core.Tracer) and not np.any(np.asarray(x)):
        raise PlanError(f"the {name} of {site.path!r} in hints= is zero: no data reached it.\n  give another start")
    return x


WORDS = {"gram": "inputs of the data", "gradient": "gradient of a loss"}
