"""LoRA-XS: the paper's equation within the singular vectors of W."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from tests.draws import draw
from tests.methods import promises

SETTING = lk.LoRAXS(rank=3, alpha=6)


def formula(w, f, scale):
    assert scale == 2
    return w + scale * f["a0"].T @ f["r"] @ f["b0"]


def test_the_update_is_the_papers():
    promises.check_formula(SETTING, formula, {"r": 2, "a0": 1, "b0": 1})


def test_dtypes():
    promises.check_bfloat16(SETTING)


def test_stacked_trials_of_different_rank_equal_solo_runs(standard_promotion):
    promises.check_stacking(variant="lora_xs")


def test_frozen_factors_are_the_truncated_svd():
    """a0^T b0 is the best rank-3 approximation of each stacked matrix; the rows of b0 are orthonormal."""
    w = draw(0, 2, 7, 5)
    params = {"w": w}
    fn = lambda p, x: jnp.einsum("sti,sio->sto", x, p["w"])  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.LoRAXS(rank=3)}), params, fn, jnp.ones((2, 4, 7)))
    f = lk.split(params, plan, jax.random.key(0))[1]["w"]
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    best = np.einsum("sir,sr,sro->sio", u[..., :3], s[:, :3], vt[:, :3])
    np.testing.assert_allclose(np.einsum("rsi,rso->sio", f.a0, f.b0), best, atol=1e-5)
    np.testing.assert_allclose(np.einsum("rso,qso->srq", f.b0, f.b0), [np.eye(3)] * 2, atol=1e-5)


def test_the_gradient_at_the_start_needs_no_draw():
    """dL/dR = s A0 (dL/dW) B0^T, in float64 numpy."""
    w, x = draw(0, 7, 5), draw(1, 4, 7)
    fn = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]))  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.LoRAXS(rank=2, alpha=4)}), {"w": w}, fn, x)
    base, factors = lk.split({"w": w}, plan, jax.random.key(0))
    got = jax.jit(jax.grad(lambda f: lk.adapt(fn, plan)(base, f, x)))(factors)["w"].r
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    dw = x.T @ np.cos(x @ w)
    np.testing.assert_allclose(got, 2 * np.asarray(factors["w"].a0) @ dw @ np.asarray(factors["w"].b0).T, rtol=1e-4)


def test_a_rank_above_min_of_in_and_out_is_refused():
    with pytest.raises(lk.PlanError) as e:
        lk.resolve(lk.Spec({"w": lk.LoRAXS(rank=6)}), {"w": jnp.ones((7, 5))})
    assert str(e.value).splitlines()[0] == "rank 6 at 'w' is above min(in, out) = 5 (in (7,), out (5,))."


def test_bad_settings():
    promises.check_refused(
        lk.LoRAXS,
        [
            ({"rank": 2.0}, f"rank is 2.0; {promises.RANK}"),
            ({"rank": 2, "alpha": 0}, "alpha is 0; it must be a positive number of float32's range."),
            ({"rank": 2, "rslora": 1}, "rslora is 1; it must be true or false."),
            (
                {"rank": 2, "dtype": "int8"},
                "dtype is 'int8'; it must name a float dtype such as 'float32' or 'bfloat16'.",
            ),
        ],
    )
