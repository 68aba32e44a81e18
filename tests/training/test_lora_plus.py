"""LoRA+: another rate for the leaves on the side of the outputs, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from tests.draws import draw, moved

PARAMS = {"w": draw(0, 4, 3), "k": draw(1, 4, 5), "h": draw(2, 4, 4), "table": draw(3, 7, 3), "bias": draw(4, 3)}
SPEC = lk.Spec(
    {"w": lk.LoRA(rank=2), "k": lk.VeRA(rank=3), "h": lk.LoHa(rank=2), "table": lk.LoRA(rank=2), "bias": lk.Full()}
)


def fn(p, x):
    return x @ p["w"] + p["table"][jnp.asarray([0, 2])] + p["bias"][None], x @ p["k"], x @ p["h"]


def steps(tx, factors):
    @jax.jit
    def step(factors, state, grads):
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state

    state, seen = tx.init(factors), factors
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), factors)  # noqa: B023
        seen, state = step(seen, state, grads)
    return seen


def test_it_equals_a_rate_per_leaf(standard_promotion):
    plan = lk.resolve(SPEC, PARAMS, fn, jnp.ones((2, 4)))
    factors = moved(lk.split(PARAMS, plan, jax.random.key(0))[1])
    slow, fast = (optax.adamw(optax.linear_schedule(rate, 0, 5), weight_decay=0.1) for rate in (1e-3, 8e-3))
    got = steps(lk.partition(lk.lora_plus(slow, plan, ratio=8), plan), factors)
    base, high = (steps(lk.partition(tx, plan), factors) for tx in (slow, fast))
    faster = {("w", "b"), ("k", "v"), ("h", "b1"), ("h", "b2")}
    for path, leaves in got.items():
        for name, x in leaves._asdict().items():
            if x is not None:
                want = (high if (path, name) in faster else base)[path]
                np.testing.assert_allclose(x, getattr(want, name), rtol=1e-6, err_msg=f"{path} {name}")
    assert float(jnp.abs(base["w"].b - high["w"].b).max()) > 1e-3


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0, "ratio is 0; it must be a positive number."),
        (True, "ratio is True; it must be a positive number."),
        (float("inf"), "ratio is inf; it must be a positive number."),
        ("16", "ratio is '16'; it must be a positive number."),
    ],
)
def test_bad_ratios(ratio, message):
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), PARAMS)
    with pytest.raises(lk.PlanError) as e:
        lk.lora_plus(optax.sgd(1.0), plan, ratio=ratio)
    assert str(e.value) == message


def test_a_plan_without_such_leaves_is_refused():
    plan = lk.resolve(lk.Spec({"w": lk.LoRAXS(rank=2)}), PARAMS)
    with pytest.raises(lk.PlanError) as e:
        lk.lora_plus(optax.sgd(1.0), plan)
    assert str(e.value) == (
        "the plan trains no leaf on the side of the outputs, such as LoRA's b: LoRA+ changes nothing."
    )
