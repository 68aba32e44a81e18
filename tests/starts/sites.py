"""Sites of every layout for the tests of starts: matrices, N-D kernels, stacks in any place, tables."""

import jax
import jax.numpy as jnp
import numpy as np

import lorax_kit as lk
from tests.draws import draw

# name -> (shape of w, function, shape of x)
LAYOUTS = {
    "matrix": ((7, 6), lambda p, x: x @ p["w"], (40, 7)),
    "wide": ((5, 9), lambda p, x: x @ p["w"], (40, 5)),
    "transposed": ((6, 7), lambda p, x: x @ p["w"].T, (40, 7)),
    "heads": ((2, 4, 6), lambda p, x: jnp.einsum("thd,hdo->to", x, p["w"]), (40, 2, 4)),
    "stack": ((3, 7, 6), lambda p, x: jnp.einsum("end,edh->enh", x, p["w"]), (3, 40, 7)),
    "stack last": ((6, 7, 3), lambda p, x: jnp.einsum("end,hde->neh", x, p["w"]), (3, 40, 7)),
}


def prepare(layout, setting):
    """(params, fn, x, plan): inputs of falling size along fixed directions, so that data matter."""
    shape, fn, x_shape = LAYOUTS[layout]
    params, x = {"w": draw(0, *shape)}, draw(1, *x_shape)
    x = x * jnp.asarray(0.6 ** np.arange(x_shape[-1]), x.dtype).reshape((1,) * (len(x_shape) - 1) + (-1,))
    return params, fn, x, lk.resolve(lk.Spec({"w": setting}), params, fn, x)


def matrices(site, x):
    """An array of the parameter's shape as (S, K, N), float64: by einsum, from `site.axes` alone."""
    letters = "abcdef"
    axes = (site.axes.stack, site.axes.inputs, site.axes.outputs)
    order = "".join(letters[i] for group in axes for i in group)
    x = np.einsum(f"{letters[: len(site.shape)]}->{order}", np.asarray(x, np.float64))
    sizes = [int(np.prod([site.shape[i] for i in group])) for group in axes]
    return x.reshape(sizes)


def rows(site, x):
    """A factor as (S, r, K or N), float64."""
    x = np.asarray(x, np.float64)
    return x.reshape(x.shape[0], int(np.prod(site.stack_shape)), -1).swapaxes(0, 1)


def inputs(site, x):
    """The inputs as (S, M, K), float64."""
    x = np.asarray(x, np.float64)
    return x if site.stack_shape else x.reshape(1, x.shape[0], -1)


def started(params, plan, hints=None):
    """(site, leaves) of a split with one site."""
    base, factors = lk.split(params, plan, jax.random.key(0), hints=hints)
    merged = lk.merge(base, factors, plan)
    assert np.asarray(merged["w"]).tobytes() == np.asarray(params["w"]).tobytes()
    return plan.sites[0], factors["w"]
