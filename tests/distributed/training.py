"""The tiny classifier trained over a mesh, for fifty steps in two epochs: what every layout must agree on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_kit as lk
from lorax_kit.parallel import replicate
from tests import tiny

STEPS = 50
RULES = {"up/kernel": ("tensor", None), "down/kernel": (None, "tensor")}
TX = {"b1": 0.9, "eps": 1e-3}
"""Adam divides by the size of a gradient: where that is nothing but rounding, eps keeps it from deciding."""


def prepared():
    """(loss, optimiser, base, factors, plan) of one adaptation."""
    params = tiny.params(jax.random.key(0))
    spec = lk.Spec({"head/{kernel,bias}": lk.Full(), "{up,down}/kernel": lk.LoRA(rank=2, dropout=0.1)})
    plan = lk.resolve(spec, params, tiny.apply, next(tiny.stream(0, 0)))
    base, factors = lk.split(params, plan, jax.random.key(1))
    adapted = lk.adapt(tiny.apply, plan)

    def loss(base, f, b, key):
        return jnp.mean(tiny.losses(adapted(base, f, b, dropout_key=key), b))

    return loss, lk.partition(optax.adam(1e-2, **TX), plan, clip=1.0), base, factors, plan


def placed(base, mesh):
    """The base in parts along fsdp and tensor axes, else on every device."""
    sizes = mesh.shape
    if sizes["fsdp"] * sizes["tensor"] == 1:
        return replicate(base, mesh)
    return lk.place(base, lk.layout(base, mesh, RULES if sizes["tensor"] > 1 else None, smallest=1))


def epochs():
    """Two of 25 batches, the same whenever they are asked for."""
    return [[batch for batch, _ in zip(tiny.stream(0, start), range(25), strict=False)] for start in (0, 25)]


def fitted(init, step, base, factors, **options):
    """Train them, from a key for dropout."""
    return lk.fit(step, init(factors, jax.random.key(3)), base, epochs(), progress=False, **options)


def flat(factors):
    """All numbers of factors, one after another."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(factors))])
