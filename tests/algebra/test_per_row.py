"""One batch, an adapter for each row: every row is what its adapter gives it alone, and swapping compiles nothing."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit import algebra
from tests.algebra.tasks import adapter, fn, inputs, params, settings
from tests.cases import CASES
from tests.draws import draw, moved
from tests.traces import Traced

BASE = params()
X = inputs(rows=6)
WHICH = [2, 0, 3, 3, 1, 4]


def mixed():
    """Ranks 1 to 5, all methods, the base alone, other sites, and a bias trained in full."""
    others = [adapter(10 + i, s) for i, s in enumerate(settings().values())]
    ranks = [adapter(1, lk.LoRA(rank=1)), adapter(2, lk.LoRA(rank=5, alpha=2), full=True), None]
    return [*ranks, adapter(3, lk.LoRA(rank=3), sites=("heads",)), *others]


def alone(adapters, which, x=X, base=BASE, apply=fn):
    """Each row by itself, through `lk.adapt`."""
    out = []
    for i, row in zip(which, x, strict=True):
        one = adapters[i]
        solo = apply(base, row[None]) if one is None else lk.adapt(apply, one.plan)(base, one.factors, row[None])
        out.append(solo[0])
    return jnp.stack(out)


ADAPTERS = mixed()
STACKED = algebra.stack(ADAPTERS, base=BASE)
TRACED = Traced(lambda base, factors, x, which: algebra.per_row(fn, STACKED)(base, factors, x, which=which))
PROGRAM = jax.jit(TRACED)  # compiled once for all tests


def test_each_row_equals_its_solo_result():
    every = list(range(len(ADAPTERS)))
    for which in (WHICH, every[:6], every[-6:], [0] * 6):
        found = PROGRAM(BASE, STACKED.factors, X, jnp.array(which))
        np.testing.assert_allclose(found, alone(ADAPTERS, which), atol=1e-5)


def test_swap_compiles_nothing_and_changes_no_other():
    PROGRAM(BASE, STACKED.factors, X, jnp.array(WHICH))
    traces = TRACED.traces
    new = adapter(50, lk.LoRA(rank=4), full=True)
    swapped = algebra.swap(STACKED, 3, new, base=BASE)
    found = PROGRAM(BASE, swapped.factors, X, jnp.array(WHICH))
    wanted = [*ADAPTERS[:3], new, *ADAPTERS[4:]]
    np.testing.assert_allclose(found, alone(wanted, WHICH), atol=1e-5)
    back = algebra.swap(algebra.swap(swapped, 3, None, base=BASE), 3, ADAPTERS[3], base=BASE)
    for one, other in zip(jax.tree.leaves(back.factors), jax.tree.leaves(STACKED.factors), strict=True):
        np.testing.assert_array_equal(one, other)
    assert TRACED.traces == traces


def test_the_base_product_is_one_for_the_whole_batch():
    """By FLOPs: one product of all rows with each parameter, and thin ones."""
    lora = algebra.stack([adapter(1, sites=("flat",)), adapter(2, lk.LoRA(rank=1), sites=("flat",))], base=BASE)
    batched = algebra.per_row(lambda p, x: x @ p["flat"], lora)
    closed = jax.make_jaxpr(lambda f, x: batched(BASE, f, x, which=[0, 1, 1, 0, 1, 0]))(lora.factors, X)
    eqns = list(equations(closed.jaxpr))
    dots = [tuple(v.aval.shape for v in e.invars) for e in eqns if e.primitive.name == "dot_general"]
    assert sorted(dots) == [((6, 3, 2), (6, 2, 5)), ((6, 3, 6), (6, 2, 6)), ((6, 3, 6), (6, 5))]
    # Rows are copied for the product that reads them; a parameter per row, 6x6x5, there never is.
    assert max(v.aval.size for e in eqns for v in e.outvars) < 6 * 6 * 5


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_an_index_out_of_range_inside_jit_is_nan_and_no_other_row_is():
    found = PROGRAM(BASE, STACKED.factors, X, jnp.array([0, len(ADAPTERS), 1, -1, 2, 3]))
    bad = np.isnan(np.asarray(found)).all(axis=(1, 2))
    assert bad.tolist() == [False, True, False, True, False, False]
    assert not np.isnan(np.asarray(found)[[0, 2, 4, 5]]).any()


def test_an_index_out_of_range_is_nan_where_adapters_have_gains_alone():
    params, x = {"w": draw(0, 4, 3), "bias": draw(1, 3)}, draw(2, 4, 4)

    def fn(p, x):
        return x @ p["w"] + p["bias"][None]

    plan = lk.resolve(lk.Spec({"w": lk.IA3(), "bias": lk.Full()}), params, fn, x)
    two = [algebra.Adaptation(plan, moved(lk.split(params, plan, jax.random.key(i))[1])) for i in range(2)]
    stacked = algebra.stack(two, base=params)
    run = jax.jit(lambda which: algebra.per_row(fn, stacked)(params, stacked.factors, x, which=which))
    assert np.isnan(run(jnp.array([0, -1, -2, 2]))).tolist() == [[False] * 3, *([[True] * 3] * 3)]


def zero(one):
    """The same adapter with a delta of zero: the base as it is, restored where it is quantised."""
    return one._replace(factors={path: x._replace(a=0 * x.a) for path, x in one.factors.items()})


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        *((name, ()) for name in ("tied", "equinox", "custom_rules", "convolution", "materialised")),
        ("mlp", ("up/kernel",)),
    ],
)
def test_every_use_of_a_parameter_serves_rows(name, quantised):
    """Embeddings and a tied head, scanned and rematerialised layers, convolutions, what is materialised, int8."""
    case = CASES[name]()
    base = lk.quantize(case.params, quantised, "int8", block=4) if quantised else case.params
    adapters = []
    for rank in (1, 2):
        plan = lk.resolve(lk.Spec(dict.fromkeys(case.targets, lk.LoRA(rank=rank))), base, case.fn, *case.inputs)
        adapters.append(algebra.Adaptation(plan, moved(lk.split(base, plan, jax.random.key(rank))[1])))
    stacked = algebra.stack([*adapters, None], base=base)
    (x,) = case.inputs
    which = [i % 3 for i in range(len(x))]
    found = jax.jit(lambda f, x: algebra.per_row(case.fn, stacked)(base, f, x, which=which))(stacked.factors, x)
    wanted = alone([*adapters, zero(adapters[0])], which, x, base, case.fn)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_joined_added_branched_and_looked_up_parameters_serve_rows():
    def busy(p, x):
        both = x @ jnp.concatenate([p["q"], 2 * p["k"].T], axis=1)
        y = both @ (p["o"] + p["o2"]) / 3
        y = jax.lax.cond(jnp.sum(x) > 0, lambda w, y: y @ w, lambda w, y: y - y @ w, p["q"][:, :4], y)
        expert = p["e"][jnp.argmax(y, axis=-1) % 2]
        return jnp.einsum("nti,ntio->nto", y, expert) + (-p["t"])[jnp.argmin(y, axis=-1)]

    shapes = {"e": (2, 4, 4), "k": (4, 4), "o": (8, 4), "o2": (8, 4), "q": (4, 4), "t": (4, 4)}
    base = {name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x = draw(9, 4, 3, 4)
    plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1, alpha=2)}), base, busy, x)
    factors = lk.split(base, plan, jax.random.key(0))[1]
    adapters = [algebra.Adaptation(plan, jax.tree.map(lambda x, i=i: x + i * 0.1 + 0.1, factors)) for i in range(3)]
    stacked = algebra.stack(adapters, base=base)
    found = jax.jit(algebra.per_row(busy, stacked))(base, stacked.factors, x, which=jnp.array([2, 0, 0, 1]))
    np.testing.assert_allclose(found, alone(adapters, [2, 0, 0, 1], x, base, busy), rtol=2e-5, atol=2e-5)


def test_bf16_bases_stay_bf16():
    base = params(dtype=jnp.bfloat16)
    adapters = [adapter(i, lk.LoRA(rank=i), dtype=jnp.bfloat16, sites=("flat", "layers")) for i in (1, 3)]
    stacked = algebra.stack(adapters, base=base)
    x, which = inputs(4, dtype=jnp.bfloat16), [0, 1, 1, 0]
    found = algebra.per_row(fn, stacked)(base, stacked.factors, x, which=which)
    assert found.dtype == jnp.bfloat16
    wanted = alone(adapters, which, x, base).astype(jnp.float32)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.1)


def test_gradients_reach_each_rows_own_adapter():
    which = [1, 1, 1, 1, 0, 0]
    adapters = [adapter(1, sites=("flat",)), adapter(2, sites=("flat",)), adapter(3, sites=("flat",))]
    stacked = algebra.stack(adapters, base=BASE)
    batched = algebra.per_row(lambda p, x: jnp.tanh(x @ p["flat"]), stacked)
    grads = jax.grad(lambda f: jnp.sum(batched(BASE, f, X, which=which)))(stacked.factors)["flat"]
    one = adapters[1]
    solo = lk.adapt(lambda p, x: jnp.tanh(x @ p["flat"]), one.plan)
    wanted = jax.grad(lambda f: jnp.sum(solo(BASE, f, X[:4])))(one.factors)["flat"]
    np.testing.assert_allclose(grads.a[1], wanted.a, atol=1e-5)
    np.testing.assert_allclose(grads.b[1] * one.plan.site("flat").scale, wanted.b, atol=1e-5)
    assert not np.any(grads.a[2])


def test_inputs_may_be_several_and_keywords_are_shared():
    def two(p, x, mask, *, bias, sign=1):
        y = (x @ p["flat"]) * mask[..., None] + bias.reshape(1, 1, -1)
        return {"y": sign * y, "sum": jnp.sum(y)}

    stacked = algebra.stack([adapter(1, sites=("flat",)), None], base=BASE)
    mask = draw(3, 6, 3)
    found = algebra.per_row(two, stacked)(BASE, stacked.factors, X, mask, which=[1] * 6, bias=BASE["bias"], sign=-1)
    wanted = two(BASE, X, mask, bias=BASE["bias"], sign=-1)
    np.testing.assert_allclose(found["y"], wanted["y"], atol=1e-5)
    np.testing.assert_allclose(jnp.sum(found["sum"]), wanted["sum"], rtol=1e-4)
    assert found["sum"].shape == (6,)


def test_rows_are_kept_free_for_a_higher_rank():
    stacked = algebra.stack([adapter(1, lk.LoRA(rank=1))], base=BASE, rank=6)
    assert stacked.factors["flat"].a.shape == (1, 5, 6)  # min(in, out)
    assert stacked.factors["layers"].a.shape == (1, 6, 3, 6)
    swapped = algebra.swap(stacked, 0, adapter(2, lk.LoRA(rank=5)), base=BASE)
    found = algebra.per_row(fn, swapped)(BASE, swapped.factors, X[:1], which=[0])
    np.testing.assert_allclose(found, alone([adapter(2, lk.LoRA(rank=5))], [0], X[:1]), atol=1e-5)


BATCHED = algebra.per_row(fn, STACKED)
LORAS = algebra.stack([adapter(1, lk.LoRA(rank=1)), adapter(2, lk.LoRA(rank=2))], base=BASE)


def call(which, base=BASE, factors=STACKED.factors, x=X, batched=BATCHED):
    return lambda: batched(base, factors, x, which=which)


def swap(one, index=0):
    return lambda: algebra.swap(LORAS, index, one, base=BASE)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (call([0, 1]), "which names adapters for 2 rows, an input has shape (6, 3, 6)"),
        (call([0, 1, 2, 99, 0, 0]), "which holds 99; the stack has adapters 0 to"),
        (call([0, 1, 2, -1, 0, 0]), "which holds -1; the stack has adapters 0 to"),
        (call([0.0] * 6), "which has shape (6,) and dtype float64; it must be integers"),
        (call(1), "which has shape () and dtype int64"),
        (call([0] * 6, factors=ADAPTERS[0].factors), "the factors hold nothing stacked at"),
        (lambda: BATCHED(BASE, X, which=[0] * 6), "the factors hold nothing stacked at"),
        (call([0] * 6, base={"rest": X}), "which these params do not have"),
        (
            call([0] * 6, batched=algebra.per_row(lambda p, x: x @ p["flat"], STACKED)),
            "the function does not use 'heads' for these inputs",
        ),
        (lambda: algebra.per_row(fn, ADAPTERS), "a list is no stack of adapters"),
        (lambda: algebra.stack([], base=BASE), "there are no adapters"),
        (lambda: algebra.stack([None], base=BASE), "there are no adapters"),
        (lambda: algebra.stack(ADAPTERS[0], base=BASE), "one adapter was given where several are stacked"),
        (lambda: algebra.stack([ADAPTERS[0]], base=BASE, rank=0), "rank is 0; it must be an integer"),
        (lambda: algebra.stack([ADAPTERS[0]], base={}), "which these params do not have"),
        (swap(None, 2), "index is 2; the stack holds adapters 0 to 1"),
        (swap("x"), "a str is no adapter"),
        (
            swap(adapter(1, lk.LoRA(rank=3))),
            "the adapter has 3 rows at 'flat', the stack has place for 2.\n  stack them anew with rank=3",
        ),
        (swap(adapter(1, lk.DoRA(rank=1))), "the adapter has gains at 'flat', and none of the stack did"),
        (swap(adapter(1, full=True)), "the adapter adapts 'bias', and none of the stack did"),
    ],
)
def test_bad_input_says(call, says):
    with pytest.raises(lk.LoraxError) as e:
        call()
    assert says in str(e.value)


def test_rows_gathered_once_equal_rows_named_by_which():
    rows = algebra.rows_of(STACKED, WHICH)
    found = jax.jit(lambda factors, x: algebra.per_row(fn, STACKED)(BASE, factors, x))(rows, X)
    np.testing.assert_allclose(found, alone(ADAPTERS, WHICH), atol=1e-5)
    with pytest.raises(lk.AdapterError, match="which names adapters for 7 rows, an input has shape"):
        algebra.per_row(fn, STACKED)(BASE, algebra.rows_of(STACKED, [*WHICH, 0]), X)
    with pytest.raises(lk.AdapterError, match="which holds 99; the stack has adapters 0 to"):
        algebra.rows_of(STACKED, [99])
