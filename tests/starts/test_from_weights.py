"""Starts that look at W alone, or at nothing: PiSSA, OLoRA, orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.method import update_of
from tests.draws import draw
from tests.methods import formulas
from tests.starts.sites import LAYOUTS, matrices, prepare, rows, started

SETTING = {"rank": 2, "alpha": 3}
SCALE = 1.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pissa_is_the_principal_part_of_w(layout):
    params, _, _, plan = prepare(layout, lk.LoRA(**SETTING, start="pissa"))
    site, leaves = started(params, plan)
    for w, a, b in zip(matrices(site, params["w"]), rows(site, leaves.a0), rows(site, leaves.b0), strict=True):
        np.testing.assert_allclose(SCALE * a.T @ b, formulas.svd_part(w, 2), atol=2e-6)
        values = np.linalg.svd(w, compute_uv=False)[:2] / SCALE
        for x in (a, b):
            np.testing.assert_allclose(x @ x.T, np.diag(values), atol=2e-6)
    assert not np.any(leaves.a)
    assert not np.any(leaves.b)


def test_pissa_of_a_lower_rank_is_the_first_rows_of_a_higher():
    params, _, _, plan = prepare("matrix", lk.LoRA(rank=4, start="pissa"))
    _, high = started(params, plan)
    _, low = started(params, prepare("matrix", lk.LoRA(rank=2, start="pissa"))[3])
    np.testing.assert_allclose(high.a0[:2], low.a0, atol=1e-6)
    np.testing.assert_allclose(high.b0[:2], low.b0, atol=1e-6)


def test_fast_pissa_comes_close():
    u, _, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(40, 30)), full_matrices=False)
    params = {"w": jnp.asarray((u * 0.7 ** np.arange(30)) @ vt, jnp.float32)}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=4, start="pissa_fast")}), params)
    site, leaves = started(params, plan)
    w, a, b = matrices(site, params["w"])[0], rows(site, leaves.a0)[0], rows(site, leaves.b0)[0]
    assert np.linalg.norm(w - a.T @ b) <= 1.01 * np.linalg.norm(w - formulas.svd_part(w, 4))


@pytest.mark.parametrize("layout", ["matrix", "wide", "transposed", "heads", "stack"])
def test_olora_is_the_first_rows_of_a_qr_decomposition(layout):
    params, _, _, plan = prepare(layout, lk.LoRA(**SETTING, start="olora"))
    site, leaves = started(params, plan)
    for w, a, b in zip(matrices(site, params["w"]), rows(site, leaves.a0), rows(site, leaves.b0), strict=True):
        np.testing.assert_allclose(b @ b.T, np.eye(2), atol=1e-6)
        want = formulas.olora(w, 2)
        np.testing.assert_allclose(a.T @ b, want[0].T @ want[1], atol=2e-6)


@pytest.mark.parametrize("layout", ["matrix", "heads", "stack"])
def test_orthogonal_factors_have_a_product_of_zero(layout):
    params, _, _, plan = prepare(layout, lk.LoRA(rank=4, start="orthogonal"))
    site, leaves = started(params, plan)
    a, b = rows(site, leaves.a0), rows(site, leaves.b0)
    np.testing.assert_allclose(np.einsum("srk,srn->skn", a, b), 0, atol=1e-8)
    # Entries are sums of two draws, each times an entry of an orthogonal matrix of 4 rows, over 10.
    for x in (a, b):
        assert 0.02 < x.std() < 0.2
    if layout == "stack":
        assert np.abs(a[0] - a[1]).max() > 0.01


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(lk.PlanError, match="'w': start 'orthogonal' splits the rank into halves: 3 is odd"):
        prepare("matrix", lk.LoRA(rank=3, start="orthogonal"))


def test_a_table_may_start_from_its_principal_part():
    params, ids = {"w": draw(0, 9, 5)}, jnp.arange(3)
    fn = lambda p, i: p["w"][i]  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, start="pissa")}), params, fn, ids)
    site, leaves = started(params, plan)
    assert site.lookup
    a, b = rows(site, leaves.a0)[0], rows(site, leaves.b0)[0]
    np.testing.assert_allclose(a.T @ b, formulas.svd_part(matrices(site, params["w"])[0], 2), atol=2e-6)


@pytest.mark.parametrize("method", [lk.LoRA, lk.DoRA])
def test_a_bf16_base_is_kept_bit_for_bit_and_read_exactly(method):
    params = {"w": draw(0, 8, 6).astype(jnp.bfloat16)}
    plan = lk.resolve(lk.Spec({"w": method(rank=2, start="pissa")}), params)
    site, leaves = started(params, plan)
    assert leaves.a0.dtype == jnp.float32
    a, b = rows(site, leaves.a0)[0], rows(site, leaves.b0)[0]
    want = formulas.svd_part(np.asarray(params["w"]).astype(np.float64), 2)
    np.testing.assert_allclose(a.T @ b, want, atol=2e-6)


def test_leaves_of_few_bits_still_start_at_zero():
    params = {"w": draw(0, 8, 6)}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, start="pissa", dtype="bfloat16")}), params)
    assert started(params, plan)[1].a0.dtype == jnp.bfloat16


def test_rows_of_zero_singular_values_can_still_learn():
    w = np.zeros((6, 5), np.float32)
    w[0, 1] = 2.0
    params = {"w": jnp.asarray(w)}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, start="pissa")}), params)
    site, leaves = started(params, plan)
    a, b = np.asarray(leaves.a0, np.float64), np.asarray(leaves.b0, np.float64)
    np.testing.assert_allclose(a.T @ b, w, atol=1e-6)
    assert np.linalg.norm(a[1]) == pytest.approx(1)
    assert not np.any(b[1])
    rows_a, rows_b, *_ = update_of(site, params["w"], leaves, 1.0)
    assert not np.any(np.asarray(rows_a).T @ np.asarray(rows_b))


def test_traced_params_give_the_same_start():
    params, _, _, plan = prepare("stack", lk.LoRA(**SETTING, start="pissa"))
    _, leaves = started(params, plan)
    traced = jax.jit(lambda p: lk.split(p, plan, jax.random.key(0))[1]["w"])(params)
    for x, y in zip(jax.tree.leaves(leaves), jax.tree.leaves(traced), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_what_is_not_finite_is_an_error():
    params = {"w": draw(0, 7, 6).at[1, 1].set(jnp.nan)}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, start="pissa")}), params)
    with pytest.raises(lk.PlanError, match="'w', or the hints of it, hold values that are not finite"):
        lk.split(params, plan, jax.random.key(0))
