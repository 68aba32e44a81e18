"""A tiny study: a three-layer classifier of points, whose answers do not depend on any package or file."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorax_kit as lk
from lorax_kit.problem import Score

WIDTH = 6
HEAD = ("head/{kernel,bias}",)
TARGETS = {"upper": ["{up,down}/kernel"]}


class Points(NamedTuple):
    x: np.ndarray
    label: np.ndarray


def points(seed, n):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, WIDTH)).astype(np.float32)
    return Points(x, (x[:, 0] * x[:, 1] > 0).astype(np.int32))


def params(key):
    rng = np.random.default_rng(0)

    def kernel(rows, columns):
        return jnp.asarray(rng.normal(size=(rows, columns)) / rows**0.5, jnp.float32)

    return {
        "first": {"kernel": kernel(WIDTH, 8)},
        "up": {"kernel": kernel(8, 9)},
        "down": {"kernel": kernel(9, 8)},
        "head": {"kernel": 0.1 * jax.random.normal(key, (8, 2)), "bias": jnp.zeros(2)},
    }


def apply(p, batch):
    with jax.numpy_dtype_promotion("strict"):
        h = jnp.tanh(batch.x @ p["first"]["kernel"])
        h = jnp.tanh(h @ p["up"]["kernel"]) @ p["down"]["kernel"]
        return h @ p["head"]["kernel"] + p["head"]["bias"][None]


def losses(logits, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.label[:, None], axis=-1)[:, 0]


def score(logits, batch):
    right = jnp.sum((jnp.argmax(logits, -1) == batch.label).astype(jnp.float32))
    return Score(jnp.sum(losses(logits, batch)), right, jnp.float32(logits.shape[0]))


def stream(seed, start):
    step = start
    while True:
        yield points(1000 * (seed + 1) + step, 16)
        step += 1


def problem(**changes):
    settings = {
        "name": "points",
        "params": params,
        "apply": apply,
        "loss": lambda logits, batch: jnp.mean(losses(logits, batch)),
        "score": score,
        "head": HEAD,
        "train": stream,
        "val": [points(1, 32)],
        "test": [points(2, 64), points(3, 10)],
        "facts": {"name": "points", "settings": {"width": WIDTH}},
    }
    return lk.Problem(**settings | changes)


def study(**changes):
    settings = {
        "rank": [1, 2, 4],
        "alpha": 8,
        "lr": [1e-2],
        "seed": [0, 1],
        "targets": TARGETS,
        "probe_lr": 3e-2,
        "steps": 20,
    }
    return lk.Study(**settings | changes)


@lk.problem_builder
def built(rows=32):
    """What `tests.tiny:built` names."""
    return problem(val=[points(1, rows)])


def unmarked():
    return problem()
