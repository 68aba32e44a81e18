"""Starts that look at data: EVA at the inputs, CorDA at W and the inputs, LoRA-GA at the gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.starts.lora_ga import lora_ga
from tests.draws import draw
from tests.methods import formulas
from tests.starts.sites import LAYOUTS, inputs, matrices, prepare, rows, started

SETTING = {"rank": 2, "alpha": 3}
SCALE = 1.5


def loss(y, x):
    return jnp.mean(jnp.sin(y))


def calibrated(layout, start, method=lk.LoRA, **options):
    params, fn, x, plan = prepare(layout, method(**SETTING, start=start))
    return params, fn, x, plan, lk.calibrate(fn, params, plan, [x], progress=False, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eva_spans_the_top_right_singular_vectors_of_the_inputs(layout):
    params, _, x, plan, stats = calibrated(layout, "eva")
    site, leaves = started(params, plan, stats)
    assert not np.any(leaves.b)
    assert leaves.a0 is None
    for given, a in zip(inputs(site, x), rows(site, leaves.a), strict=True):
        np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-6)
        _, s, vt = np.linalg.svd(given)
        np.testing.assert_allclose(np.abs(a @ vt[:2].T), np.eye(2), atol=1e-4)
        assert np.linalg.norm(given @ a.T) ** 2 == pytest.approx(np.sum(s[:2] ** 2), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_splits_w_by_what_the_data_see(layout, mode):
    params, _, x, plan, stats = calibrated(layout, f"corda_{mode}")
    site, leaves = started(params, plan, stats)
    for w, given, a, b in zip(
        matrices(site, params["w"]), inputs(site, x), rows(site, leaves.a0), rows(site, leaves.b0), strict=True
    ):
        c = given.T @ given
        c = c / np.diag(c).mean()
        want = formulas.corda(w, c, 2, SCALE, mode=mode)
        np.testing.assert_allclose(a.T @ b, want[0].T @ want[1], atol=2e-4)
        # What stays of W, weighted by the covariance, is the least (IPM) or the most (KPM) that rank 2 can leave.
        c = c + 0.01 * np.eye(len(c))
        values = np.linalg.svd(c @ w, compute_uv=False)
        rest = values[2:] if mode == "ipm" else values[:-2]
        assert np.linalg.norm(c @ (w - SCALE * a.T @ b)) == pytest.approx(np.linalg.norm(rest), rel=1e-4)
        assert np.linalg.norm(a) / np.linalg.norm(want[0]) == pytest.approx(1, rel=1e-3)


def test_corda_does_not_depend_on_the_unit_of_the_inputs_nor_on_their_number():
    params, fn, x, plan, stats = calibrated("matrix", "corda_ipm")
    _, leaves = started(params, plan, stats)
    other = lk.calibrate(fn, params, plan, [100 * x, 100 * x], progress=False)
    np.testing.assert_allclose(started(params, plan, other)[1].a0, leaves.a0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["matrix", "heads", "stack last"])
def test_lora_gas_first_step_is_the_best_approximation_of_the_gradient_by_rank_2r(layout):
    """Theorem 3.1, with the gradients of the adapted function: of one step of descent, over -rate."""
    params, fn, x, plan, stats = calibrated(layout, "lora_ga", loss=loss, collect=["gradient"])
    site, leaves = started(params, plan, stats)
    adapted = lk.adapt(fn, plan)
    base, factors = {"w": params["w"]}, {"w": leaves}
    got = jax.jit(jax.grad(lambda f: loss(adapted(base, f, x), x)))(factors)["w"]
    whole = matrices(site, jax.grad(lambda p: loss(fn(p, x), x))(params)["w"])
    step = np.einsum("srk,srn->skn", rows(site, got.a), rows(site, leaves.b0))
    step += np.einsum("srk,srn->skn", rows(site, leaves.a0), rows(site, got.b))
    for g, moved in zip(whole, SCALE * step, strict=True):
        stable = g.shape[1] ** 0.5 / 16
        best = formulas.svd_part(g, 4)
        np.testing.assert_allclose(moved, SCALE**2 * stable * best, atol=1e-4 * np.abs(best).max())
    want = formulas.lora_ga(whole[0], 2, paper=True)
    for x, y in zip((rows(site, leaves.a0)[0], rows(site, leaves.b0)[0]), want, strict=True):
        np.testing.assert_allclose(np.abs(x @ y.T), np.diag(np.sum(y**2, axis=1)), atol=1e-4)


def test_lora_ga_of_more_than_half_the_rank_follows_the_whole_gradient():
    params, fn, x, plan = prepare("matrix", lk.LoRA(rank=5, start="lora_ga"))
    stats = lk.calibrate(fn, params, plan, [x], loss=loss, collect="gradient", progress=False)
    site, leaves = started(params, plan, stats)
    g = matrices(site, stats["w"].gradient)[0]
    a, b = rows(site, leaves.a0)[0], rows(site, leaves.b0)[0]
    np.testing.assert_allclose(formulas.lora_ga_step(g, a, b), 6**0.5 / 16 * g, atol=1e-6)
    assert np.count_nonzero(np.abs(b).max(1)) == 1


def test_a_start_of_your_own_options():
    lk.starts.STARTS["lora_ga_64"] = partial(lora_ga, gamma=64.0)
    try:
        params, _, _, plan, stats = calibrated("matrix", "lora_ga_64", loss=loss, collect="gradient")
        _, leaves = started(params, plan, stats)
        np.testing.assert_allclose(np.linalg.norm(leaves.a0, axis=1), 6**0.25 / 8, rtol=1e-5)
    finally:
        del lk.starts.STARTS["lora_ga_64"]


def test_dora_starts_from_data_too():
    params, _, _, plan, stats = calibrated("matrix", "eva", method=lk.DoRA)
    _, leaves = started(params, plan, stats)
    np.testing.assert_allclose(leaves.magnitude, np.linalg.norm(np.asarray(params["w"]), axis=0), rtol=1e-6)


W, X = {"w": draw(0, 7, 6)}, draw(1, 20, 7)


def split(start, hints):
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, start=start)}), W, lambda p, x: x @ p["w"], X)
    lk.split(W, plan, jax.random.key(0), hints=hints)


@pytest.mark.parametrize(
    ("start", "hints", "message"),
    [
        ("eva", None, r"start 'eva' at 'w' needs the inputs of the data there: give lk.split\(..., hints=stats\)"),
        ("corda_ipm", {"other": lk.Hints()}, "start 'corda_ipm' at 'w' needs the inputs of the data there"),
        (
            "lora_ga",
            {"w": lk.Hints(gram=np.eye(7)[None])},
            r"the gradient of a loss .*\n.*collect=\['gradient'\]",
        ),
        ("eva", {"w": lk.Hints(gram=np.eye(6)[None])}, r"has shape \(1, 6, 6\); the parameter needs \(1, 7, 7\)"),
        ("lora_ga", {"w": lk.Hints(gradient=np.ones((6, 7)))}, r"has shape \(6, 7\); the parameter needs \(7, 6\)"),
        ("eva", {"w": lk.Hints(gram=np.zeros((1, 7, 7)))}, "the gram of 'w' in hints= is zero: no data reached it"),
        ("eva", {"w": lk.Hints(gram=np.full((1, 7, 7), np.nan))}, "hold values that are not finite"),
        ("eva", {"w": np.eye(7)}, "hints must map paths to lk.Hints, as lk.calibrate returns them"),
    ],
)
def test_data_that_are_missing_or_wrong_are_an_error(start, hints, message):
    with pytest.raises(lk.PlanError, match=message):
        split(start, hints)


@pytest.mark.parametrize("start", ["eva", "corda_ipm", "corda_kpm"])
def test_a_table_has_no_inputs_to_look_at(start):
    fn = lambda p, ids: p["w"][ids]  # noqa: E731
    with pytest.raises(lk.PlanError, match=f"'w': start '{start}' reads what is multiplied, and the rows of a table"):
        lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, start=start)}), W, fn, jnp.arange(3))


def test_a_table_has_a_gradient():
    fn, ids = lambda p, ids: p["w"][ids], jnp.arange(3)
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, start="lora_ga")}), W, fn, ids)
    stats = lk.calibrate(fn, W, plan, [ids], loss=loss, collect="gradient", progress=False)
    site, leaves = started(W, plan, stats)
    g = matrices(site, stats["w"].gradient)[0]
    assert not np.any(g[3:])
    a = rows(site, leaves.a0)[0] * 4 / 6**0.25
    np.testing.assert_allclose(
        np.linalg.norm(a @ g) ** 2, np.sum(np.linalg.svd(g, compute_uv=False)[:2] ** 2), rtol=1e-5
    )
