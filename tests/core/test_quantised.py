"""Quantised bases: bytes, rounding, and the same numbers as the restored parameters wherever they are used."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.core.paths import flatten, is_array
from lorax_kit.core.quantised import NF4, Quantised, decode_scales, encode_scales
from tests.draws import draw, moved
from tests.transform.uses import CASES

X = draw(1, 40, 256)
W = draw(0, 256, 384) / 16


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("method", "double", "ratio"),
    [("int8", False, 0.27), ("int8", True, 0.26), ("int4", True, 0.13), ("nf4", False, 0.15), ("nf4", True, 0.13)],
)
def test_bytes_of_the_base(method, double, ratio):
    base = lk.quantize({"w": W}, ["w"], method, double=double)
    assert nbytes(base) <= ratio * nbytes({"w": W})
    assert base["w"].nbytes == nbytes(base)
    assert (base["w"].shape, base["w"].dtype, base["w"].ndim) == (W.shape, W.dtype, 2)


SPREADS = {
    "gaussian": (W, 1.01),
    "one entry of 2,000 sigma": (W.at[1, 0].set(125), 1.04),
    "a padding row and one outlier": (W.at[0].set(0).at[1, 0].set(4), 1.03),
    "rows of scale 1e-3 to 1": (W * jnp.geomspace(1e-3, 1, 256)[:, None], 1.05),
    "rows of scale 1e-20 to 1e10: scales in fp32": (W * jnp.geomspace(1e-20, 1e10, 256)[:, None], 1.0),
    "an entry of 5e37: scales in fp32": (W.at[2, 5].set(5e37), 1.0),
    "all zero": (0 * W, 1.0),
    "one size": (jnp.full((256, 384), -0.3), 1.0),
    "a matrix of its own range in a stack": (jnp.stack([W, 1e6 * W]), 1.01),
}


@pytest.mark.parametrize("method", ["int8", "int4", "nf4"])
def test_codes_are_those_of_its_operations_one_by_one(method):
    """Programs that XLA fuses round otherwise: a base quantised again would have another fingerprint."""
    w = {"w": W * jnp.geomspace(1e-3, 1, 256)[:, None]}
    compiled = lk.quantize(w, ["w"], method)
    with jax.disable_jit():
        alone = lk.quantize(w, ["w"], method)
    chex.assert_trees_all_equal(compiled, alone)


@pytest.mark.parametrize("case", SPREADS)
@pytest.mark.parametrize("double", [False, True])
def test_rounding_is_within_half_a_code_of_its_own_block(case, double):
    w, wider = SPREADS[case]
    blocks = np.asarray(w, np.float64).reshape(-1, 64)
    largest = np.abs(blocks).max(-1, keepdims=True)
    widest = {"int8": 1 / 127, "int4": 1 / 7, "nf4": np.diff(NF4).max()}
    for method, step in widest.items():
        small = lk.quantize({"w": w}, ["w"], method, double=double)["w"]
        got = np.asarray(small.restore(), np.float64).reshape(blocks.shape)
        assert (np.abs(got - blocks) <= largest * (0.5 * step * (wider if double else 1) + 1e-6)).all(), method
        assert (small.log_step is None) == (not double or "in fp32" in case)


def test_scales_are_restored_from_above_within_one_step_of_their_code():
    scales = jnp.asarray(np.random.default_rng(0).lognormal(sigma=2, size=(40, 6)), jnp.float32).at[3].set(0)
    codes, least, step = encode_scales(scales)
    ratio = np.asarray(decode_scales(codes, least, step) / jnp.where(scales > 0, scales, 1))
    assert (ratio[3] == 0).all()
    ratio = np.delete(ratio, 3, 0)
    assert ratio.min() > 1 - 1e-5 * 254 / 200
    assert ratio.max() < float(jnp.exp(step[0, 0])) + 1e-5
    np.testing.assert_allclose(step, np.log(float(scales.max()) / float(scales[scales > 0].min())) / 254, rtol=1e-5)


def test_rows_of_a_table_are_those_of_the_whole():
    table = lk.quantize({"w": W.at[0, 0].set(9)}, ["w"], "int4")["w"]
    at = jnp.asarray([[3, 0], [255, 300]])
    np.testing.assert_array_equal(table.rows(at), table.restore()[jnp.minimum(at, 255)])


def test_nf4_codes_are_the_nearest_of_the_papers_table():
    rng = np.random.default_rng(0)
    w = rng.uniform(-1, 1, (4, 64)).astype(np.float32)
    w[:, 0] = 1.0  # so that a block's scale is 1
    nearest = NF4[np.abs(w[..., None] - NF4).argmin(-1)]
    np.testing.assert_allclose(lk.quantize({"w": w}, ["w"], double=False)["w"].restore(), nearest, atol=1e-7)


def test_double_quantisation_costs_little_and_zero_stays_zero():
    once, twice = (lk.quantize({"w": W}, ["w"], double=d)["w"].restore() for d in (False, True))
    error = [float(jnp.sqrt(jnp.mean((x - W) ** 2))) for x in (once, twice)]
    assert error[1] < 1.02 * error[0]
    zero = lk.quantize({"w": jnp.zeros((4, 64)).at[0, 0].set(1.0)}, ["w"])["w"].restore()
    assert float(jnp.abs(zero[1:]).max()) == 0.0


@pytest.mark.parametrize("shape", [(3, 5), (7, 1), (2, 3, 65), (2, 3, 4, 10)])
def test_any_shape_is_restored(shape):
    w = draw(2, *shape)
    got = lk.quantize({"w": w}, ["w"], "int8", double=False)["w"].restore()
    assert got.shape == shape
    np.testing.assert_allclose(got, w, atol=float(jnp.abs(w).max()) / 127)


USES = {case.primitive: name for name, case in CASES.items() if case.primitive not in ("while", "convert_element_type")}


@pytest.mark.parametrize(
    "name", [*USES.values(), "heads in and out", "experts by index", "embedding, tied", "scanned layers"]
)
def test_every_use_equals_the_restored_parameters(name):
    case = CASES[name]
    rank = 1 if "axis of size 1" in name else 2
    spec = lk.Spec(dict.fromkeys(case.params, lk.LoRA(rank=rank, inputs=case.axes)))
    plan = lk.resolve(spec, case.params, case.fn, *case.inputs)
    base, factors = lk.split(case.params, plan, jax.random.key(1))
    factors = moved(factors)
    small = lk.quantize(base, list(case.params), "int8")
    restored = {p: x.restore() for p, x in small.items()}
    adapted = lk.adapt(case.fn, plan, kernel="factored")

    def loss(base):
        def of(factors):
            out = adapted(base, factors, *case.inputs)
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out))

        return jax.jit(jax.value_and_grad(of))(factors)

    for x, y in zip(jax.tree.leaves(loss(small)), jax.tree.leaves(loss(restored)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(float(jnp.abs(y).max()), 1.0))


def test_what_no_site_adapts_may_be_quantised_too():
    params = {"table": W, "w": W, "other": W.T}
    fn = lambda p, ids: jnp.tanh(p["table"][ids] @ p["other"]) @ p["w"]  # noqa: E731
    ids = jnp.asarray([0, 3, 255])
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params, fn, ids)
    base, factors = lk.split(params, plan, jax.random.key(0))
    small = lk.quantize(base, ["**"], "int8")
    restored = {p: x.restore() for p, x in small.items()}
    adapted = lk.adapt(fn, plan)
    np.testing.assert_allclose(adapted(small, factors, ids), adapted(restored, factors, ids), atol=1e-5)
    assert [r.path for r in lk.explain(adapted, small, factors, ids).rows] == ["w"]


def test_no_restored_matrix_lives_from_the_forward_to_the_backward_pass():
    """Ten layers of a wide base: the temporaries hold one restored matrix at a time, not ten."""
    n = 10
    params = {f"w{i}": draw(i, 256, 256) / 16 for i in range(n)}

    def fn(p, x):
        for i in range(n):
            x = jnp.tanh(x @ p[f"w{i}"])
        return x

    x = X[:8]
    plan = lk.resolve(lk.Spec({"w*": lk.LoRA(rank=2)}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    grad = jax.jit(jax.grad(lambda f, b: jnp.sum(lk.adapt(fn, plan, kernel="factored")(b, f, x)), argnums=0))
    small = lk.quantize(base, ["w*"])
    temporaries = grad.lower(factors, small).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 5 * nbytes(params["w0"])


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_outside_jit_a_site_restores_its_matrix_once_beside_its_product(variant, monkeypatch):
    """DoRA's norms read the matrix, too: the same one."""
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, variant=variant)}), {"w": W}, fn, X)
    base, factors = lk.split({"w": W}, plan, jax.random.key(0))
    base = lk.quantize(base, ["w"])
    restored, restore = [], Quantised.restore
    monkeypatch.setattr(Quantised, "restore", lambda self: restored.append(self) or restore(self))
    lk.adapt(fn, plan)(base, factors, X)
    assert len(restored) == 2


