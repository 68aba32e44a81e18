"""The cut before the first trained parameter: nothing trained in front, everything shared in front, equal together."""

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.problem import Evaluator
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
