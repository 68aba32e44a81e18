"""Random arrays for tests, by numpy: `jax.random.normal` compiles for each shape anew, and so does `jnp.asarray`."""

import jax
import numpy as np

from lorax_kit.core.method import frozen_leaves


def draw(seed, *shape):
    """(*shape) of N(0, 1), float32; the same for the same seed."""
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def moved(tree):
    """A tree whose every leaf is moved at random: factors away from their zero update."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(7)
    added = [0.3 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
    return treedef.unflatten([jax.device_put(np.asarray(x) + y) for x, y in zip(leaves, added, strict=True)])


def moved_leaves(plan, factors):
    """Factors whose trained leaves are moved at random; frozen ones are as they were."""
    other = moved(factors)
    for site in plan.sites:
        held = {name: getattr(factors[site.path], name) for name in frozen_leaves(site.setting)}
        other[site.path] = other[site.path]._replace(**held)
    return other
