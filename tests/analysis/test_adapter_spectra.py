"""Spectra of the true delta, against float64 numpy from the update's rows and gains and the site's axes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.analysis import adapter_spectra, delta_directions, site_spectrum, weight_directions
from lorax_kit.core.lowrank import dense
from lorax_kit.core.paths import flatten
from tests.cases import CASES
from tests.draws import draw, moved, moved_leaves
from tests.methods.table import WAYS, normal_form, quantised

DATA = {"lora + eva", "lora + corda_kpm", "dora + lora_ga"}  # starts that need calibration: plain rows, or DoRA's form
ON_MLP = sorted(set(WAYS) - DATA)
ON_TIED = ("lora", "dora", "hra", "ia3")  # N-D kernels, a scanned stack and a table


def adapter(way, case):
    plan = lk.resolve(lk.Spec(dict.fromkeys(case.targets, WAYS[way])), case.params, case.fn, *case.inputs)
    base, start = lk.split(case.params, plan, jax.random.key(1))
    return plan, base, start, moved_leaves(plan, start)


def true_delta(site, named, leaves):
    """(S, K, N): W' - W."""
    w = named[site.path]
    return site.matrices(normal_form(site, w, leaves) - np.asarray(dense(w), np.float64))


@pytest.mark.parametrize(("way", "model"), [(w, "mlp") for w in ON_MLP] + [(w, "tied") for w in ON_TIED])
def test_spectra_are_those_of_the_true_delta(way, model):
    plan, base, start, factors = adapter(way, CASES[model]())
    named, _ = flatten(base)
    for site, row in zip(plan.sites, adapter_spectra(plan, base, factors), strict=True):
        full = np.linalg.svd(true_delta(site, named, factors[site.path]), compute_uv=False)
        k = row.singular_values.shape[-1]
        assert row.path == site.path
        assert row.singular_values.shape == (*site.stack_shape, k)
        s = full.reshape(*site.stack_shape, -1)
        np.testing.assert_allclose(row.singular_values, s[..., :k], rtol=1e-5, atol=3e-6 * s.max())
        assert (s[..., k:] <= 1e-5 * s.max()).all()
        share = full / full.sum(axis=1, keepdims=True)
        entropy = -np.sum(share * np.log(np.maximum(share, 1e-300)), axis=1)
        np.testing.assert_allclose(row.effective_rank.reshape(-1), np.exp(entropy), rtol=1e-3)
        held = np.cumsum(full**2, axis=1) / np.sum(full**2, axis=1, keepdims=True)
        assert row.rank_for_energy.reshape(-1).tolist() == (1 + (held < 0.9).sum(axis=1)).tolist()
    for row in adapter_spectra(plan, base, start):
        np.testing.assert_array_equal(row.singular_values, 0)
        np.testing.assert_array_equal(row.effective_rank, 0)


@pytest.mark.parametrize(("way", "model"), [("lora", "tied"), ("dora", "tied"), ("loha", "mlp")])
def test_directions_rebuild_the_true_delta(way, model):
    plan, base, _, factors = adapter(way, CASES[model]())
    named, _ = flatten(base)
    for site in plan.sites:
        found = delta_directions(site, named[site.path], factors[site.path])
        u, v = (np.nan_to_num(x) for x in (found.inputs, found.outputs))
        whole = (u * found.values[..., None, :]) @ np.swapaxes(v, -1, -2)
        expected = true_delta(site, named, factors[site.path]).reshape(whole.shape)
        np.testing.assert_allclose(whole, expected, atol=1e-5 * np.abs(expected).max())
        for x in (u, v):
            eye = (found.values > 0)[..., None] * np.eye(u.shape[-1])
            np.testing.assert_allclose(np.swapaxes(x, -1, -2) @ x, eye, atol=1e-6)


def test_a_quantised_base_has_the_spectrum_of_its_restored_weights():
    plan, base, _, factors = adapter("dora", quantised())
    named, _ = flatten(base)
    site = plan.sites[0]
    expected = np.linalg.svd(true_delta(site, named, factors[site.path])[0], compute_uv=False)
    np.testing.assert_allclose(adapter_spectra(plan, base, factors)[0].singular_values, expected, rtol=1e-4)


def test_rows_of_zeros_have_no_directions():
    """A rank-2 trial held in 4 rows, and a delta whose rows cancel."""
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=4)}), {"w": draw(0, 8, 6)})
    site, (a, b) = plan.sites[0], (draw(1, 4, 8), draw(2, 4, 6))
    padded = delta_directions(site, draw(0, 8, 6), lk.Factors(a=a.at[2:].set(0), b=b.at[2:].set(0)))
    assert (padded.values > 0).tolist() == [True, True, False, False]
    assert np.isnan(padded.inputs).all(axis=0).tolist() == np.isnan(padded.outputs).all(axis=0).tolist()
    assert np.isnan(padded.inputs).any(axis=0).tolist() == [False, False, True, True]
    cancelling = lk.Factors(a=jnp.concatenate([a[:2], a[:2]]), b=jnp.concatenate([b[:2], -b[:2]]))
    np.testing.assert_array_equal(site_spectrum(site, draw(0, 8, 6), cancelling), 0)


def test_weight_directions_are_the_leading_ones_of_w():
    params = {"w": draw(0, 3, 8, 5)}
    plan = lk.resolve(
        lk.Spec({"w": lk.LoRA(rank=2)}),
        params,
        lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"]),
        draw(1, 2, 8),
    )
    assert plan.sites[0].stack_shape == (3,)
    found = weight_directions(plan.sites[0], params["w"], top=2)
    _, s, vt = np.linalg.svd(np.asarray(params["w"], np.float64), full_matrices=False)
    np.testing.assert_allclose(found.values, s[:, :2], rtol=1e-6)
    cosines = np.abs(np.einsum("sno,sno->so", found.outputs, np.swapaxes(vt, 1, 2)[..., :2]))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    with pytest.raises(lk.PlanError, match=r"^top is 0; it must be an integer of at least 1\.$"):
        weight_directions(plan.sites[0], params["w"], top=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"energy": 90}, ValueError, r"^energy is a share in \(0, 1\], got 90\.$"),
        ({"base": {"w": jnp.ones((2, 2))}}, lk.PlanError, r"^'w' has shape \(2, 2\), the plan expects \(4, 3\)\."),
        ({"factors": {}}, lk.AdapterError, "^the factors lack 'w'"),
        (
            {"factors": {"w": lk.Factors(a=jnp.full((2, 4), jnp.nan), b=jnp.ones((2, 3)))}},
            lk.AdapterError,
            "not finite",
        ),
    ],
)
def test_bad_input_is_refused(change, error, message):
    base = {"w": jnp.ones((4, 3))}
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), base)
    given = {"base": base, "factors": moved(lk.split(base, plan, jax.random.key(0))[1]), "energy": 0.9} | change
    with pytest.raises(error, match=message):
        adapter_spectra(plan, given["base"], given["factors"], energy=given["energy"])
