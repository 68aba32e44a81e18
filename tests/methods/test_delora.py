"""DeLoRA: rows of fixed length, whose strength is trained by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.starts import STARTS
from lorax_kit.starts.start import Start
from tests.draws import draw
from tests.methods import promises

STACKED = {"a": 1, "b": 1, "bound": 0, "norm": 0}


def formula(w, leaves, scale):
    """PEFT's, with the 1e-4 below which rows are not stretched to unit length."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-4) for x in (leaves["a"], leaves["b"]))
    norms = np.linalg.norm(w, axis=1)
    return w + leaves["bound"] * scale * (a * norms).T @ b


def test_the_update_is_pefts():
    assert lk.DeLoRA(rank=4).scale == 1 / 4
    promises.check_formula(lk.DeLoRA(rank=4, bound=2.0), formula, STACKED)


def test_short_rows_are_not_stretched():
    def short(leaves):
        return leaves._replace(b=leaves.b.at[1].multiply(1e-6), a=leaves.a.at[2].multiply(1e-6))

    promises.check_formula(lk.DeLoRA(rank=4, bound=2.0), formula, STACKED, short)


def test_the_bound_holds_whatever_the_factors():
    params = {"w": draw(0, 8, 6)}
    plan = lk.resolve(lk.Spec({"w": lk.DeLoRA(rank=3, bound=2.0)}), params)
    base, factors = lk.split(params, plan, jax.random.key(0))
    f = factors["w"]._replace(a=1e6 * draw(1, 3, 8), b=1e3 * draw(2, 3, 6))
    delta = np.asarray(lk.merge(base, {"w": f}, plan)["w"] - params["w"])
    assert np.linalg.norm(delta) <= 2.0 * float(jnp.max(f.norm)) * (1 + 1e-5)


def test_the_norms_are_frozen_and_lambda_is_trained(standard_promotion):
    params, x = {"w": draw(0, 8, 6)}, draw(1, 4, 8)
    plan = lk.resolve(lk.Spec({"w": lk.DeLoRA(rank=2)}), params)
    base, factors = lk.split(params, plan, jax.random.key(0))
    np.testing.assert_allclose(factors["w"].norm, np.linalg.norm(np.asarray(params["w"]), axis=1), rtol=1e-6)
    assert float(factors["w"].bound) == 15
    adapted = lk.adapt(lambda p, x: x @ p["w"], plan)
    init, step = lk.make_step(lambda b, f, x: jnp.mean(adapted(b, f, x) ** 2), lk.partition(optax.adam(1e-2), plan))
    state = init(factors)
    for _ in range(2):
        state, _ = step(state, base, x)
    for name, x in state.factors["w"]._asdict().items():
        assert (float(jnp.abs(x - getattr(factors["w"], name)).max()) > 1e-3) == (name != "norm"), name


def test_zero_rows_have_no_update_and_no_gradient():
    params = {"w": draw(0, 8, 6)}
    plan = lk.resolve(lk.Spec({"w": lk.DeLoRA(rank=3)}), params)
    base, factors = lk.split(params, plan, jax.random.key(0))
    f = factors["w"]._replace(a=draw(1, 3, 8).at[1].set(0), b=draw(2, 3, 6).at[1].set(0))
    value, grads = jax.jit(jax.value_and_grad(lambda f: jnp.sum(lk.merge(base, {"w": f}, plan)["w"] ** 2)))(f)
    assert np.isfinite(value)
    for x in (grads.a, grads.b):
        assert np.isfinite(np.asarray(x)).all()
        assert not np.any(x[1])
        assert np.all(np.any(np.asarray(x)[[0, 2]], axis=1))


def test_trials_of_different_rank_stack(standard_promotion):
    promises.check_stacking(variant="delora", alpha=None, weight_decay=0.1)


def test_dtypes():
    promises.check_bfloat16(lk.DeLoRA(rank=3), wide=("bound", "norm"))


def test_a_start_of_both_factors_is_refused(monkeypatch):
    def both(site, w, key, hints):
        return Start(draw(0, *site.a_shape), draw(1, *site.b_shape))

    monkeypatch.setitem(STARTS, "both", both)
    with pytest.raises(lk.SpecError, match="start 'both' gives both factors; delora starts from one"):
        lk.resolve(lk.Spec({"w": lk.DeLoRA(rank=1, start="both")}), {"w": jnp.ones((3, 2))})


def test_bad_settings():
    promises.check_refused(
        lk.DeLoRA,
        [
            ({"rank": 2, "bound": 0}, "bound is 0; it must be a positive number of float32's range."),
            ({"rank": 2, "bound": float("inf")}, "bound is inf; it must be a positive number of float32's range."),
            ({"rank": 2, "bound": True}, "bound is True; it must be a positive number of float32's range."),
            ({"rank": 2, "start": "zero"}, f"start is 'zero'; choose from {', '.join(STARTS)}."),
        ],
    )
