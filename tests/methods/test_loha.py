"""LoHa: the paper's equation, by Khatri-Rao rows and, where those are too many, by dense ones."""

import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.method import update_of
from tests.methods import promises


@pytest.fixture(params=[2, 3], ids=["pairs", "dense"])  # min(in, out) is 4 or 6
def setting(request):
    return lk.LoHa(rank=request.param, alpha=2 * request.param)


def formula(w, f, scale):
    assert scale == 2
    return w + scale * (f["a1"].T @ f["b1"]) * (f["a2"].T @ f["b2"])


def test_the_update_is_the_papers(setting):
    promises.check_formula(setting, formula, dict.fromkeys(("a1", "b1", "a2", "b2"), 1))


def test_rows_never_exceed_min_of_in_and_out(setting):
    plan, base, factors = promises.prepared(setting)
    for site in plan.sites:
        rows = update_of(site, base[site.path], factors[site.path], 1.0).a.shape[0]
        assert rows == min(site.rank**2, site.max_rank)


def test_the_start_changes_no_bit(setting):
    promises.check_start(setting)


def test_gradients_equal_autodiff_through_the_merged_weights(setting):
    promises.check_gradients(setting)


def test_leaves_of_bfloat16():
    promises.check_bfloat16(lk.LoHa(rank=2))


def test_stacked_trials_of_different_rank_equal_solo_runs(standard_promotion):
    promises.check_stacking(variant="loha")


def test_the_start_is_pefts():
    """A2 zero; A1 uniform to 1 / sqrt(in), B1 and B2 to 1 / sqrt(rank)."""
    f = promises.leaves_of(lk.LoHa(rank=10), jnp.zeros((400, 300)))
    assert not np.any(f.a2)
    for x, bound in ((f.a1, 400**-0.5), (f.b1, 10**-0.5), (f.b2, 10**-0.5)):
        assert 0.99 * bound < float(jnp.abs(x).max()) <= bound
        assert float(x.std()) == pytest.approx(bound / 3**0.5, rel=0.03)


def test_bad_settings():
    promises.check_refused(
        lk.LoHa,
        [
            ({"rank": True}, f"rank is True; {promises.RANK}"),
            ({"rank": 2, "alpha": -1}, "alpha is -1; it must be a positive number of float32's range."),
            ({"rank": 2, "inputs": ()}, "inputs is (); it must list axes of the parameter, such as (0,)."),
        ],
    )