def test_training_over_four_bits_comes_close_to_the_fp32_base(standard_promotion):
    rng = np.random.default_rng(0)
    params = {"u": W, "v": jnp.asarray(rng.normal(size=(384, 10)) / 20, jnp.float32)}
    fn = lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"]  # noqa: E731
    label = jnp.asarray(rng.integers(0, 10, 40))

    def final(base, plan, factors):
        adapted = lk.adapt(fn, plan)

        def loss(base, f, x):
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(adapted(base, f, x), label))

        init, step = lk.make_step(loss, lk.partition(optax.adam(1e-3), plan))
        state = init(factors)
        for _ in range(100):
            state, info = step(state, base, X)
        return float(info.loss)

    plan = lk.resolve(lk.Spec({"{u,v}": lk.LoRA(rank=4)}), params, fn, X)
    base, factors = lk.split(params, plan, jax.random.key(0))
    whole = final(base, plan, factors)
    for method in ("int8", "nf4"):
        assert abs(final(lk.quantize(base, ["u", "v"], method), plan, factors) - whole) < 0.02 * whole + 0.02


def test_merge_restores_and_fingerprints_differ():
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), {"w": W})
    base, factors = lk.split({"w": W}, plan, jax.random.key(0))
    small = lk.quantize(base, ["w"])
    np.testing.assert_array_equal(lk.merge(small, factors, plan)["w"], small["w"].restore())
    assert isinstance(flatten(small)[0]["w"], Quantised)
    assert is_array(small["w"])
    prints = {lk.fingerprint(b) for b in (base, small, lk.quantize(base, ["w"], "int8"))}
    assert len(prints) == 3


