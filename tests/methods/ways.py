"""What every method keeps, checked at five ways to use a parameter: a matrix, heads, experts, a table, a convolution.

A method's test brings its own formula of one matrix in float64 numpy; nothing here knows a method.
"""

from __future__ import annotations

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.study.packing import kinds, stacks, trial_plan, unpack
from tests import tiny
from tests.draws import draw, moved
from tests.study.test_engine import TOLERANCE, solo, trained

SHAPES = {"matrix": (6, 8), "heads": (6, 2, 4), "experts": (3, 4, 6), "table": (12, 4), "window": (3, 4, 6)}


def params(dtype=np.float32):
    return {name: draw(i, *shape).astype(dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def inputs(dtype=np.float32):
    x = {"matrix": draw(10, 5, 6), "experts": draw(11, 3, 5, 4), "window": draw(12, 2, 5, 4)}
    return {name: v.astype(dtype) for name, v in x.items()} | {"table": jnp.asarray([[0, 3, 11], [3, 3, 1]])}


def fn(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return {
        "matrix": x["matrix"] @ p["matrix"],
        "heads": jnp.einsum("ti,ihd->thd", x["matrix"], p["heads"]),
        "experts": jnp.einsum("end,edh->enh", x["experts"], p["experts"]),
        "table": p["table"][x["table"]],
        "window": jax.lax.conv_general_dilated(x["window"], p["window"], (1,), "SAME", dimension_numbers=numbers),
    }


def loss(out):
    return sum(jnp.sum(jnp.sin(y)) for y in out.values())


def prepared(setting, dtype=np.float32, seed=0):
    """(plan, base, factors) of a setting everywhere."""
    p, x = params(dtype), inputs(dtype)
    plan = lk.resolve(lk.Spec({"*": setting}), p, fn, x)
    return plan, p, jax.jit(lambda p: lk.split(p, plan, jax.random.key(seed))[1])(p)


def expected(site, w, leaves, stack_axes, matrix):
    """W' in float64: `matrix(site, leaves of one stacked matrix)` is its update (in, out), scale included.

    stack_axes: leaf -> the axis along which it holds one entry per stacked matrix; the others are shared.
    """
    order = (*site.axes.stack, *site.axes.inputs, *site.axes.outputs)
    moved_w = np.transpose(np.asarray(w, np.float64), order)
    flat = moved_w.reshape(prod(site.stack_shape), prod(site.in_shape), -1).copy()
    leaves = {k: np.asarray(x, np.float64) for k, x in leaves._asdict().items() if x is not None}
    for s in range(len(flat)):
        one = {k: x.take(s, stack_axes[k]) if site.stack_shape and k in stack_axes else x for k, x in leaves.items()}
        flat[s] += matrix(site, one)
    return np.transpose(flat.reshape(moved_w.shape), np.argsort(order))


def check_update(setting, stack_axes, matrix):
    """The merged parameter is the paper's, to fp32's rounding and to float64's."""
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
        with jax.enable_x64(dtype == np.float64):
            plan, base, factors = prepared(setting(np.dtype(dtype).name), dtype)
            factors = moved(factors)
            found = jax.jit(lambda base, factors: lk.merge(base, factors, plan))(base, factors)  # noqa: B023
            for site in plan.sites:
                want = expected(site, base[site.path], factors[site.path], stack_axes, matrix)
                assert found[site.path].dtype == dtype
                change = np.abs(want - np.asarray(base[site.path], np.float64)).max()
                assert change > 1e-2, site.path
                error = np.abs(np.asarray(found[site.path], np.float64) - want).max()
                assert error < tolerance * max(1, np.abs(want).max()), (site.path, dtype, error)


def check_start(setting):
    """The start changes nothing, to the bit: of the parameters, and of the function."""
    for name in ("float32", "bfloat16"):
        plan, base, factors = prepared(setting("float32"), jnp.dtype(name))
        merged = jax.jit(lambda base, factors: lk.merge(base, factors, plan))(base, factors)  # noqa: B023
        for path, w in merged.items():
            assert np.asarray(w).tobytes() == np.asarray(base[path]).tobytes(), (path, name)
    plan, base, factors = prepared(setting("float32"))
    adapted = jax.jit(lk.adapt(fn, plan))(base, factors, inputs())
    for path, y in jax.jit(fn)(base, inputs()).items():
        np.testing.assert_array_equal(adapted[path], y, err_msg=path)


def check_gradients(setting, frozen=()):
    """Outputs and gradients are those of the merged parameters under autodiff; frozen leaves have none, others have."""
    plan, base, factors = prepared(setting("float32"))
    factors, x = moved(factors), inputs()

    def both(run):
        return jax.value_and_grad(lambda f: loss(run(f)))(factors)

    adapted = lk.adapt(fn, plan)
    ours, theirs = jax.jit(
        lambda x: (both(lambda f: adapted(base, f, x)), both(lambda f: fn(lk.merge(base, f, plan), x)))
    )(x)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for path, leaves in ours[1].items():
        for name, got in leaves._asdict().items():
            if got is None:
                continue
            want = np.asarray(getattr(theirs[1][path], name))
            largest = np.abs(want).max()
            np.testing.assert_allclose(got, want, atol=2e-5 * max(largest, 1e-3), rtol=1e-4, err_msg=f"{path} {name}")
            assert (largest == 0) == (name in frozen), (path, name)


def check_dtypes(setting):
    """Leaves are stored as asked; a bf16 model stays bf16."""
    plan, base, factors = prepared(setting("bfloat16"), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(factors)} == {jnp.dtype(jnp.bfloat16)}
    out, grads = jax.jit(jax.value_and_grad(lambda f: loss(lk.adapt(fn, plan)(base, f, inputs(jnp.bfloat16)))))(factors)
    assert out.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.bfloat16 and bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def check_saving(setting, folder):
    """An adapter on disk comes back with its plan, to the bit."""
    plan, base, factors = prepared(setting("float32"))
    factors = moved(factors)
    lk.save_adapter(folder / "adapter", plan, factors, base=base)
    found = lk.load_adapter(folder / "adapter", base=base)
    assert found.plan == plan
    assert lk.Spec.from_json(plan.spec.to_json()) == plan.spec
    for x, y in zip(jax.tree.leaves(found.factors), jax.tree.leaves(factors), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def check_stacking(together, **changes):
    """Trials of rank 1 and 3 equal their solo runs after 20 steps; `together` says whether they share a stack."""
    study, problem = tiny.study(**{"rank": [1, 3], "seed": [0], "probe_lr": ()} | changes), tiny.problem()
    (kind,) = kinds(study, study.trials())
    params = problem.params(jax.random.key(0))
    found = stacks(study, problem, kind, params, next(problem.train(0, 0)))
    assert [len(some) for some, _ in found] == ([2] if together else [1, 1])
    for some, _ in found:
        result, trials, plan, params, _ = trained(study, problem, some)
        for i, trial in enumerate(trials):
            own = trial_plan(study, problem, plan, trial, params)
            alone, losses = solo(study, problem, plan, trial, params, 0)
            np.testing.assert_allclose(result.losses[:, i], losses, atol=TOLERANCE, err_msg=trial.name)
            mine = unpack(own, result.factors, i)
            assert max(abs(losses[0] - x) for x in losses) > 1e-3
            for path in alone:
                for x, y in zip(jax.tree.leaves(mine[path]), jax.tree.leaves(alone[path]), strict=True):
                    np.testing.assert_allclose(x, y, atol=TOLERANCE, err_msg=f"{trial.name} {path}")


RANK = "it must be an integer of at least 1.\n  to train no low-rank factors at all, leave the rule out"


def check_bad(make, settings, message):
    """A bad setting says exactly this."""
    with pytest.raises(lk.SpecError) as e:
        make(**settings)
    assert str(e.value) == message


def leaves_of(setting, params):
    """The leaves of one setting at the only parameter, an (in, out) matrix."""
    plan = lk.resolve(lk.Spec({"*": setting}), params)
    return next(iter(lk.split(params, plan, jax.random.key(3))[1].values()))
