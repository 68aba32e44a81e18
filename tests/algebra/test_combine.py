"""Tasks combined as the papers have it, on dense deltas: against their formulas in float64 numpy."""

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit import algebra
from lorax_kit.algebra.combine import elect
from tests.algebra.tasks import LOW, adapter, close, dense, params, truncated

BASE = params()
TASKS = [adapter(1, full=True), adapter(2, lk.LoRA(rank=3), full=True), adapter(3, lk.DoRA(rank=1), full=True)]
WEIGHTS = [1.0, 0.5, 2.0]
DELTAS = [dense(x, BASE) for x in TASKS]
PATHS = (*LOW, "bias")


def trimmed(delta, density):
    """Algorithm 1 of TIES: the task's entries, over all parameters, that are among its largest."""
    every = np.sort(np.concatenate([np.abs(delta[p]).ravel() for p in PATHS]))[::-1]
    least = every[max(1, round(density * every.size)) - 1]
    return {p: np.where(np.abs(delta[p]) >= least * (1 - 1e-6), delta[p], 0) for p in PATHS}


def elected(tasks, disjoint):
    """Sign by summed mass; the mean (or sum) of the entries that share it."""
    tasks = np.stack(tasks)
    sign = np.sign(tasks.sum(0))
    out = np.zeros(sign.shape)
    for place in np.ndindex(*sign.shape):
        own = [t[place] for t in tasks if t[place] * sign[place] > 0]
        out[place] = 0 if not own else sum(own) if disjoint == "sum" else sum(own) / len(own)
    return out


def wanted_of(how, density, disjoint="mean"):
    if how in ("cat", "linear", "svd"):
        return {p: sum(w * d[p] for w, d in zip(WEIGHTS, DELTAS, strict=True)) for p in PATHS}
    pruned = [trimmed(d, density) for d in DELTAS]
    scaled = {p: [w * d[p] for w, d in zip(WEIGHTS, pruned, strict=True)] for p in PATHS}
    if how == "magnitude_prune":
        return {p: sum(x) for p, x in scaled.items()}
    return {p: elected(x, disjoint) for p, x in scaled.items()}


@pytest.mark.parametrize(
    ("how", "more"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {"rank": 5}),
        ("magnitude_prune", {"density": 0.3, "rank": 5}),
        ("magnitude_prune", {"density": 1.0, "rank": 5}),
        ("ties", {"density": 0.4, "rank": 5}),
        ("ties", {"density": 0.4, "rank": 5, "disjoint": "sum"}),
    ],
)
def test_ways_equal_their_formulas_at_full_rank(how, more):
    wanted = wanted_of(how, more.get("density", 1.0), more.get("disjoint", "mean"))
    # Five rows hold every site but `layers`, 6x6.
    found = algebra.combine(TASKS, how, weights=WEIGHTS, base=BASE, **more)
    if "rank" in more:
        site = TASKS[0].plan.site("layers")
        wanted["layers"], error = truncated(site, wanted["layers"], 5)
        assert found.errors["layers"] == pytest.approx(error, rel=1e-3)
        assert found.errors["flat"] < 1e-6
    close(found, BASE, wanted)


@pytest.mark.parametrize(("how", "density"), [("svd", None), ("magnitude_prune", 0.3), ("ties", 0.4)])
def test_combine_into_folds_the_same_delta_into_the_base(how, density):
    merged = algebra.combine_into(BASE, TASKS, how, weights=WEIGHTS, density=density)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)
    for path, delta in wanted_of(how, density).items():
        np.testing.assert_allclose(merged[path], np.asarray(BASE[path], np.float64) + delta, atol=2e-5, rtol=1e-5)
    np.testing.assert_array_equal(merged["rest"], BASE["rest"])


def test_a_lower_rank_is_the_best_one_and_its_error_is_said():
    found = algebra.combine(TASKS, "ties", weights=WEIGHTS, density=0.4, base=BASE)
    wanted = wanted_of("ties", 0.4)
    for site in TASKS[0].plan.sites:
        cut, error = truncated(site, wanted[site.path], 3)  # the highest of 2, 3 and 1
        assert found.plan.site(site.path).rank == 3
        assert found.errors[site.path] == pytest.approx(error, rel=1e-4)
        np.testing.assert_allclose(dense(found, BASE)[site.path], cut, atol=2e-5)
    held = algebra.combine(TASKS, "ties", weights=WEIGHTS, density=0.4, base=BASE, energy=0.5)
    assert max(held.errors.values()) <= np.sqrt(0.5) + 1e-6


def test_signs_are_elected_by_mass():
    """By hand: each entry's larger mass decides, and the mean is over those that share its sign."""
    found = elect(np.array([[2.0, -1.0, 0.0, 3.0], [-3.0, -2.0, 1.0, 0.0]]))
    np.testing.assert_array_equal(found, [-3.0, -1.5, 1.0, 3.0])


def test_dare_drops_by_density_rescales_and_keeps_the_mean():
    one, key = [adapter(1)], jax.random.key(0)
    delta = dense(one[0], BASE)
    merged = algebra.combine_into(BASE, one, "dare_linear", density=0.25, key=key)
    kept = total = 0
    for path in LOW:
        found = np.asarray(merged[path], np.float64) - np.asarray(BASE[path], np.float64)
        dropped = np.abs(found) < 1e-6
        np.testing.assert_allclose(found[~dropped], 4 * delta[path][~dropped], atol=1e-5)
        kept, total = kept + np.sum(~dropped), total + dropped.size
    assert abs(kept / total - 0.25) < 4 * np.sqrt(0.25 * 0.75 / total)


def test_dare_depends_on_key_and_task_and_not_on_other_sites():
    key = jax.random.key(0)
    tasks, alone = [adapter(1), adapter(1)], [adapter(1, sites=("flat",))] * 2
    both = algebra.combine_into(BASE, tasks, "dare_linear", density=0.5, key=key)
    flat = algebra.combine_into(BASE, alone, "dare_linear", density=0.5, key=key)
    other = algebra.combine_into(BASE, tasks, "dare_linear", density=0.5, key=jax.random.key(1))
    same = dense(tasks[0], BASE)["flat"], dense(alone[0], BASE)["flat"]
    np.testing.assert_allclose(*same)
    np.testing.assert_allclose(both["flat"], flat["flat"], atol=1e-6)
    assert np.any(np.abs(both["flat"] - other["flat"]) > 1e-3)
    # Twice the same task: entries that one mask keeps and the other drops are there once.
    ratio = (np.asarray(both["flat"], np.float64) - np.asarray(BASE["flat"], np.float64)) / same[0]
    assert {0, 2, 4} == set(np.round(ratio.ravel()).astype(int))


@pytest.mark.parametrize(("dare", "other"), [("dare_linear", "svd"), ("dare_ties", "ties")])
def test_dare_that_keeps_every_entry_drops_none(dare, other):
    more = {} if other == "svd" else {"density": 1.0}
    wanted = algebra.combine(TASKS, other, weights=WEIGHTS, rank=5, base=BASE, **more)
    key = jax.random.key(0)
    found = algebra.combine(TASKS, dare, weights=WEIGHTS, rank=5, base=BASE, density=1.0, key=key)
    close(found, BASE, dense(wanted, BASE))


def test_combined_adapters_save_and_load(tmp_path):
    found = algebra.combine(TASKS, "ties", density=0.4, base=BASE)
    lk.save_adapter(tmp_path / "a", found.plan, found.factors, base=BASE, meta={"errors": dict(found.errors)})
    assert lk.load_adapter(tmp_path / "a", base=BASE).plan == found.plan
