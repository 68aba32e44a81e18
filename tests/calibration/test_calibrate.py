"""Calibration against the inputs themselves, in every way a parameter may be used."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.compress import CompressError, calibrate
from tests.draws import draw


def sites(params, fn, *inputs, rank=1):
    return lk.resolve(lk.Spec({"**": lk.LoRA(rank=rank)}), params, fn, *inputs)


def test_sums_over_batches_are_those_of_the_inputs_of_each_layer():
    params = {"up": draw(0, 6, 5), "down": draw(1, 5, 4)}
    xs = [draw(2, 7, 6), draw(3, 7, 6)]
    found = calibrate(fn := lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, sites(params, fn, xs[0]), xs,
                      progress=False)  # fmt: skip
    for path, inputs in (("up", xs), ("down", [jnp.tanh(x @ params["up"]) for x in xs])):
        x = np.concatenate([np.asarray(x, np.float64) for x in inputs])
        assert found[path].tokens == 14
        np.testing.assert_allclose(found[path].gram[0], x.T @ x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[path].absolute[0], np.abs(x).mean(0), rtol=1e-5)
        assert found[path].gram.dtype == np.float64


def energy(params, fn, x):
    plan = sites(params, fn, x)
    (moments,) = calibrate(fn, params, plan, [x], progress=False).values()
    w = np.asarray(plan.sites[0].matrices(params["w"]), np.float64)
    return sum(np.trace(m.T @ g @ m) for m, g in zip(w, moments.gram, strict=True))


@pytest.mark.parametrize(
    ("shape", "fn", "x"),
    [
        ((6, 4), lambda p, x: x @ p["w"], (5, 6)),
        ((4, 6), lambda p, x: x @ p["w"].T, (5, 6)),
        ((2, 3, 4), lambda p, x: jnp.einsum("thd,hdo->to", x, p["w"]), (5, 2, 3)),
        ((3, 2, 4), lambda p, x: jnp.einsum("thd,dho->to", x, p["w"]), (5, 2, 3)),
        ((3, 6, 4), lambda p, x: jnp.einsum("end,edh->enh", x, p["w"]), (3, 5, 6)),
        ((6, 4, 3), lambda p, x: jnp.einsum("end,dhe->neh", x, p["w"]), (3, 5, 6)),
        ((3, 3, 2, 5), lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), (2, 8, 6, 2)),
        ((5, 2, 3), lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1,), [(1, 1)], rhs_dilation=(2,), dimension_numbers=("NCH", "OIH", "NCH")), (2, 2, 9)),
    ],
)  # fmt: skip
def test_energy_of_a_linear_layer(shape, fn, x):
    params, x = {"w": draw(0, *shape)}, draw(1, *x)
    assert energy(params, fn, x) == pytest.approx(float(jnp.sum(fn(params, x) ** 2)), rel=1e-5)


def test_groups_of_a_convolution_are_places_of_their_own():
    params, x = {"w": draw(0, 3, 2, 4)}, draw(1, 2, 9, 4)

    def fn(p, x):
        numbers = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "VALID", dimension_numbers=numbers, feature_group_count=2)

    found = calibrate(fn, params, sites(params, fn, x), [x], progress=False)["w"]
    windows = [x[:, i : i + 3, 2 * g : 2 * g + 2].reshape(2, 6) for i in range(7) for g in range(2)]
    rows = np.concatenate(windows).astype(np.float64)
    assert found.tokens == 28
    np.testing.assert_allclose(found.gram[0], rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_a_recurrent_weight_sums_over_the_steps_of_its_scan():
    params, xs = {"w": 0.3 * draw(0, 4, 4)}, draw(1, 6, 3, 4)

    def fn(p, xs):
        def step(h, x):
            h = jnp.tanh(x + h @ p["w"])
            return h, h

        return jax.lax.scan(step, jnp.ones((3, 4)), xs)[1]

    states = jnp.concatenate([jnp.ones((1, 3, 4)), fn(params, xs)[:-1]]).reshape(-1, 4)
    found = calibrate(fn, params, sites(params, fn, xs), [xs], progress=False)["w"]
    assert found.gram[0] == pytest.approx(np.asarray(states.T @ states, np.float64), rel=1e-4, abs=1e-4)


def test_layers_read_by_a_scan_have_sums_of_their_own():
    params, x = {"w": 0.4 * draw(0, 3, 4, 4)}, draw(1, 5, 4)
    fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]  # noqa: E731
    plan = sites(params, fn, x)
    assert plan.sites[0].axes.stack == (0,)
    found = calibrate(fn, params, plan, [x, x], progress=False)["w"]
    assert found.tokens == pytest.approx(10, rel=1e-6)
    h = x
    for i in range(3):
        np.testing.assert_allclose(found.gram[i], 2 * np.asarray(h.T @ h), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.absolute[i], np.abs(h).mean(0), rtol=1e-5)
        h = jnp.tanh(h @ params["w"][i])


def test_a_table_counts_its_rows():
    params, ids = {"w": draw(0, 7, 4)}, jnp.asarray([[0, 3, 6], [3, 3, 1]])
    fn = lambda p, ids: jnp.sum(p["w"][ids], axis=1)  # noqa: E731
    found = calibrate(fn, params, sites(params, fn, ids), [ids, ids], progress=False)["w"]
    assert found.counts.tolist() == [2, 2, 0, 6, 0, 0, 2]
    assert found.gram is None


def test_fisher_is_the_mean_squared_gradient_of_the_batches_over_outputs():
    params, xs = {"w": draw(0, 6, 4)}, [draw(1, 5, 6), draw(2, 5, 6)]
    fn, loss = lambda p, x: x @ p["w"], lambda y, x: jnp.mean(jnp.sin(y))
    found = calibrate(fn, params, sites(params, fn, xs[0]), xs, loss=loss, progress=False)["w"]
    squares = [jax.grad(lambda p, x=x: loss(fn(p, x), x))(params)["w"] ** 2 for x in xs]
    np.testing.assert_allclose(found.fisher[0], np.mean([np.asarray(s).mean(1) for s in squares], axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda p, x: jax.lax.cond(x.sum() > 1e9, lambda: x @ p["w"], lambda: jnp.zeros((5, 4))), "no batch led to"),
        (lambda p, x: (x @ p["w"][:3])[..., None] if x.shape[-1] == 3 else x[:, :3] @ p["w"][:3],
         "a part of it is used alone"),
        (lambda p, x: x @ p["w"] + jnp.tanh(x @ p["w"][::-1]), "knows some uses of 'w', but not all"),
        (lambda p, x: x @ p["w"][::-1], "it goes through 'rev' before it is multiplied"),
        (lambda p, x: x @ (p["w"] * jnp.arange(1.0, 7.0)[:, None]), "it goes through 'mul'"),
    ],
)  # fmt: skip
def test_what_no_batch_reaches_is_an_error(fn, message):
    params, x = {"w": draw(0, 6, 4)}, draw(1, 5, 6)
    plan = sites(params, lambda p, x: x @ p["w"], x)
    with pytest.raises(CompressError, match=message):
        calibrate(fn, params, plan, [x], progress=False)


@jax.custom_vjp
def own_product(x, w):
    return x @ w


own_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@pytest.mark.parametrize(
    ("fn", "tokens"),
    [
        (lambda p, x: jnp.argmax(x @ p["w"], -1), 5),
        (lambda p, x: (jnp.argmax(x @ p["w"], -1), x @ p["w"]), 10),
        (lambda p, x: jnp.round(x @ p["w"]) @ p["w"], 10),
        (lambda p, x: jax.lax.stop_gradient(jnp.tanh(x @ p["w"])) @ p["w"], 10),
        (lambda p, x: jax.lax.while_loop(
            lambda c: c[0] < 4, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1], 20),
        (lambda p, x: jax.lax.scan(lambda h, _: (jax.lax.cond(
            h[0, 0] > 1e9, lambda: h, lambda: jnp.tanh(h @ p["w"])), None), x, length=3)[0], 15),
        (lambda p, x: own_product(x, p["w"]), 5),
        (lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))(x), 5),
    ],
    ids=["integers", "both", "rounded", "stopped", "while", "cond in scan", "custom vjp", "checkpoint"],
)  # fmt: skip
def test_every_use_counts_whatever_follows_it(fn, tokens):
    params, x = {"w": draw(0, 6, 6)}, draw(1, 5, 6)
    found = calibrate(fn, params, sites(params, fn, x), [x], progress=False)["w"]
    assert found.tokens == tokens
    if tokens == 5:
        np.testing.assert_allclose(found.gram[0], x.T @ x, rtol=1e-5, atol=1e-5)


def test_a_loop_without_gradients_has_no_fisher():
    params, x = {"w": draw(0, 6, 6)}, draw(1, 5, 6)
    fn = lambda p, x: jax.lax.while_loop(lambda h: h[0, 0] < 0, lambda h: h @ p["w"], x)  # noqa: E731
    plan = sites(params, fn, x)
    with pytest.raises(CompressError, match="a while loop, which JAX cannot differentiate backwards"):
        calibrate(fn, params, plan, [x], loss=lambda y, x: jnp.mean(y), progress=False)


def test_a_table_that_is_multiplied_elsewhere_is_an_error():
    params, ids = {"w": draw(0, 7, 7)}, jnp.asarray([0, 3])
    fn = lambda p, ids: jax.nn.one_hot(ids, 7) @ p["w"] + p["w"][ids]  # noqa: E731
    plan = sites(params, lambda p, ids: p["w"][ids], ids)
    with pytest.raises(CompressError, match="knows some uses of 'w', but not all: its rows are looked up in one place"):
        calibrate(fn, params, plan, [ids], progress=False)


def test_integers_times_a_parameter_are_inputs_not_rows():
    params, x = {"w": draw(0, 3, 4)}, jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    fn = lambda p, x: jax.lax.dot(x, p["w"], preferred_element_type=jnp.float32)  # noqa: E731
    found = calibrate(fn, params, sites(params, fn, x), [x], progress=False)["w"]
    np.testing.assert_allclose(found.gram[0], x.T @ x)


def test_no_batches_is_an_error():
    params, x = {"w": draw(0, 6, 4)}, draw(1, 5, 6)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    with pytest.raises(CompressError, match="no calibration batches"):
        calibrate(fn, params, sites(params, fn, x), [], progress=False)


LENGTHS = (5, 3, 1)
MASK = (np.arange(5) < np.array(LENGTHS)[:, None]).astype(np.int32)
"""Three texts of at most five tokens."""


def layers(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def convolved(p, x):
    return jax.lax.conv_general_dilated(x, p["w"], (1,), [(0, 0)], dimension_numbers=("NHC", "HIO", "NHC"))


WEIGHTED = {
    "a layer": ((6, 4), lambda p, x: x @ p["w"]),
    "heads": ((2, 3, 4), lambda p, x: jnp.einsum("bthd,hdo->bto", x.reshape(3, -1, 2, 3), p["w"])),
    "flattened": ((6, 4), lambda p, x: x.reshape(-1, 6) @ p["w"]),
    "scanned layers": ((2, 6, 6), layers),
    "a convolution of width 1": ((1, 6, 4), convolved),
    "under jit": ((6, 4), lambda p, x: jax.jit(jnp.matmul)(x, p["w"])),
    "under vmap": ((6, 4), lambda p, x: jax.vmap(lambda row: row @ p["w"])(x)),
}


@pytest.mark.parametrize("case", WEIGHTED)
def test_what_padding_holds_does_not_count(case):
    """Sums over padded texts are those over the tokens alone, in float64, even where padding is not finite."""
    shape, fn = WEIGHTED[case]
    params, x = {"w": 0.5 * draw(0, *shape)}, draw(1, 3, 5, 6)
    padded = {"x": jnp.where(MASK[..., None] > 0, x, jnp.nan), "mask": MASK}
    whole = lambda p, batch: fn(p, batch["x"])  # noqa: E731
    plan = sites(params, whole, padded)
    found = calibrate(whole, params, plan, [padded, padded], weight="mask", progress=False)["w"]
    rows = jnp.concatenate([x[i, :n] for i, n in enumerate(LENGTHS)])[None]
    alone = calibrate(lambda p, x: fn(p, jnp.concatenate([x] * 3)[:, :9]), params, plan, [rows], progress=False)["w"]
    assert found.tokens == 2 * sum(LENGTHS)
    assert alone.tokens == 3 * sum(LENGTHS)
    np.testing.assert_allclose(found.gram / 2, alone.gram / 3, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.absolute, alone.absolute, rtol=1e-5)


def test_rows_of_a_table_and_pooled_texts_are_weighted():
    params = {"table": draw(0, 7, 4), "w": draw(1, 4, 3)}

    def fn(p, batch):
        h = p["table"][batch.ids] * batch.mask[..., None]
        return jnp.sum(h, axis=1) @ p["w"]

    batch = Texts(jnp.asarray([[1, 2, 3], [4, 0, 0], [5, 0, 0]]), jnp.asarray([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]]))
    plan = sites(params, fn, batch)
    found = calibrate(fn, params, plan, [batch], weight=lambda batch: 0.5 * batch.mask, progress=False)
    assert found["table"].counts.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert found["table"].tokens == 2
    h = np.asarray(jnp.sum(params["table"][batch.ids] * batch.mask[..., None], axis=1), np.float64)[:2]
    assert found["w"].tokens == 1
    np.testing.assert_allclose(found["w"].gram[0], 0.5 * h.T @ h, rtol=1e-5, atol=1e-6)


def test_sites_that_read_different_tokens_are_weighted_apart():
    params = {"read": draw(0, 6, 4), "write": draw(1, 6, 4)}
    x, y, own = draw(2, 3, 5, 6), draw(3, 3, 2, 6), jnp.asarray([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    batch = {"x": jnp.where(MASK[..., None] > 0, x, jnp.nan), "mask": MASK, "y": y, "own": own}
    fn = lambda p, batch: (batch["x"] @ p["read"], batch["y"] @ p["write"])  # noqa: E731
    plan = sites(params, fn, batch)
    weight = {"r*": "mask", "{write,elsewhere}": lambda batch: batch["own"]}
    found = calibrate(fn, params, plan, [batch], weight=weight, progress=False)
    assert (found["read"].tokens, found["write"].tokens) == (sum(LENGTHS), 3)
    rows = np.concatenate([x[i, :n] for i, n in enumerate(LENGTHS)]).astype(np.float64)
    np.testing.assert_allclose(found["read"].gram[0], rows.T @ rows, rtol=1e-5, atol=1e-5)


class Texts(NamedTuple):
    ids: jax.Array
    mask: jax.Array


def test_a_mask_that_is_not_used_is_said_once():
    params, batch = {"w": draw(0, 6, 4)}, {"x": draw(1, 3, 5, 6), "mask": MASK}
    fn = lambda p, batch: batch["x"] @ p["w"]  # noqa: E731
    plan = sites(params, fn, batch)
    says = r"a 'mask' with zeros, and padding counts .* weight='mask'\), or counts= of the problem, leaves"
    with pytest.warns(UserWarning, match=says) as said:
        assert calibrate(fn, params, plan, [batch, batch], progress=False)["w"].tokens == 30
    assert len(said) == 1


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            lambda batch: batch["mask"].T,
            r"inputs count is not known: they are \(3, 5, 6\), the weights \(5, 3",
        ),
        (lambda batch: 0 * batch["mask"], "calibration never reached 'w': .* or none of weight above 0"),
        (lambda batch: 3, r"weight\(batch\) is 3; it must be an array of real numbers"),
        (lambda batch: -batch["mask"], "must be finite numbers of at least 0"),
        ("masc", "weight is 'masc', and a batch, .* has no such key or attribute"),
        (7, "weight is 7; it must be a function"),
        ({"w": 7}, "the weight of 'w' is 7; it must be a function"),
        ({3: "mask"}, "the weights have the group 3; it must be a pattern"),
        ({"v": "mask"}, "the site 'w' is in no group; it must be in one"),
        ({"w": "mask", "*": "mask"}, r"the site 'w' is in 2 groups, first 'w' and '\*'"),
    ],
)
def test_weights_that_cannot_be_used_say_so(weight, message):
    params, batch = {"w": draw(0, 6, 4)}, {"x": draw(1, 3, 5, 6), "mask": MASK}
    fn = lambda p, batch: batch["x"] @ p["w"]  # noqa: E731
    with pytest.raises(CompressError, match=message):
        calibrate(fn, params, sites(params, fn, batch), [batch], weight=weight, progress=False)


def test_a_loop_over_tokens_is_refused_for_weights_of_tokens():
    params, batch = {"w": draw(0, 6, 6)}, {"x": draw(1, 3, 5, 6), "mask": MASK}

    def fn(p, batch):
        step = lambda h, x: (jnp.tanh(x + h @ p["w"]), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros((3, 6)), batch["x"].transpose(1, 0, 2))[0]

    with pytest.raises(CompressError, match="never reached 'w': which of its inputs count is not known"):
        calibrate(fn, params, sites(params, fn, batch), [batch], weight="mask", progress=False)


def test_the_mean_gradient_is_in_the_shape_of_the_parameter():
    params, xs = {"w": draw(0, 2, 3, 4)}, [draw(1, 5, 2, 3), draw(2, 5, 2, 3)]
    fn, loss = lambda p, x: jnp.einsum("thd,hdo->to", x, p["w"]), lambda y, x: jnp.mean(jnp.sin(y))
    plan = sites(params, fn, xs[0])
    only = calibrate(fn, params, plan, xs, loss=loss, collect="gradient", progress=False)["w"]
    grads = [np.asarray(jax.grad(lambda p, x=x: loss(fn(p, x), x))(params)["w"], np.float64) for x in xs]
    np.testing.assert_allclose(only.gradient, np.mean(grads, axis=0), rtol=1e-5, atol=1e-8)
    assert only.gram is None
    assert only.fisher is None
    both = calibrate(fn, params, plan, xs, loss=loss, collect=["gradient", "fisher"], progress=False)["w"]
    squares = np.mean([g.reshape(6, 4) ** 2 for g in grads], axis=0).mean(axis=1)
    np.testing.assert_allclose(both.fisher[0], squares, rtol=1e-5)


def test_without_a_gradient_asked_for_none_is_kept():
    params, x = {"w": draw(0, 6, 4)}, draw(1, 5, 6)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    stats = calibrate(fn, params, sites(params, fn, x), [x], loss=lambda y, _: jnp.mean(y**2), progress=False)
    assert stats["w"].gradient is None
    assert stats["w"].fisher.shape == (1, 6)


@pytest.mark.parametrize(
    ("collect", "message"),
    [
        ("grams", "collect is 'grams'; it must list some of inputs, fisher, gradient"),
        ([], r"collect is \[\]"),
        (3, "collect is 3"),
        (["inputs", "gradient"], r"collect=\('inputs', 'gradient'\) needs a loss to differentiate"),
    ],
)
def test_what_to_collect_is_checked(collect, message):
    params, x = {"w": draw(0, 6, 4)}, draw(1, 5, 6)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    with pytest.raises(CompressError, match=message):
        calibrate(fn, params, sites(params, fn, x), [x], collect=collect, progress=False)


def test_one_function_under_both_names():
    assert lk.calibrate is lk.compress.calibrate
    assert lk.compress.Moments is lk.Hints
