"""What a base forgets: closed forms, and float64 numpy from the merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.analysis import forgetting, held_out_change
from tests.draws import draw

PARAMS = {"w": draw(0, 5, 3)}
PLAN = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, alpha=1)}), PARAMS)
FACTORS = {"w": lk.Factors(a=draw(1, 1, 5), b=draw(2, 1, 3))}


def apply(p, batch):
    return batch["x"] @ p["w"]


def losses(logits, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][..., None], axis=-1)[..., 0]


def batch(seed, *shape):
    rng = np.random.default_rng(seed)
    return {"x": np.asarray(rng.normal(size=(*shape, 5)), np.float32), "label": rng.integers(0, 3, size=shape)}


def log_probabilities(w, x):
    y = x.astype(np.float64) @ w
    return y - np.log(np.exp(y).sum(axis=-1, keepdims=True))


def test_change_and_divergence_equal_numpy():
    batches = [batch(0, 7), batch(1, 4)]
    found = forgetting(apply, losses, batches, PARAMS, FACTORS, PLAN, logits=lambda y: y)
    w = np.asarray(PARAMS["w"], np.float64)
    after = w + np.asarray(FACTORS["w"].a, np.float64).T @ np.asarray(FACTORS["w"].b, np.float64)
    x, label = (np.concatenate([b[name] for b in batches]) for name in ("x", "label"))
    p, q = log_probabilities(w, x), log_probabilities(after, x)
    one, two = (-z[np.arange(11), label] for z in (p, q))
    assert found.before == pytest.approx(one.mean(), rel=1e-5)
    assert found.after == pytest.approx(two.mean(), rel=1e-5)
    np.testing.assert_allclose(found.differences, two - one, atol=1e-5)
    assert found.difference == pytest.approx((two - one).mean(), rel=1e-4)
    assert found.error == pytest.approx((two - one).std(ddof=1) / 11**0.5, rel=1e-4)
    assert found.divergence == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)), rel=1e-4)


def test_an_adapter_that_changes_nothing_forgets_nothing():
    still = lk.split(PARAMS, PLAN, jax.random.key(0))[1]
    found = forgetting(apply, losses, [batch(0, 6)], PARAMS, still, PLAN, logits=lambda y: y)
    assert (found.difference, found.error, found.divergence) == (0, 0, 0)
    assert found.before == found.after


def test_positions_are_averaged_within_examples_and_padding_is_left_out():
    """Per token: an example counts as much as another, however long; one of weight 0 does not, whatever it holds."""
    b = batch(2, 4, 6)
    lengths = np.array([6, 2, 0, 1])
    weight = (np.arange(6) < lengths[:, None]).astype(np.float32)
    b["x"][2] = np.nan
    found = forgetting(apply, losses, [b], PARAMS, FACTORS, PLAN, logits=lambda y: y, weight=lambda b: weight)
    rows = [0, 1, 3]
    alone = [{name: x[i : i + 1, : lengths[i]] for name, x in b.items()} for i in rows]
    parts = [forgetting(apply, losses, [one], PARAMS, FACTORS, PLAN, logits=lambda y: y) for one in alone]
    np.testing.assert_allclose(found.differences, [x.difference for x in parts], rtol=1e-6)
    assert found.divergence == pytest.approx(np.mean([x.divergence for x in parts]), rel=1e-6)
    assert np.isnan(parts[0].error)  # one example has no spread


def test_classes_of_probability_zero_add_nothing():
    inf = float("inf")
    base, other = {"y": jnp.array([[0.0, 0.0, -inf]])}, {"y": jnp.array([[0.0, 1.0, -inf]])}
    found = held_out_change(lambda p, b: p["y"], lambda y, b: jnp.zeros(1), [0], base, other, logits=lambda y: y)
    q = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert found.divergence == pytest.approx(np.sum(0.5 * np.log(0.5 / q)))
    turned = held_out_change(lambda p, b: p["y"], lambda y, b: jnp.zeros(1), [0], base, base)
    assert np.isnan(turned.divergence)  # no logits were given


def test_quantised_bases_and_params_with_other_leaves():
    params = {"w": draw(0, 4, 6), "activation": "tanh"}
    base = lk.quantize(params, ["w"], "int8", block=2)
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, inputs=(0,))}), base)
    factors = lk.split(base, plan, jax.random.key(0))[1]
    x = draw(1, 3, 4)
    found = forgetting(lambda p, x: x @ p["w"], lambda y, x: jnp.sum(y, axis=-1), [x], base, factors, plan)
    assert found.before == pytest.approx(float(jnp.mean(jnp.sum(x @ base["w"].restore(), axis=-1))), rel=1e-5)
    assert found.difference == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "^there are no held-out examples"),
        ({"weight": lambda b: np.zeros(3)}, "^there are no held-out examples"),
        ({"losses": lambda y, b: jnp.mean(y)}, r"^losses of shape \(\) and weights of shape \(\)"),
        ({"weight": lambda b: np.ones(2)}, r"^losses of shape \(3,\) and weights of shape \(2,\)"),
        ({"logits": lambda y: y[None]}, r"^logits of shape \(1, 3, 3\) do not go with losses of shape \(3,\)"),
        ({"factors": {}}, "^the factors lack 'w'"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {"losses": losses, "batches": [batch(0, 3)], "factors": FACTORS, "logits": None, "weight": None} | change
    with pytest.raises(lk.AdapterError, match=message):
        forgetting(
            apply, given["losses"], given["batches"], PARAMS, given["factors"], PLAN,
            logits=given["logits"], weight=given["weight"],
        )  # fmt: skip
