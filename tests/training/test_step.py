"""The pure step: whose gradients, clipped how, averaged how, and what a bad batch changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.training import labels
from tests import tiny

PROBLEM = tiny.problem()


def setup(variant="lora", rank=2, full=True, **options):
    rules = {"head/{kernel,bias}": lk.Full()} if full else {}
    spec = lk.Spec(rules | {"{up,down}/kernel": lk.LoRA(rank=rank, variant=variant, **options)})
    batch = next(tiny.stream(0, 0))
    plan = lk.resolve(spec, tiny.params(jax.random.key(0)), tiny.apply, batch)
    base, factors = lk.split(tiny.params(jax.random.key(0)), plan, jax.random.key(1))
    adapted = lk.adapt(tiny.apply, plan)
    # Away from the zero update, so that every factor has a gradient.
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    return plan, base, factors, lambda base, f, b: PROBLEM.loss(adapted(base, f, b), b), batch


def close(x, y, atol=1e-6):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def test_accumulation_equals_the_whole_batch():
    plan, base, factors, loss, batch = setup()
    results = []
    for n in (1, 4):
        init, step = lk.make_step(loss, lk.partition(optax.sgd(0.1), plan), accumulate=n)
        results.append(step(init(factors), base, batch))
    close(results[0][0].factors, results[1][0].factors)
    assert float(results[0][1].loss) == pytest.approx(float(results[1][1].loss), rel=1e-6)
    init, step = lk.make_step(loss, lk.partition(optax.sgd(0.1), plan), accumulate=3)
    with pytest.raises(lk.LoraxError, match="batch of 16 does not divide into accumulate=3"):
        step(init(factors), base, batch)
    with pytest.raises(lk.LoraxError, match="accumulate is 0"):
        lk.make_step(loss, optax.sgd(0.1), accumulate=0)


def test_clipping_uses_the_norm_of_the_trained_leaves_only():
    plan, base, factors, loss, batch = setup()
    grads = jax.jit(jax.grad(lambda f: loss(base, f, batch)))(factors)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
    init, step = lk.make_step(loss, lk.partition(optax.sgd(1.0), plan, clip=norm / 10))
    state, info = step(init(factors), base, batch)
    assert float(info.grad_norm) == pytest.approx(norm, rel=1e-5)
    close(state.factors, jax.tree.map(lambda x, g: x - g / 10, factors, grads), atol=1e-5)


def test_rates_per_label_are_loraplus():
    plan, base, factors, loss, batch = setup("dora")
    grads = jax.jit(jax.grad(lambda f: loss(base, f, batch)))(factors)
    rates = {"a": 0.1, "b": 1.6, "magnitude": 0.0, "full": 0.5}
    init, step = lk.make_step(loss, lk.partition({k: optax.sgd(v) for k, v in rates.items()}, plan))
    state, _ = step(init(factors), base, batch)
    for path, leaf in state.factors.items():
        for name, x in leaf._asdict().items():
            if x is not None:
                rate = rates["full" if name == "value" else name]
                old, g = getattr(factors[path], name), getattr(grads[path], name)
                np.testing.assert_allclose(x, old - rate * g, atol=1e-6, err_msg=f"{path}:{name}")


def test_a_frozen_label_moves_by_exactly_zero_and_keeps_no_moments():
    plan, base, factors, loss, batch = setup()
    tx = lk.partition({"a": optax.set_to_zero(), "b": optax.adamw(0.1), "full": optax.adamw(0.1)}, plan)
    init, step = lk.make_step(loss, tx)
    state, _ = step(init(factors), base, batch)
    for path in ("up/kernel", "down/kernel"):
        assert np.asarray(state.factors[path].a).tobytes() == np.asarray(factors[path].a).tobytes()
        assert float(jnp.abs(state.factors[path].b - factors[path].b).max()) > 0.01
    trained = sum(x.size for p, f in factors.items() for n, x in f._asdict().items() if x is not None and n != "a")
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if getattr(x, "ndim", 0) > 0)
    assert moments == 2 * trained


def test_frozen_leaves_are_never_moved_and_have_no_label():
    plan, _, factors, _, _ = setup(freeze_a=True)
    assert labels(plan)(factors)["up/kernel"] == lk.Factors("frozen", "b")
    for tx in (optax.sgd(1.0), {"b": optax.sgd(1.0), "full": optax.sgd(1.0)}):
        tx = lk.partition(tx, plan)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, factors), tx.init(factors), factors)
        assert float(jnp.abs(updates["up/kernel"].a).max()) == 0
        assert float(updates["up/kernel"].b[0, 0]) == -1


@pytest.mark.parametrize(
    ("tx", "says"),
    [
        ({"a": optax.sgd(1.0)}, "lacks label 'b'"),
        ({"a": optax.sgd(1.0), "b": optax.sgd(1.0), "full": optax.sgd(1.0), "c": optax.sgd(1.0)}, "unknown label 'c'"),
    ],
)
def test_missing_and_unknown_labels_raise(tx, says):
    with pytest.raises(lk.PlanError, match=says):
        lk.partition(tx, setup()[0])


def test_a_bad_batch_changes_no_factor_and_no_moment():
    plan, base, factors, loss, batch = setup()
    init, step = lk.make_step(loss, lk.partition(optax.adamw(0.1), plan))
    state, _ = step(init(factors), base, batch)
    kept = [np.asarray(x).copy() for x in jax.tree.leaves((state.factors, state.opt_state))]
    state, info = step(state, base, batch._replace(x=batch.x * np.nan))
    assert not bool(info.finite)
    for x, y in zip(jax.tree.leaves((state.factors, state.opt_state)), kept, strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(state.step) == 2


def test_only_the_state_is_donated():
    plan, base, factors, loss, batch = setup()
    batch = jax.tree.map(jnp.asarray, batch)
    init, step = lk.make_step(loss, lk.partition(optax.adamw(0.1), plan))
    state = init(factors)
    step(state, base, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.factors))
    assert not any(x.is_deleted() for x in jax.tree.leaves((base, factors, batch)))


def test_the_step_is_pure():
    plan, base, factors, loss, batch = setup()
    init, step = lk.make_step(loss, lk.partition(optax.adamw(0.1), plan), jit=False)
    state = init(factors)
    close(step(state, base, batch)[0], step(state, base, batch)[0], atol=0)


def test_dropout_keys_differ_by_step_and_repeat_by_seed():
    plan, base, factors, _, batch = setup(dropout=0.5)
    adapted = lk.adapt(tiny.apply, plan)

    def loss(base, f, b, key):
        return PROBLEM.loss(adapted(base, f, b, dropout_key=key), b)

    init, step = lk.make_step(loss, lk.partition(optax.sgd(0.0), plan))
    runs = []
    for seed in (0, 0, 1):
        state, losses = init(factors, jax.random.key(seed)), []
        for _ in range(3):
            state, info = step(state, base, batch)
            losses.append(float(info.loss))
        runs.append(losses)
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 3


def test_aux_is_averaged_over_micro_batches():
    plan, base, factors, loss, batch = setup()

    def with_aux(base, f, b):
        return loss(base, f, b), {"first": jnp.mean(b.x[:, 0])}

    init, step = lk.make_step(with_aux, lk.partition(optax.sgd(0.1), plan), accumulate=2)
    _, info = step(init(factors), base, batch)
    assert float(info.aux["first"]) == pytest.approx(float(batch.x[:, 0].mean()), rel=1e-5)


def half_precision(scale, make):
    """Relative error of a step's gradients on a base in float16, whose cotangents are near the least of its numbers."""
    x = jax.random.normal(jax.random.key(0), (256, 16))
    params = {"w": jax.random.normal(jax.random.key(1), (16, 8)) / 4, "v": jax.random.normal(jax.random.key(2), (8, 4))}

    def loss(params, x):
        hidden = jnp.tanh(x.astype(params["w"].dtype) @ params["w"]) @ params["v"]
        return 1e-5 * jnp.mean(hidden.astype(jnp.float32) ** 2)

    half = jax.tree.map(lambda w: w.astype(jnp.float16), params)
    plan, narrow = (lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), tree, loss, x) for tree in (params, half))
    _, factors = lk.split(params, plan, jax.random.key(3))
    factors = jax.tree.map(lambda f: f + 0.1, factors)
    wanted = jax.grad(lambda f: lk.adapt(loss, plan)(params, f, x))(factors)
    init, step = make(lk.adapt(loss, narrow), scale)
    state, info = step(init(factors), half, x)
    assert bool(info.finite)
    got = jax.tree.map(lambda new, old: old - new, state.factors, factors)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


@pytest.mark.parametrize(
    "make",
    [
        lambda loss, scale: lk.make_step(loss, optax.sgd(1.0), loss_scale=scale),
        lambda loss, scale: lk.sharded_step(loss, optax.sgd(1.0), lk.training_mesh(data=4), loss_scale=scale),
        lambda loss, scale: lk.pmap_step(loss, optax.sgd(1.0), loss_scale=scale),
    ],
    ids=["jit", "mesh", "pmap"],
)
def test_a_loss_scale_keeps_small_gradients_of_half_precision(make):
    assert half_precision(1.0, make) > 0.1  # lost below 6e-8
    kept = half_precision(2.0**15, make)
    assert kept < 0.02  # what rounding the base to 11 bits leaves,
    assert kept == pytest.approx(half_precision(2.0**16, make), rel=1e-3)  # of any scale that is large enough


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), "large", True])
def test_a_loss_scale_that_is_no_positive_number_is_refused(scale):
    with pytest.raises(lk.LoraxError, match="loss_scale is"):
        lk.make_step(lambda *_: 0.0, optax.sgd(1.0), loss_scale=scale)
