"""Every model, every variant: the promises that DESIGN makes of split, merge and adapt."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from tests.cases import CASES
from tests.draws import draw, moved


def prepare(name, variant="lora", kernel="auto"):
    case = CASES[name]()
    spec = lk.Spec(dict.fromkeys(case.targets, lk.LoRA(rank=2, alpha=3, variant=variant)))
    plan = lk.resolve(spec, case.params, case.fn, *case.inputs)
    base, factors = lk.split(case.params, plan, jax.random.key(1))
    return case, plan, base, factors, lk.adapt(case.fn, plan, kernel=kernel)


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_merge_undoes_split_bit_for_bit(name, variant):
    case, plan, base, factors, _ = prepare(name, variant)
    for x, y in zip(arrays(lk.merge(base, factors, plan)), arrays(case.params), strict=True):
        assert x.tobytes() == y.tobytes()


def test_merge_keeps_negative_zeros():
    params = {"w": jnp.full((3, 4), -0.0)}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params)
    merged = lk.merge(*lk.split(params, plan, jax.random.key(0)), plan)
    assert np.signbit(np.asarray(merged["w"])).all()


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_adapted_equals_the_function_at_init_and_the_merged_after(name, variant):
    case, plan, base, factors, adapted = prepare(name, variant)
    ours, theirs = adapted(base, factors, *case.inputs), case.fn(case.params, *case.inputs)
    # Equinox has the weight on the left, `w @ x`; it is computed as x @ w.T, whose sums some CPUs order otherwise.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 if name == "equinox" else 0)
    factors = moved(factors)
    merged = case.fn(lk.merge(base, factors, plan), *case.inputs)
    # fp32 sums in another order; values are of order 1 to 100.
    np.testing.assert_allclose(adapted(base, factors, *case.inputs), merged, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", ["factored", "merged", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autodiff_through_the_materialised_weights(name, kernel):
    case, plan, base, factors, adapted = prepare(name, kernel=kernel)
    factors = moved(factors)

    def loss(out):
        return jnp.sum(jnp.sin(out))

    ours = jax.jit(jax.grad(lambda f: loss(adapted(base, f, *case.inputs))))(factors)
    theirs = jax.jit(jax.grad(lambda f: loss(case.fn(lk.merge(base, f, plan), *case.inputs))))(factors)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(theirs))
    chex.assert_trees_all_close(ours, theirs, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["factored", "merged"])
def test_gradient_of_the_base_is_true_too(kernel):
    case, plan, base, factors, adapted = prepare("mlp", kernel=kernel)
    factors = moved(factors)
    ours = jax.grad(lambda b: jnp.sum(adapted(b, factors, *case.inputs) ** 2))(base)
    theirs = jax.jit(jax.grad(lambda b: jnp.sum(case.fn(lk.merge(b, factors, plan), *case.inputs) ** 2)))(base)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_dora_gradients_detach_the_norm():
    """Against the paper's equation in float64 numpy at one site: d/dB of m * V / |V| with |V| held fixed."""
    x, w = np.random.default_rng(0).normal(size=(5, 4)), np.random.default_rng(1).normal(size=(4, 3))
    params = {"w": jnp.asarray(w, jnp.float32)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.DoRA(rank=2, alpha=2)}), params, fn, jnp.asarray(x, jnp.float32))
    base, factors = lk.split(params, plan, jax.random.key(0))
    factors = moved(factors)
    got = jax.grad(lambda f: jnp.sum(lk.adapt(fn, plan)(base, f, jnp.asarray(x, jnp.float32))))(factors)["w"]
    a, b, m = (np.asarray(v, np.float64) for v in factors["w"][:3])
    v = w + a.T @ b
    norm = np.linalg.norm(v, axis=0)
    g = np.ones((5, 3)) * (m / norm)
    np.testing.assert_allclose(got.a, (x.T @ g @ b.T).T, rtol=1e-4)
    np.testing.assert_allclose(got.b, a @ x.T @ g, rtol=1e-4)
    np.testing.assert_allclose(got.magnitude, (x @ v).sum(0) / norm, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("materialised", "custom_rules")])
def test_only_the_unsupported_is_materialised(name):
    case, _, base, factors, adapted = prepare(name)
    assert lk.explain(adapted, base, factors, *case.inputs).materialised == ()


def test_explain_reports_what_it_materialises_and_why():
    case, _, base, factors, adapted = prepare("materialised")
    found = lk.explain(adapted, base, factors, *case.inputs)
    assert found.materialised == ("w",)
    assert "tanh" in found.rows[0].reason


def test_a_straight_through_rule_keeps_its_derivative():
    @jax.custom_vjp
    def quantised(w):
        return jnp.round(w)

    quantised.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    fn = lambda p, x: x @ quantised(p["w"])  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    adapted = lk.adapt(fn, plan)
    grads = jax.grad(lambda f: jnp.sum(adapted(base, f, x)))(factors)
    assert float(jnp.abs(grads["w"].b).max()) > 0.1
    assert "custom_vjp" in lk.explain(adapted, base, factors, x).rows[0].reason


