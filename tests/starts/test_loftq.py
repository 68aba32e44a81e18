"""LoftQ: base and factors together are closer to W than a base that was rounded alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from tests.draws import draw
from tests.methods import formulas

FN = {
    "matrix": ((32, 16), lambda p, x: x @ p["w"], (3, 32)),
    "stack last": ((16, 32, 2), lambda p, x: jnp.einsum("end,hde->neh", x, p["w"]), (2, 3, 32)),
}


def prepare(layout="matrix", setting=None, dtype=jnp.float32):
    shape, fn, x = FN[layout]
    params, x = {"w": draw(0, *shape).astype(dtype), "bias": draw(1, 4)}, draw(2, *x).astype(dtype)
    spec = lk.Spec({"w": setting or lk.LoRA(rank=4, alpha=6), "bias": lk.Full()})
    return params, lk.resolve(spec, params, lambda p, x: (fn(p, x), p["bias"] + 1), x)


def distance(params, w):
    return np.linalg.norm(np.asarray(params["w"]).astype(np.float64) - np.asarray(w).astype(np.float64))


@pytest.mark.parametrize("method", ["nf4", "int4"])
@pytest.mark.parametrize("layout", FN)
@pytest.mark.parametrize("setting", [lk.LoRA, lk.DoRA])
def test_closer_to_w_than_rounding_and_a_zero_update(layout, method, setting):
    params, plan = prepare(layout, setting(rank=4, alpha=6))
    base, factors = lk.loftq(params, plan, jax.random.key(0), method=method, block=8)
    plain = lk.quantize(params, ["w"], method, block=8)
    zero = lk.merge(plain, lk.split(params, plan, jax.random.key(0))[1], plan)["w"]
    ours = distance(params, lk.merge(base, factors, plan)["w"])
    assert ours < 0.85 * distance(params, plain["w"].restore())
    assert ours < 0.85 * distance(params, zero)
    assert base["w"].method == method
    assert base["bias"] is params["bias"]
    np.testing.assert_array_equal(factors["bias"].value, params["bias"])


def test_one_round_leaves_the_tail_of_the_rounding_error():
    params, plan = prepare()
    base, factors = lk.loftq(params, plan, jax.random.key(0), block=8)
    plain = lk.quantize(params, ["w"], "nf4", block=8)["w"].restore()
    np.testing.assert_array_equal(base["w"].restore(), plain)
    rest = np.asarray(params["w"], np.float64) - np.asarray(plain, np.float64)
    a, b = (np.asarray(x, np.float64) for x in factors["w"][:2])
    np.testing.assert_allclose(1.5 * a.T @ b, formulas.svd_part(rest, 4), atol=1e-6)


def test_more_rounds_come_closer():
    params, plan = prepare()
    errors = []
    for rounds in (1, 2, 6):
        base, factors = lk.loftq(params, plan, jax.random.key(0), block=8, rounds=rounds)
        errors.append(distance(params, lk.merge(base, factors, plan)["w"]))
    assert errors[0] > errors[1] >= errors[2]


def test_a_bf16_base_keeps_its_dtype():
    params, plan = prepare(dtype=jnp.bfloat16)
    base, factors = lk.loftq(params, plan, jax.random.key(0), block=8)
    assert base["w"].dtype == jnp.bfloat16
    assert lk.merge(base, factors, plan)["w"].dtype == jnp.bfloat16


def test_the_adapter_saves_and_loads(tmp_path):
    params, plan = prepare()
    base, factors = lk.loftq(params, plan, jax.random.key(0), block=8)
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    again = lk.load_adapter(tmp_path / "a", base=base)
    np.testing.assert_array_equal(again.factors["w"].b, factors["w"].b)


@pytest.mark.parametrize(
    ("setting", "options", "message"),
    [
        (lk.LoRA(rank=4, start="pissa"), {}, "LoftQ gives the factors of 'w', and so does 'pissa'"),
        (lk.Rows(rows=(1,)), {}, "LoftQ gives the factors of 'w', and so does 'rows'"),
        (None, {"rounds": 0}, "rounds is 0; it must be an integer of at least 1"),
        (None, {"method": "int3"}, "method 'int3' is unknown"),
    ],
)
def test_says_what_is_wrong(setting, options, message):
    params, plan = prepare(setting=setting)
    with pytest.raises(lk.PlanError, match=message):
        lk.loftq(params, plan, jax.random.key(0), **options)


def test_a_base_that_is_rounded_already_is_an_error():
    params, plan = prepare()
    with pytest.raises(lk.PlanError, match="'w' is a Quantised; LoftQ starts from the values before rounding"):
        lk.loftq(lk.quantize(params, ["w"]), plan, jax.random.key(0))
