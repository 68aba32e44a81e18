"""The cut before the first trained parameter: nothing trained in front, everything shared in front, equal together."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.problem import Evaluator, val_and_test
from lorax_kit.training.prefix import split_prefix
from tests import tiny


def test_prefix_then_suffix_is_the_function_and_the_prefix_ignores_what_is_trained():
    params, batch = tiny.params(jax.random.key(0)), tiny.points(0, 16)
    parts = split_prefix(tiny.apply, params, {"up/kernel", "head/bias"}, batch)
    shared = parts.prefix(params, batch)
    assert [x.shape for x in shared] == [(16, 8)]
    np.testing.assert_array_equal(parts.suffix(params, batch, shared), tiny.apply(params, batch))
    other = params | {"up": {"kernel": params["up"]["kernel"] + 1}}
    np.testing.assert_array_equal(parts.prefix(other, batch)[0], shared[0])
    np.testing.assert_array_equal(parts.suffix(other, batch, shared), tiny.apply(other, batch))


def test_the_first_layer_runs_once_however_many_versions():
    params, batch = tiny.params(jax.random.key(0)), tiny.points(0, 16)
    parts = split_prefix(tiny.apply, params, {"up/kernel"}, batch)
    jaxpr = jax.make_jaxpr(parts.suffix)(params, batch, parts.prefix(params, batch))
    assert str(jaxpr).count("dot_general") == 3
    assert str(jax.make_jaxpr(tiny.apply)(params, batch)).count("dot_general") == 4


def test_scores_are_those_of_the_whole_function():
    params, problem = tiny.params(jax.random.key(0)), tiny.problem()
    measure = Evaluator(problem, params, {"up/kernel"}, [*problem.test, *problem.val])
    changed = params | {"up": {"kernel": -params["up"]["kernel"]}}
    for p in (params, changed):
        found = measure(p)
        x = np.concatenate([b.x for b in (*problem.test, *problem.val)])
        label = np.concatenate([b.label for b in (*problem.test, *problem.val)])
        logits = np.asarray(tiny.apply(p, tiny.Points(x, label)), np.float64)
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        assert found["examples"] == 106
        np.testing.assert_allclose(found["loss"], -logp[np.arange(106), label].mean(), rtol=1e-5)
        assert found["accuracy"] == (logits.argmax(1) == label).mean()
    assert jnp.isfinite(found["loss"])


def test_batches_that_differ_in_static_fields_have_programs_of_their_own():
    """Validation and test share what is compiled: where the structure differs, they must not."""

    @partial(jax.tree_util.register_dataclass, data_fields=["x", "label"], meta_fields=["sign"])
    @dataclass(frozen=True)
    class Signed:
        x: Any
        label: Any
        sign: int

    def apply(p, batch):
        return batch.sign * tiny.apply(p, batch)

    def signed(sign, seed):
        points = tiny.points(seed, 16)
        return Signed(points.x, points.label, sign)

    def train(seed, start):
        while True:
            yield signed(1, seed)

    problem = tiny.problem(apply=apply, train=train, val=[signed(1, 1)], test=[signed(-1, 2)])
    params = problem.params(jax.random.key(0))
    val, test = val_and_test(problem, params, {"up/kernel"})
    val(params)
    assert test(params) == Evaluator(problem, params, {"up/kernel"}, problem.test)(params)
    assert test(params) != Evaluator(problem, params, {"up/kernel"}, [signed(1, 2)])(params)
