"""What every method promises, as functions that the tests of each method call with its setting."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_kit as lk
from lorax_kit.core.method import frozen_leaves
from lorax_kit.study.engine import Engine
from lorax_kit.study.packing import kinds, pack, start, trial_plan, union_plan, unpack
from tests import tiny
from tests.draws import draw, moved

PARAMS = {
    "table": draw(0, 9, 6),
    "heads": 0.4 * draw(1, 6, 2, 4),
    "layers": 0.4 * draw(2, 3, 8, 8),
    "experts": 0.4 * draw(3, 2, 8, 5),
    "window": 0.3 * draw(4, 2, 5, 4),
}
IDS = jnp.arange(8).reshape(2, 4)


def model(p, ids):
    """A looked-up table, an N-D kernel, scanned layers, experts, a convolution: every kind of site in one function."""
    x = jnp.einsum("btc,chd->bthd", p["table"][ids], p["heads"]).reshape(*ids.shape, 8)
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])
    x = jnp.einsum("etc,ecd->etd", x, p["experts"])
    return jax.lax.conv_general_dilated(x, p["window"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]


def assert_same_bits(ours, theirs):
    for x, y in zip(arrays(ours), arrays(theirs), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


def on_every_kind_of_site(setting):
    """`merge(*split())` is the params bit for bit.

    With leaves moved, `adapt` computes what the merged params do, and its gradients are autodiff's through them.
    """
    plan = lk.resolve(lk.Spec({"*": setting}), PARAMS, model, IDS)
    assert len(plan.sites) == 5
    _, factors = jax.jit(lambda params: lk.split(params, plan, jax.random.key(1)))(PARAMS)
    other = moved(factors)
    adapted = lk.adapt(model, plan)

    def loss(fn):
        return lambda base, f: jnp.sum(jnp.sin(fn(base, f))) / 8

    @jax.jit
    def run(base, factors, other):
        start = lk.merge(base, factors, plan), model(base, IDS), adapted(base, factors, IDS)
        fns = (lambda b, f: adapted(b, f, IDS)), (lambda b, f: model(lk.merge(b, f, plan), IDS))
        return start, *(jax.value_and_grad(loss(fn), argnums=(0, 1))(base, other) for fn in fns)

    (merged, plain, first), ours, theirs = run(PARAMS, factors, other)
    assert_same_bits(merged, PARAMS)
    np.testing.assert_allclose(first, plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for path, leaves in theirs[1][1].items():
        for name, x in leaves._asdict().items():
            atol = 2e-5 * float(jnp.abs(x).max()) + 1e-6
            np.testing.assert_allclose(
                getattr(ours[1][1][path], name), x, rtol=1e-4, atol=atol, err_msg=f"{path}:{name}"
            )
    for x, y in zip(arrays(ours[1][0]), arrays(theirs[1][0]), strict=True):  # of the base
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5 * np.abs(y).max())


def stacked_site(setting, dtype="float32", change=lambda leaves: leaves):
    """(plan, params, factors) of experts (3, 5, 2, 4) with inputs (5, 2) and outputs (4,); trained leaves moved."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 2, 4)), dtype)}
    x = jax.ShapeDtypeStruct((3, 6, 5, 2), dtype)
    plan = lk.resolve(lk.Spec({"w": setting}), params, lambda p, x: jnp.einsum("enhk,ehkd->end", x, p["w"]), x)
    (site,) = plan.sites
    assert (site.stack_shape, site.in_shape, site.out_shape) == ((3,), (5, 2), (4,))
    assert site.rank != 3
    factors = jax.jit(lambda params: lk.split(params, plan, jax.random.key(3))[1])(params)
    other, held = moved(factors)["w"], frozen_leaves(setting)
    return plan, params, {"w": change(other._replace(**{k: getattr(factors["w"], k) for k in held}))}