BAD = [
    ({"patterns": ["nothing"]}, "'nothing' matches no parameter to quantise"),
    ({"patterns": ["bias"]}, "'bias' is float32 of shape (4,)"),
    ({"patterns": ["ids"]}, "'ids' is int32 of shape (2, 2)"),
    ({"patterns": ["w"], "method": "int3"}, "method 'int3' is unknown"),
    ({"patterns": ["w"], "block": 3}, "block is 3"),
    ({"patterns": ["small"]}, "'small' is nf4"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_says(arguments, says):
    base = {"w": W, "bias": jnp.ones(4), "ids": jnp.ones((2, 2), jnp.int32), **lk.quantize({"small": W}, ["small"])}
    with pytest.raises(lk.PlanError) as e:
        lk.quantize(base, **arguments)
    assert says in str(e.value)


def test_what_is_trained_in_full_must_not_be_quantised():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.Full()}), {"w": W}, fn, X)
    base, factors = lk.split({"w": W}, plan, jax.random.key(0))
    with pytest.raises(lk.PlanError, match="leave it out of lk"):
        lk.adapt(fn, plan)(lk.quantize(base, ["w"]), factors, X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ (p["w"] * p["gain"]),
        lambda p, x: x @ (p["w"] * jnp.tanh(jnp.mean(x, axis=0))[None]),
        lambda p, x: x @ (p["w"] / jnp.sqrt(jnp.sum(p["gain"] ** 2))),
        lambda p, x: x @ (p["w"] * jnp.tanh(p["gain"]).T),
    ],
    ids=["gain", "by the input", "by a norm", "inputs"],
)
@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_what_scales_a_quantised_parameter_has_its_gradient(fn, kernel):
    params = {"w": draw(0, 6, 6), "gain": jnp.linspace(0.5, 2, 6)[None]}
    x = draw(1, 5, 6)
    rules = {"w": lk.LoRA(rank=2)} | ({"gain": lk.Full()} if "gain" in str(fn.__code__.co_consts) else {})
    plan = lk.resolve(lk.Spec(rules), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(2))
    factors = jax.tree.map(lambda f: f + 0.1, factors)
    quantised = lk.quantize(base, ["w"], "int8")
    restored = {**base, "w": quantised["w"].restore()}
    adapted = lk.adapt(fn, plan, kernel=kernel)
    ours, theirs = (
        jax.grad(lambda f, x, b=b: jnp.sum(adapted(b, f, x) ** 2), argnums=(0, 1))(factors, x)
        for b in (quantised, restored)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted_too", [True, False])
def test_outside_jit_one_restored_matrix_is_held_at_a_time(adapted_too):
    """Of 12 quantised layers, adapted or not, every other transposed, no more than two are whole at once."""
    n, k = 12, 64
    params = {f"l{i}": draw(i, k, k) / 8 for i in range(n)} | {"first": draw(20, k, k) / 8}
    held = []

    def fn(p, x):
        x = x @ p["first"]
        for i in range(n):
            x = jnp.tanh(x @ (p[f"l{i}"].T if i % 2 else p[f"l{i}"]))
        jax.debug.callback(lambda _: held.append(sum(a.nbytes for a in jax.live_arrays())), x[0, 0])
        return x

    small, x = lk.quantize(params, ["l*"]), draw(30, 2, k)
    plan = lk.resolve(lk.Spec({"*" if adapted_too else "first": lk.LoRA(rank=1)}), small, fn, x)
    base, factors = lk.split(small, plan, jax.random.key(0))
    del params
    before = sum(a.nbytes for a in jax.live_arrays())
    lk.adapt(fn, plan)(base, factors, x)
    jax.effects_barrier()
    assert held[-1] - before < 3 * 4 * k * k


@pytest.mark.parametrize("value", [1e300, 1e-60])
def test_values_that_only_float64_holds_are_refused(value):
    with jax.enable_x64(True):
        wide = {"w": jnp.full((4, 4), value, jnp.float64)}
        with pytest.raises(lk.PlanError, match="'w' holds values of float64 that float32 does not"):
            lk.quantize(wide, ["w"])
        ones = lk.quantize({"w": jnp.ones((4, 4), jnp.float64).at[0, 0].set(value)}, ["w"]) if value < 1 else None
    assert ones is None or float(ones["w"].restore()[1, 1]) == 1.0


def test_a_deleted_buffer_is_named():
    params = {"w": draw(0, 4, 4)}
    params["w"].delete()
    with pytest.raises(lk.PlanError, match="buffer of 'w' was deleted"):
        lk.quantize(params, ["w"])
