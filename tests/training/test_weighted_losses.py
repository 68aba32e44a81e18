"""Loss and aux over micro-batches and devices: which leaves are split, what adds up, and how parts weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lorax_kit as lk

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
FACTORS = {"w": jnp.asarray([0.3, -0.2, 0.5])}


def squares(f, x):
    return (x @ f["w"] - 1) ** 2


def over_shard_map(loss, tx, accumulate=1):
    init, step = lk.make_step(loss, tx, accumulate=accumulate, axis_name="data", jit=False)
    specs = {"mesh": lk.device_mesh(), "in_specs": (P(), P(), P("data")), "out_specs": (P(), P())}
    return init, jax.jit(jax.shard_map(step, **specs))


MAKERS = {
    "one": lk.make_step,
    "accumulate": lambda loss, tx: lk.make_step(loss, tx, accumulate=4),
    "pmap": lk.pmap_step,
    "pmap of 2 micro-batches": lambda loss, tx: lk.pmap_step(loss, tx, accumulate=2),
    "mesh": lambda loss, tx: lk.sharded_step(loss, tx, lk.device_mesh()),
    "mesh of 2 micro-batches": lambda loss, tx: lk.sharded_step(loss, tx, lk.device_mesh(), accumulate=2),
    "shard_map": over_shard_map,
}


def stepped(maker, loss, batch=X, rate=1.0, key=None):
    init, step = MAKERS[maker](loss, optax.sgd(rate))
    return step(init(FACTORS, key), None, batch)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_weighted_loss_is_exact_for_any_split(maker):
    """Against float64: 8 examples of which parts hold different numbers that count."""
    mask = np.array([1, 0, 0, 0, 1, 1, 1, 0], np.float32)

    def loss(base, f, batch):
        total = jnp.sum(squares(f, batch["x"]) * batch["mask"])
        return lk.Weighted(total, jnp.sum(batch["mask"])), {
            "right": lk.Weighted(jnp.sum((batch["x"][:, 0] > 0) * batch["mask"]), jnp.sum(batch["mask"]))
        }

    with jax.numpy_dtype_promotion("standard"):
        state, info = stepped(maker, loss, {"x": X, "mask": mask})
    x, w = X.astype(np.float64)[mask > 0], np.asarray(FACTORS["w"], np.float64)
    errors = x @ w - 1
    assert float(info.loss) == pytest.approx(np.mean(errors**2), rel=1e-6)
    assert float(info.aux["right"]) == pytest.approx(np.mean(x[:, 0] > 0), rel=1e-6)
    np.testing.assert_allclose(state.factors["w"], w - 2 * errors @ x / len(x), atol=2e-6)


def test_micro_batches_that_weigh_nothing_do_not_spoil_the_others():
    def loss(base, f, batch):
        return lk.Weighted(jnp.sum(squares(f, batch["x"]) * batch["mask"]), jnp.sum(batch["mask"]))

    mask = np.array([1, 1, 0, 0, 0, 0, 0, 0], np.float32)
    state, info = stepped("accumulate", loss, {"x": X, "mask": mask})
    assert bool(info.finite)
    assert float(info.loss) == pytest.approx(float(squares(FACTORS, X[:2]).mean()), rel=1e-6)
    state, info = stepped("accumulate", loss, {"x": X, "mask": 0 * mask})
    assert not bool(info.finite)
    np.testing.assert_array_equal(state.factors["w"], FACTORS["w"])


@pytest.mark.parametrize("maker", MAKERS)
def test_counts_and_bools_of_aux_come_back_as_means(maker):
    def loss(base, f, x):
        aux = {"positive": jnp.sum((x[:, 0] > 0).astype(jnp.int8)), "all": jnp.all(x[:, 1] > -9), "nothing": None}
        return jnp.mean(squares(f, x)), aux

    _, info = stepped(maker, loss)
    positive = int((X[:, 0] > 0).sum())
    parts = {"one": 1, "accumulate": 4, "mesh": 1, "mesh of 2 micro-batches": 2, "pmap of 2 micro-batches": 8}
    assert float(info.aux["positive"]) == positive / parts.get(maker, 4)
    assert float(info.aux["all"]) == 1
    assert info.aux["nothing"] is None
    whole = maker in ("one", "mesh")
    assert info.aux["positive"].dtype == (jnp.int32 if whole else jnp.float32)  # one part: as the loss gave it


@pytest.mark.parametrize("maker", MAKERS)
def test_numbers_and_keys_reach_every_part(maker):
    if maker == "shard_map":
        pytest.skip("what a shard_map of one's own splits is its in_specs")

    def loss(base, f, batch):
        assert jnp.shape(batch["temperature"]) == jnp.shape(batch["key"]) == ()
        half = batch["x"].astype(jnp.bfloat16) * batch["temperature"]  # a Python number does not widen bf16
        assert half.dtype == jnp.bfloat16
        draw = jax.random.uniform(batch["key"])
        return jnp.mean(squares(f, batch["x"] / batch["scale"])), {"draw": draw, "square": draw**2}

    batch = {"x": X, "temperature": 2.0, "scale": np.float32(2), "key": jax.random.key(0), "mask": None}
    _, info = stepped(maker, loss, batch)
    assert float(info.loss) == pytest.approx(float(squares(FACTORS, X / 2).mean()), rel=1e-6)
    spread = float(info.aux["square"]) - float(info.aux["draw"]) ** 2
    assert spread == pytest.approx(0, abs=1e-6) if maker in ("one", "mesh") else spread > 1e-3  # each draws its own


@pytest.mark.parametrize(
    ("maker", "batch", "says"),
    [
        ("accumulate", {"x": X, "weights": np.ones(4)}, r"batch\['x'\] has 8 entries .* accumulate splits both"),
        ("accumulate", {"x": X, "key": jax.random.PRNGKey(0)}, r"batch\['x'\] has 8 .*batch\['key'\] has 2"),
        ("pmap", {"x": X, "weights": np.ones(4)}, r"batch\['x'\] has 8 entries .* pmap splits both"),
        ("pmap", {"x": X, "text": "good"}, r"batch\['text'\] is a str"),
        ("mesh", {"x": X, "text": "good"}, r"batch\['text'\] is a str"),
        ("mesh", {"x": X, "weights": np.ones(6)}, r"batch\['weights'\], .*\(6,\), does not split over 4 devices"),
    ],
)
def test_batches_that_cannot_be_split_name_the_leaf(maker, batch, says):
    with pytest.raises(lk.LoraxError, match=says):
        stepped(maker, lambda base, f, batch: jnp.mean(squares(f, batch["x"])), batch)


@pytest.mark.parametrize(
    ("maker", "out", "says"),
    [
        ("accumulate", lambda f, x: (jnp.mean(x @ f["w"]), {"key": jax.random.key(0)}), r"aux\['key'\] is a random"),
        ("one", lambda f, x: (jnp.mean(x @ f["w"]), {"name": "points"}), r"aux\['name'\] is a str"),
        ("one", lambda f, x: lk.Weighted(x @ f["w"], 1.0), r"the loss has shape \(8,\)"),
        ("one", lambda f, x: lk.Weighted(jnp.mean(x @ f["w"]), jnp.ones(2)), r"the loss's weight has shape \(2,\)"),
        ("one", lambda f, x: None, "the loss has the type NoneType"),
    ],
)
def test_losses_that_cannot_be_averaged_say(maker, out, says):
    with pytest.raises(lk.LoraxError, match=says):
        stepped(maker, lambda base, f, x: out(f, x))


def test_gradients_of_bf16_factors_are_summed_in_fp32():
    """128 equal micro-batches: in bf16 the running sum would stop growing at 1/256 of itself."""
    factors = {"w": jnp.ones(1, jnp.bfloat16)}

    def loss(base, f, x):
        return jnp.mean(f["w"].astype(jnp.float32)[None] * x)

    init, step = lk.make_step(loss, optax.sgd(1.0), accumulate=512)
    _, info = step(init(factors), None, np.full((512, 1), 1.5, np.float32))
    assert float(info.grad_norm) == pytest.approx(1.5, rel=1e-6)


def test_an_int_is_no_key():
    init, _ = lk.make_step(lambda base, f, x, key: jnp.mean(x @ f["w"]), optax.sgd(0.1))
    with pytest.raises(lk.LoraxError, match=r"init's key is 0; it must be one random key.\n  make it: jax.random.key"):
        init(FACTORS, 0)
    with pytest.raises(lk.LoraxError, match=r"an array of shape \(2,\) and dtype key<fry>"):
        init(FACTORS, jax.random.split(jax.random.key(0)))
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert init(FACTORS, key).key.dtype == key.dtype