def equals_the_formula(setting, formula, change=lambda leaves: leaves):
    """The merged parameter against `formula(w (in, out), leaves of one matrix, scale)` in float64 numpy.

    To 1e-12 for a float64 base with float64 leaves, to 1e-5 in float32.
    """
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5)):
        one = replace(setting, dtype=dtype)
        with jax.enable_x64(dtype == "float64"):
            plan, params, factors = stacked_site(one, dtype, change)
            got = jax.jit(lambda b, f, p=plan: lk.merge(b, f, p)["w"])(params, factors)
        assert got.dtype == dtype
        assert all(x.dtype == dtype for x in jax.tree.leaves(factors))
        w = np.asarray(params["w"], np.float64).reshape(3, 10, 4)
        for e in range(3):
            named = {k: np.asarray(x, np.float64) for k, x in factors["w"]._asdict().items()}
            leaves = {k: x[e] if x.shape[0] == 3 else x[:, e].reshape(len(x), -1) for k, x in named.items()}
            want = formula(w[e], leaves, one.scale)
            assert np.abs(want - w[e]).max() > 0.05
            np.testing.assert_allclose(np.asarray(got[e]).reshape(10, 4), want, rtol=tolerance, atol=tolerance)


def bfloat16(setting):
    """A bfloat16 base with leaves of both dtypes: the start is exact, outputs are the function's, gradients finite."""
    params, x = {"w": draw(0, 8, 6).astype(jnp.bfloat16)}, draw(1, 4, 8).astype(jnp.bfloat16)
    plain = x @ params["w"]
    for dtype in ("float32", "bfloat16"):
        plan = lk.resolve(lk.Spec({"w": replace(setting, dtype=dtype)}), params, lambda p, x: x @ p["w"], x)
        base, factors = lk.split(params, plan, jax.random.key(0))
        assert_same_bits(lk.merge(base, factors, plan), params)
        adapted = lk.adapt(lambda p, x: x @ p["w"], plan)

        def loss(f):
            y = adapted(base, f, x)  # noqa: B023
            return jnp.sum(y.astype(jnp.float32)), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(factors)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, plain)
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(grads))


def saved_and_loaded(setting, folder):
    """The leaves come back bit for bit, and the plan; the spec goes through JSON."""
    plan, params, factors = stacked_site(setting)
    lk.save_adapter(folder, plan, factors, base=params)
    back = lk.load_adapter(folder, base=params)
    assert back.plan == plan
    assert_same_bits(back.factors, factors)
    assert lk.Spec.from_json(plan.spec.to_json()) == plan.spec


def refused(cls, table):
    """Bad settings: keywords -> exact message."""
    for settings, says in table:
        try:
            cls(**settings)
        except lk.SpecError as e:
            assert str(e) == says
        else:
            raise AssertionError(f"{settings} is taken")


def stacked_equals_solo(study):
    """Trials of different rank in one program, against each alone by the public functions, after 20 steps of AdamW."""
    problem = tiny.problem()
    trials = kinds(study, study.trials())[0]
    params = problem.params(jax.random.key(0))
    plan = union_plan(study, problem, trials, params, next(problem.train(0, 0)))
    stacked = pack(study, problem, trials, plan, params)
    result = Engine(study, problem, plan, params, len(trials)).train(stacked, lambda _: problem.train(0, 0))
    assert not result.failed.any()
    for i, trial in enumerate(trials):
        own = trial_plan(study, problem, plan, trial, params)
        alone, losses = solo(study, problem, own, trial)
        np.testing.assert_allclose(result.losses[:, i], losses, atol=1e-5, err_msg=trial.name)
        for path, leaves in unpack(own, result.factors, i).items():
            for x, y in zip(jax.tree.leaves(leaves), jax.tree.leaves(alone[path]), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-5, err_msg=f"{trial.name} {path}")


def solo(study, problem, plan, trial):
    base, factors = start(problem, plan, trial.seed)
    adapted = lk.adapt(problem.apply, plan)
    rate = optax.linear_schedule(trial.lr, 0.0, study.steps)
    tx = lk.partition(optax.adamw(rate, weight_decay=study.weight_decay), plan, clip=study.clip)
    init, step = lk.make_step(lambda b, f, x: problem.loss(adapted(b, f, x), x) + lk.penalty(plan, f), tx)
    state, losses, batches = init(factors), [], problem.train(0, 0)
    for _ in range(study.steps):
        state, info = step(state, base, next(batches))
        losses.append(float(info.loss))
    return state.factors, losses
