"""Adapters of another rank: the truncations of numpy's SVD, growth that changes nothing, any method as LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit import algebra
from lorax_kit.algebra import delta as delta_module
from tests.algebra.tasks import adapter, close, dense, matrices, params, settings, truncated

BASE = params()
FOUR = adapter(1, lk.LoRA(rank=4, alpha=2))


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_truncate_is_the_best_approximation_and_says_its_error(rank):
    found = algebra.truncate(FOUR, rank=rank)
    wanted = dense(FOUR, BASE)
    cut = {site.path: truncated(site, wanted[site.path], rank) for site in FOUR.plan.sites}
    close(found, BASE, {path: x[0] for path, x in cut.items()})
    for path, (_, error) in cut.items():
        assert found.errors[path] == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert found.plan.site(path).rank == rank


def test_truncate_never_forms_the_dense_delta_of_rows(monkeypatch):
    monkeypatch.setattr(delta_module, "product", None)
    algebra.truncate(FOUR, rank=2)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_is_held_by_every_stacked_matrix_and_by_no_rank_less(energy):
    found = algebra.truncate(FOUR, energy=energy)
    for site in FOUR.plan.sites:
        squares = np.linalg.svd(matrices(site, dense(FOUR, BASE)[site.path]), compute_uv=False) ** 2
        share = np.cumsum(squares, axis=1) / squares.sum(axis=1, keepdims=True)
        rank = found.plan.site(site.path).rank
        assert np.all(share[:, rank - 1] >= energy - 1e-6)
        assert rank == 1 or np.any(share[:, rank - 2] < energy)


def test_rank_and_energy_together_take_the_lower():
    assert {s.rank for s in algebra.truncate(FOUR, rank=2, energy=1.0).plan.sites} == {2}
    assert {s.rank for s in algebra.truncate(FOUR, rank=4, energy=1e-6).plan.sites} == {1}


def test_grow_keeps_rows_and_delta_to_the_bit_and_can_be_trained():
    key = jax.random.key(3)
    found = algebra.grow(FOUR, 5, key)
    close(found, BASE, dense(FOUR, BASE))
    for path, leaves in FOUR.factors.items():
        new = found.factors[path]
        np.testing.assert_array_equal(new.a[:4], leaves.a)
        np.testing.assert_array_equal(new.b[:4], leaves.b * FOUR.plan.site(path).scale)
        assert not np.any(new.b[4:])
        assert np.all(np.any(new.a[4:].reshape(1, -1), axis=1))
    # The rows are those that a split at that rank draws: keyed by site and row.
    drawn = lk.split(BASE, found.plan, key)[1]
    np.testing.assert_array_equal(found.factors["flat"].a[4:], drawn["flat"].a[4:])


@pytest.mark.parametrize("kind", settings())
def test_any_method_is_lora_exactly_and_at_a_rank_with_its_error(kind):
    one = adapter(3, settings()[kind])
    wanted = dense(one, BASE)
    exact = algebra.to_lora(one, BASE)
    close(exact, BASE, wanted)
    assert set(exact.errors.values()) == {0.0}
    found = algebra.to_lora(one, BASE, rank=2)
    for site in one.plan.sites:
        cut, error = truncated(site, wanted[site.path], 2)
        assert found.errors[site.path] == pytest.approx(error, rel=1e-3, abs=1e-5)
        np.testing.assert_allclose(dense(found, BASE)[site.path], cut, atol=3e-5 * max(1, np.abs(cut).max()))


def test_rows_stay_as_they_are_where_nothing_is_cut():
    found = algebra.to_lora(adapter(1))
    assert found.plan.site("flat").rank == 2
    np.testing.assert_array_equal(found.factors["flat"].a, adapter(1).factors["flat"].a)


def test_a_zero_delta_is_cut_to_rank_one_that_can_still_be_trained():
    zero = algebra.scale(FOUR, 0.0)
    found = algebra.truncate(zero, energy=0.9)
    assert found.plan.site("flat").rank == 1
    assert found.errors["flat"] == 0
    assert not np.any(found.factors["flat"].b)
    assert np.any(found.factors["flat"].a)


def test_x64_truncates_to_1e_12():
    with jax.enable_x64(True):
        base = params(dtype=jnp.float64)
        one = adapter(1, lk.LoRA(rank=4, alpha=2), dtype=jnp.float64)
        wanted = {s.path: truncated(s, dense(one, base)[s.path], 2)[0] for s in one.plan.sites}
        close(algebra.truncate(one, rank=2), base, wanted, 1e-12)


def test_what_is_trained_in_full_stays(tmp_path):
    one = adapter(1, lk.LoRA(rank=3), full=True)
    found = algebra.truncate(one, rank=1)
    np.testing.assert_array_equal(found.factors["bias"].value, one.factors["bias"].value)
    lk.save_adapter(tmp_path / "a", found.plan, found.factors, base=BASE)
    assert lk.load_adapter(tmp_path / "a", base=BASE).plan == found.plan
