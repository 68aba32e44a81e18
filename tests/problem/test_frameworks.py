"""Models of Flax linen, Flax NNX and Equinox as they come, with BatchNorm and dropout, in one study each."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lorax_kit as lk
from lorax_kit.core.paths import flatten
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(out, problem, targets, **changes):
    study = tiny.study(
        **{"rank": [1, 2], "seed": [0], "probe_lr": (), "steps": 6, "targets": {"up": targets}} | changes
    )
    return lk.run(study, problem, out=out, progress=False)


def check(results, problem, moved):
    """Statistics moved, each trial has its own, and a saved adapter evaluates to its row."""
    base = problem.params(jax.random.key(0))
    seen = []
    for row in results.rows:
        adapter = lk.load_adapter(results.path / row["adapter"], base=base)
        merged = lk.merge(base, adapter.factors, adapter.plan)
        right = sum(int((problem.apply(merged, b).argmax(-1) == b.label).sum()) for b in problem.test)
        assert right / 74 == pytest.approx(row["test_accuracy"])
        seen.append([np.asarray(adapter.factors[path].value) for path in moved])
    for path, first, second in zip(moved, *seen, strict=True):
        start = np.asarray(flatten(base)[0][path])
        assert np.abs(first - start).max() > 1e-4, path
        assert np.abs(first - second).max() > 0, path


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.tanh(nn.Dense(8, name="first")(x))
        x = nn.Dropout(0.2, deterministic=not train)(nn.tanh(nn.Dense(9, name="up")(x)))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8, name="norm")(x)
        return nn.Dense(2, name="head")(x)


def test_linen_variables_with_batch_stats_and_dropout(tmp_path):
    model = Linen()
    variables = model.init(jax.random.key(7), jnp.zeros((1, 6)), train=False)

    def train_apply(v, batch, key):
        return model.apply(v, batch.x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    problem = tiny.problem(
        params=lambda key: variables,
        apply=lambda v, batch: model.apply(v, batch.x, train=False),
        train_apply=train_apply,
        state=["batch_stats/**"],
        head=["params/head/*"],
    )
    results = run(tmp_path / "run", problem, ["params/{first,up}/kernel"])
    check(results, problem, ["batch_stats/norm/mean", "batch_stats/norm/var"])


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.up = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 9, rngs=rngs)
        self.norm = nnx.BatchNorm(9, momentum=0.8, rngs=rngs)
        self.head = nnx.Linear(9, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        return self.head(self.norm(jnp.tanh(self.up(x))))


def test_nnx_state_with_batch_stats(tmp_path):
    graph, state = nnx.split(Nnx(nnx.Rngs(3)))

    def apply(state, batch):
        model = nnx.merge(graph, state)
        model.eval()
        return model(batch.x)

    def train_apply(state, batch, key):
        model = nnx.merge(graph, state)
        model.train()
        outputs = model(batch.x)
        return outputs, nnx.state(model, nnx.BatchStat)

    paths = list(lk.paths(state))
    stats = [p for p in paths if p.startswith("norm/") and ("mean" in p or "var" in p)]
    problem = tiny.problem(
        params=lambda key: state, apply=apply, train_apply=train_apply, state=stats, head=["head/**"]
    )
    results = run(
        tmp_path / "run", problem, ["{first,up}/kernel/**"] if "up/kernel" not in paths else ["{first,up}/kernel"]
    )
    check(results, problem, stats)


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    up: eqx.nn.Linear
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.first, self.up = eqx.nn.Linear(6, 8, key=one), eqx.nn.Linear(8, 9, key=two)
        self.drop, self.head = eqx.nn.Dropout(0.3), eqx.nn.Linear(9, 2, key=three)

    def __call__(self, x, key=None, inference=True):
        x = jnp.tanh(self.up(jnp.tanh(self.first(x))))
        return self.head(self.drop(x, key=key, inference=inference))


def test_an_equinox_module_with_dropout(tmp_path):
    model = Equinox(jax.random.key(5))

    def train_apply(model, batch, key):
        keys = jax.random.split(key, len(batch.x))
        return jax.vmap(lambda x, k: model(x, k, inference=False))(batch.x, keys)

    problem = tiny.problem(
        params=lambda key: model,
        apply=lambda model, batch: jax.vmap(model)(batch.x),
        train_apply=train_apply,
        head=["head/*"],
    )
    results = run(tmp_path / "run", problem, ["{first,up}/weight"])
    check(results, problem, [])
    assert results.rows[0]["train_loss"] != results.rows[1]["train_loss"]