def rounded_straight_through(x, w):
    """The gradient passes through the rounding of the inputs."""
    f = jax.custom_vjp(lambda x, w: jnp.round(x * 8) / 8 @ w)
    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    return f(x, w)


def clipped(x, w):
    f = jax.custom_vjp(lambda x, w: x @ w)

    def backward(residuals, g):
        (x, w), g = residuals, jnp.clip(g, -0.1, 0.1)
        return g @ w.T, x.T @ g

    f.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    return f(x, w)


def guarded(x, w):
    """sqrt of a norm, whose derivative at 0 is taken to be 0."""

    @jax.custom_jvp
    def f(x, w):
        return jnp.sqrt(jnp.sum((x @ w) ** 2, axis=-1))

    @f.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        y, n = x @ w, f(x, w)
        return n, jnp.where(n > 0, jnp.sum(y * (dx @ w + x @ dw), axis=-1) / jnp.where(n > 0, n, 1), 0)

    return f(x, w)


def run_twice(x, w):
    """One inner function, which JAX traces once, is given a parameter and then what was made of it."""
    product = jax.jit(lambda a, b: a @ b)
    f = jax.custom_vjp(lambda x, w: jnp.round(product(w, w) * 4) / 4 + product(x[:4] @ w, x[:4] @ w))
    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda r, g: (jnp.zeros_like(r[0]), g @ r[1].T + r[1].T @ g))
    return f(x, w)


@pytest.mark.parametrize("rule", [rounded_straight_through, clipped, guarded, run_twice])
def test_a_function_keeps_its_own_derivative_rule(rule):
    params = {"up": draw(0, 4, 4), "w": draw(1, 4, 4)}
    x = jnp.concatenate([draw(2, 5, 4), jnp.zeros((1, 4))])
    fn = lambda p, x: rule(jnp.tanh(x @ p["up"]), p["w"])  # noqa: E731
    plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=2, inputs=(0,))}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    factors = moved(factors)
    adapted = lk.adapt(fn, plan)
    ours = jax.grad(lambda f: jnp.sum(jnp.sin(adapted(base, f, x))))(factors)
    theirs = jax.grad(lambda f: jnp.sum(jnp.sin(fn(lk.merge(base, f, plan), x))))(factors)
    chex.assert_trees_all_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(ours))
    reasons = [row.reason for row in lk.explain(adapted, base, factors, x).rows if row.path == "w"]
    assert any("keeps its own derivative rule" in reason for reason in reasons)


def test_calls_of_one_function_are_uses_of_their_own():
    """JAX traces an inner function once: its equations are the same at each call."""
    product = jax.jit(lambda a, b: a @ b)
    params, x = {"w": draw(0, 4, 4)}, draw(1, 5, 4)
    fn = lambda p, x: product(jnp.tanh(product(x, p["w"])), p["w"])  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    assert [row.how for row in lk.explain(lk.adapt(fn, plan), base, factors, x).rows] == ["merged"] * 2


def test_training_moves_every_factor_never_the_base_and_compiles_once(standard_promotion):
    case, plan, base, factors, adapted = prepare("tied")
    before = [x.tobytes() for x in arrays(base)]
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def loss(base, factors, ids):
        with jax.numpy_dtype_promotion("strict"):
            return jnp.mean(adapted(base, factors, ids) ** 2)

    init, step = lk.make_step(loss, lk.partition(optax.adamw(1e-2), plan))
    state = init(factors)
    for _ in range(5):
        state, info = step(state, base, *case.inputs)
    assert [x.tobytes() for x in arrays(base)] == before
    for path, leaf in state.factors.items():
        for name, x in leaf._asdict().items():
            if x is not None:
                assert float(jnp.abs(x - getattr(factors[path], name)).max()) > 1e-4, (path, name)
    assert np.isfinite(info.loss)


def test_bf16_base_with_fp32_factors_runs_under_strict_promotion():
    params, x = {"w": jnp.ones((8, 6), jnp.bfloat16)}, jnp.ones((4, 8), jnp.bfloat16)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    for compute in (None, "float32"):
        spec = lk.Spec({"w": lk.LoRA(rank=2)}, compute_dtype=compute)
        plan = lk.resolve(spec, params, fn, x)
        base, factors = lk.split(params, plan, jax.random.key(0))
        out, grads = jax.value_and_grad(lambda f: jnp.sum(lk.adapt(fn, plan)(base, f, x).astype(jnp.float32)))(factors)  # noqa: B023
        assert factors["w"].a.dtype == grads["w"].b.dtype == jnp.float32
        assert float(out) == 192.0


def test_dropout_needs_a_key_and_keeps_the_mean():
    params, x = {"w": jnp.zeros((64, 4))}, jnp.ones((2000, 64))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, dropout=0.5)}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    factors = moved(factors)
    adapted = lk.adapt(fn, plan)
    dry = adapted(base, factors, x)
    wet = adapted(base, factors, x, dropout_key=jax.random.key(5))
    assert float(jnp.abs(wet - dry).max()) > 0.1
    # Standard error of the mean over 2000 rows of sums over 64 inputs of weights of order 0.1.
    np.testing.assert_allclose(wet.mean(0), dry.mean(0), atol=0.1)
