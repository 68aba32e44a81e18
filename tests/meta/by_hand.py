"""A linear model with one LoRA site and a head trained in full: its meta-objective in numpy float64, by hand.

y = x (W + s A^T B) + c, the loss mean((y - t)^2) over all entries.
"""

import jax
import jax.numpy as jnp
import numpy as np

import lorax_kit as lk
from lorax_kit.meta import Task
from tests.draws import draw

PARAMS = {"w": draw(0, 4, 3), "c": draw(1, 3)}
SCALE = 2.0


def apply(p, x):
    return x @ p["w"] + p["c"][None]


PLAN = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, alpha=4), "c": lk.Full()}), PARAMS, apply, draw(2, 5, 4))
BASE, _ = lk.split(PARAMS, PLAN, jax.random.key(0))
ADAPTED = lk.adapt(apply, PLAN)
START = {"w": lk.Factors(a=0.5 * draw(3, 2, 4), b=0.5 * draw(4, 2, 3)), "c": lk.FullLeaf(draw(5, 3))}
TASKS = Task((draw(6, 3, 5, 4), draw(7, 3, 5, 3)), (draw(8, 3, 6, 4), draw(9, 3, 6, 3)))


def loss_fn(base, factors, batch):
    x, target = batch
    return jnp.mean((ADAPTED(base, factors, x) - target) ** 2)


def task(i):
    return jax.tree.map(lambda x: x[i], TASKS)


def vector(tree):
    """(a, b, c) as one float64 vector."""
    parts = tree["w"].a, tree["w"].b, tree["c"].value
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in parts])


def loss_and_gradient(theta, batch):
    x, target = (np.asarray(y, np.float64) for y in batch)
    a, b, c = theta[:8].reshape(2, 4), theta[8:14].reshape(2, 3), theta[14:]
    error = x @ (np.asarray(BASE["w"], np.float64) + SCALE * a.T @ b) + c - target
    g = 2 * error / error.size
    dw = SCALE * x.T @ g
    return np.mean(error**2), np.concatenate([(b @ dw.T).ravel(), (a @ dw).ravel(), g.sum(axis=0)])


def inner(theta, batches, rate):
    """theta after one step on each batch; `rate` is a number, or a vector like theta."""
    for batch in batches:
        theta = theta - rate * loss_and_gradient(theta, batch)[1]
    return theta


def objective(theta, rate, steps, one):
    return loss_and_gradient(inner(theta, [one.support] * steps, rate), one.query)[0]


def central(f, x, h=1e-5):
    """The gradient of f at a vector, by central differences."""
    return np.array([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(x.size)])
