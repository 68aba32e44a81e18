"""What the tests of a method check beside the contract table: its formula, dtypes, and trials that share a stack.

At five ways to use a parameter: a matrix, heads, experts, a table, a convolution. A method's test brings its own
formula of one matrix in float64 numpy; nothing here knows a method.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import lorax_kit as lk
from lorax_kit.study.programs.forms import kinds, stacks, trial_plan
from lorax_kit.study.programs.packing import unpack
from tests import tiny
from tests.draws import draw, moved, moved_leaves
from tests.study.test_engine import TOLERANCE, solo, trained

SHAPES = {"matrix": (6, 8), "heads": (6, 2, 4), "experts": (3, 4, 6), "table": (12, 4), "window": (3, 4, 6)}
RANK = "it must be an integer of at least 1.\n  to train no low-rank factors at all, leave the rule out"


def params(dtype="float32"):
    return {name: draw(i, *shape).astype(dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def inputs(dtype="float32"):
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


def prepared(setting, dtype="float32"):
    """(plan, base, factors) of a setting everywhere."""
    p, x = params(dtype), inputs(dtype)
    plan = lk.resolve(lk.Spec({"*": setting}), p, fn, x)
    return plan, p, jax.jit(lambda p: lk.split(p, plan, jax.random.key(0))[1])(p)


def of_one_matrix(leaves, s, stack_axes):
    """The leaves of stacked matrix `s` in float64, rows flat: a (r, in), b (r, out)."""
    out = {}
    for name, x in leaves.items():
        one = x if s is None or name not in stack_axes else x.take(s, stack_axes[name])
        out[name] = one.reshape(len(one), -1) if one.ndim > 2 else one
    return out


def check_formula(setting, formula, stack_axes, change=lambda leaves: leaves):
    """The merged parameters are `formula(w (in, out), leaves of one matrix, scale)`, to fp32's and float64's rounding.

    Convolutions have their window first in `in`. Trained leaves are moved, then changed by `change`.
    stack_axes: leaf -> the axis along which it holds one entry per stacked matrix; the others are shared.
    """
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
        with jax.enable_x64(dtype == "float64"):
            plan, base, factors = prepared(replace(setting, dtype=dtype), dtype)
            factors = {path: change(leaves) for path, leaves in moved_leaves(plan, factors).items()}
            found = jax.jit(lambda base, factors: lk.merge(base, factors, plan))(base, factors)  # noqa: B023
            for site in plan.sites:
                w, got = (np.asarray(site.matrices(x[site.path]), np.float64) for x in (base, found))
                assert found[site.path].dtype == dtype
                leaves = {k: np.asarray(x) for k, x in factors[site.path]._asdict().items() if x is not None}
                assert {x.dtype for x in leaves.values()} == {np.dtype(dtype)}
                want = np.empty_like(w)
                for s in range(len(w)):
                    one = of_one_matrix(leaves, s if site.stack_shape else None, stack_axes)
                    want[s] = formula(w[s], {k: x.astype(np.float64) for k, x in one.items()}, setting.scale)
                assert np.abs(want - w).max() > 1e-2, site.path
                bound = tolerance * max(1, np.abs(want).max())
                np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=f"{site.path} {dtype}")


def check_gradients(setting):
    """Outputs and gradients are those of the merged parameters under autodiff: for settings the table has no way of."""
    plan, base, factors = prepared(setting)
    factors, x, adapted = moved(factors), inputs(), lk.adapt(fn, plan)

    def both(run):
        return jax.value_and_grad(lambda f: loss(run(f)))(factors)

    ours, theirs = jax.jit(
        lambda x: (both(lambda f: adapted(base, f, x)), both(lambda f: fn(lk.merge(base, f, plan), x)))
    )(x)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for path, leaves in ours[1].items():
        for name, got in leaves._asdict().items():
            if got is not None:
                want = np.asarray(getattr(theirs[1][path], name))
                largest = np.abs(want).max()
                assert largest > 0, (path, name)
                np.testing.assert_allclose(got, want, atol=2e-5 * largest, rtol=1e-4, err_msg=f"{path} {name}")


def check_start(setting):
    """The start changes no bit of the parameters, and none of what the function computes."""
    plan, base, factors = prepared(setting)
    merged = jax.jit(lambda base, factors: lk.merge(base, factors, plan))(base, factors)
    for path, w in merged.items():
        assert np.asarray(w).tobytes() == np.asarray(base[path]).tobytes(), path
    adapted = jax.jit(lk.adapt(fn, plan))(base, factors, inputs())
    for path, y in jax.jit(fn)(base, inputs()).items():
        np.testing.assert_array_equal(adapted[path], y, err_msg=path)


def check_bfloat16(setting, wide=()):
    """A bf16 model stays bf16, starts as it was, and has finite gradients, whatever the leaves are stored in.

    wide: leaves of at least float32.
    """
    base, x = params("bfloat16"), inputs("bfloat16")

    def started(plan):
        _, factors = lk.split(base, plan, jax.random.key(0))
        adapted = lk.adapt(fn, plan)

        def total(f):
            out = adapted(base, f, x)
            return loss(out).astype(jnp.float32), out

        return factors, lk.merge(base, factors, plan), *jax.value_and_grad(total, has_aux=True)(factors)

    def everything():
        plans = {dtype: lk.resolve(lk.Spec({"*": replace(setting, dtype=dtype)}), base, fn, x) for dtype in dtypes}
        return fn(base, x), {dtype: started(plan) for dtype, plan in plans.items()}

    dtypes = ("float32", "bfloat16")
    plain, found = jax.jit(everything)()
    for dtype, (factors, merged, (_, out), grads) in found.items():
        for path, w in merged.items():
            assert np.asarray(w).tobytes() == np.asarray(base[path]).tobytes(), path
        for leaves in factors.values():
            for name, leaf in leaves._asdict().items():
                assert leaf is None or leaf.dtype == ("float32" if name in wide else dtype), name
        for path, y in out.items():
            assert y.dtype == jnp.bfloat16
            np.testing.assert_array_equal(y, plain[path], err_msg=path)
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(grads))


def check_stacking(together=True, **changes):
    """Trials equal their solo runs after 20 steps of AdamW; `together` says whether all share one stack."""
    study, problem = tiny.study(**{"rank": [1, 3], "seed": [0], "probe_lr": ()} | changes), tiny.problem()
    ((kind, form),) = kinds(study, problem, study.trials())
    start = problem.params(jax.random.key(0))
    found = stacks(study, problem, kind, form, start, next(problem.train(0, 0)))
    assert [len(some) for some, *_ in found] == ([len(kind)] if together else [1] * len(kind))
    for some, *_ in found:
        result, trials, plan, base, _ = trained(study, problem, some)
        assert not result.failed.any()
        for i, trial in enumerate(trials):
            own = trial_plan(study, problem, plan, trial, base)
            alone, losses = solo(study, problem, plan, trial, base, 0)
            np.testing.assert_allclose(result.losses[:, i], losses, atol=TOLERANCE, err_msg=trial.name)
            assert max(abs(losses[0] - x) for x in losses) > 1e-3
            mine = unpack(own, result.factors, i)
            assert set(mine) == set(alone)
            for path in alone:
                for x, y in zip(jax.tree.leaves(mine[path]), jax.tree.leaves(alone[path]), strict=True):
                    np.testing.assert_allclose(x, y, atol=TOLERANCE, err_msg=f"{trial.name} {path}")


def check_refused(cls, table):
    """Bad settings: (keywords, exact message) each."""
    for settings, says in table:
        try:
            cls(**settings)
        except lk.SpecError as e:
            assert str(e) == says
        else:
            raise AssertionError(f"{settings} is taken")


def leaves_of(setting, w):
    """The leaves of one setting at the only parameter, an (in, out) matrix."""
    plan = lk.resolve(lk.Spec({"w": setting}), {"w": w})
    return lk.split({"w": w}, plan, jax.random.key(3))[1]["w"]
